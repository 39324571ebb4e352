"""What answers: the model of a run, or any other, opened and announced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import Fault, named
from qlora_kit.system import quiet

if TYPE_CHECKING:
    from qlora_kit.runs.finished import Opened


def open_chosen(
    given: Mapping[str, Any],
    run: str | None,
    base_model: str | None,
    not_of_runs: str,
    check: Callable[[RunConfig, Opened], None],
    say: Console,
) -> tuple[RunConfig, Opened]:
    """The settings, and the model that is to answer, not loaded yet: of `run`, or else the one in `given`.

    `not_of_runs` is a setting among `given` that a run is not opened with; `check` may refuse what was opened, before
    anything is said. Raises `UserError`.
    """
    from qlora_kit.model.device import resolve_device
    from qlora_kit.runs import finished, messages
    from qlora_kit.system.progress import say_line

    warning = None
    if run is None:
        config = RunConfig.from_flat(given)
        device = resolve_device(config.base.device)
        opened = finished.open_model(config.base, device, as_saved="bits" not in given)
    else:
        found = finished.find_run(run, {k: v for k, v in given.items() if k != not_of_runs}, base_model)
        config = found.config
        device = resolve_device(config.base.device)
        with say.status("checking the base"):
            warning = None if config.base.full else finished.check_base(found)
        opened = finished.open_run(found, device)
    check(config, opened)
    quiet.quiet_progress_bars()
    for line in (*messages.opening(config, device), opened.title, *([warning] if warning else [])):
        say_line(say, line)
    return config, opened


def no_model() -> Fault:
    """That nothing says which model is meant."""
    remedy = f"Give {named('run', 'RUN')} or {named('model', 'MODEL')}."
    return Fault("run", None, f"is missing, and so is {named('model')}", remedy)


def faults_of_choice(
    given: Mapping[str, Any], run: str | None, base_model: str | None, of_a_run: Collection[str], hint: str = ""
) -> list[Fault]:
    """What is wrong with how a model was chosen; `of_a_run` are the settings that a run has of its own."""
    faults = []
    if run is None and "model" not in given:
        faults.append(no_model())
    if run is not None:
        rule = f"cannot go with {named('run')}, which has its own"
        faults += [Fault(name, given[name], rule, f"Give one of the two{hint}.") for name in of_a_run if name in given]
    if base_model is not None and run is None:
        rule = f"is the base of a run, and there is no {named('run')}"
        faults.append(Fault("base", base_model, rule, f"Give {named('model')} instead."))
    return faults
