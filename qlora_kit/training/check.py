"""The rules that join several groups of settings, or that depend on what is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import Fault, Faults, named
from qlora_kit.optim.optimizers import check_optim
from qlora_kit.runs.inputs import Examples

OF_HELD_OUT = ("early_stopping", "exact_match", "eval_steps", "metric")  # settings that need held-out data


def check_settings(config: RunConfig, examples: Examples | None = None) -> None:
    """Check the settings of a run together; `examples` stand in the place of its data. Raises one `UserError`."""
    has_eval = config.data.holds_out if examples is None else bool(examples.held_out)
    with Faults() as faults:
        for fault in (*_of_evaluation(config, has_eval), *_of_adapters(config), *_of_reports(config)):
            faults.add(fault)
        with faults.collecting():
            check_optim(config.optim.optim)


def _of_evaluation(config: RunConfig, has_eval: bool) -> Iterator[Fault]:
    evaluation = config.evaluation
    eval_steps, save_steps = evaluation.eval_steps, evaluation.save_steps
    for name in OF_HELD_OUT:
        if (value := getattr(evaluation, name)) is not None and not has_eval:
            remedy = f"Add {named('eval_data', 'FILE')} or {named('eval_fraction', 0.05)}."
            yield Fault(name, value, "needs held-out data", remedy)
    if evaluation.early_stopping is not None and not evaluation.keep_best:
        rule = "needs the best checkpoint to be kept"
        yield Fault("early_stopping", evaluation.early_stopping, rule, f"Drop {named('keep_best', False)}.")
    if has_eval and evaluation.keep_best and eval_steps and (save_steps or 0) % eval_steps:
        rule = f"must be a multiple of {named('eval_steps', eval_steps)}, so that the best can be kept"
        yield Fault("save_steps", save_steps, rule, f"Change one of them, or add {named('keep_best', False)}.")


def _of_adapters(config: RunConfig) -> Iterator[Fault]:
    """The rules that join how factors are made with how they are trained."""
    optim, adapter = config.optim, config.adapter
    for name in ("lora_plus", "rank_penalty"):
        if (given := getattr(optim, name)) is not None and config.base.full:
            yield Fault(
                name, given, f"is for adapters, and {named('full')} trains every weight", "Drop one of the two."
            )
    if optim.lora_plus is not None and adapter.variant == "lora-xs":
        variant = named("variant", "lora-xs")
        rule = f"needs both factors to train, and with {variant} only a core between them does"
        yield Fault("lora_plus", optim.lora_plus, rule, "Drop one of the two.")
    if optim.rank_penalty is not None and adapter.dora:
        rule = f"is on the change that the factors make, and with {named('dora')} they make only its direction"
        yield Fault("rank_penalty", optim.rank_penalty, rule, "Drop one of the two.")


def _of_reports(config: RunConfig) -> Iterator[Fault]:
    for library in config.report_to:
        if importlib.util.find_spec(library) is None:
            yield Fault("report_to", library, "is not installed", f"pip install 'qlora_kit[{library}]'")
