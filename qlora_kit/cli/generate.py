"""`qlora-kit generate`: answers to prompts, from the live model of a run or from any model folder.

Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit.cli.flags import Command, as_given
from qlora_kit.cli.open_model import faults_of_choice, open_chosen
from qlora_kit.config.rules import Checked, Rule, at_least, setting
from qlora_kit.config.settings import DEFAULT_NEW_TOKENS, RunConfig
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.system import quiet

if TYPE_CHECKING:
    from qlora_kit.runs.finished import Opened


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(Checked):
    """The flags of this command alone."""

    run: str | None = setting(None, "finished run, whose trained model answers", metavar="FOLDER")
    base: str | None = setting(None, "where the run's base is now, if it has moved", metavar="MODEL")
    prompt: tuple[str, ...] = setting(
        (),
        "prompt to answer; may be repeated; unset: --data, or lines of standard input",
        repeated=True,
        metavar="TEXT",
    )
    max_new_tokens: int = setting(DEFAULT_NEW_TOKENS, "longest answer in tokens", at_least(1))
    temperature: float = setting(0.0, "0: always the likeliest token; higher: sampled, more varied", at_least(0))
    top_p: float = setting(
        1.0,
        "sample from the likeliest tokens that together have this probability",
        Rule("must be greater than 0 and at most 1", lambda v: 0 < v <= 1),
    )
    raw: bool | None = setting(
        None, "give the prompt as it is, without a template; unset: as the run was trained", switch=True
    )
    json: bool = setting(False, "print one JSON object a prompt, as for --data")


SETTINGS = {
    "model": "model to ask instead of a run: folder or hub id, e.g. a release",
    "revision": "",
    "bits": "load --model in so many bits; unset: as it was saved",
    "tokenizer": "",
    "data": "prompts to answer, in any form that train takes; prints JSON lines",
    "columns": "",
    "batch_size": "prompts of --data answered at once (default: 4, or the run's)",
    "seed": "seed of the sampling (default: 42)",
    "device": "",
    "trust_remote_code": "",
}
OF_A_RUN = ("model", "revision", "bits", "tokenizer")  # what a run has of its own


def run(
    given: Mapping[str, Any],
    run: str | None = None,
    base: str | None = None,
    prompt: Sequence[str] = (),
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    temperature: float = 0.0,
    top_p: float = 1.0,
    raw: bool | None = None,
    json: bool = False,
) -> None:
    """Answer `prompt`, or the prompts of `given["data"]`, or the lines of standard input.

    `given` holds those settings that were given, by name. Raises `UserError`.
    """
    _check(given, run, base, prompt, temperature, top_p)
    quiet.quiet_libraries()
    from qlora_kit.cli.dialogue import Session, answer_file, answer_one, asked_prompts, prompts_of_file
    from qlora_kit.evaluate.generate import seeded
    from qlora_kit.runs.finished import memory_errors
    from qlora_kit.tasks.decoding import Sampling

    seed = RunConfig.from_flat({name: given[name] for name in ("seed",) if name in given}).seed
    say = Console(stderr=True, highlight=False)

    def check_task(config: RunConfig, opened: Opened) -> None:
        if opened.task.is_predicted:
            setting, value = ("run", run) if run else ("model", config.base.model)
            rule = f"was trained for {opened.task.name}, not to go on with a prompt"
            raise UserError.of(setting, value, rule, "Use `qlora-kit predict`.")

    config, opened = open_chosen(given, run, base, "seed", check_task, say)
    raw = opened.is_plain_text if raw is None else raw
    from_file = prompts_of_file(config, opened, raw, say) if "data" in given else None
    asked = asked_prompts(prompt, opened, raw, say) if from_file is None else iter(())
    with memory_errors(config.base.device):
        with say.status("loading the model"):
            model = opened.load()
        session = Session(
            model=model,
            opened=opened,
            sampling=Sampling(max_new_tokens, temperature, top_p),
            as_json=json,
            say=say,
        )
        with seeded(model, seed):
            if from_file is not None:
                answer_file(session, from_file, config.optim.batch_size)
            for one in asked:
                answer_one(session, one)


def _check(
    given: Mapping[str, Any],
    run: str | None,
    base: str | None,
    prompt: Sequence[str],
    temperature: float,
    top_p: float,
) -> None:
    """The rules that join several flags. Raises one `UserError` with every fault."""
    faults = faults_of_choice(given, run, base, OF_A_RUN, f" ({named('base')} says where a base moved)")
    if prompt and "data" in given:
        faults.append(Fault("prompt", prompt[0], f"cannot go with {named('data')}", "Give one of the two."))
    if top_p != 1 and temperature == 0:
        rule = f"changes nothing at {named('temperature', 0)}, which always takes the likeliest token"
        faults.append(Fault("top_p", top_p, rule, f"Add for example {named('temperature', 0.7)}."))
    if faults:
        raise UserError(faults)


COMMAND = Command(
    run=run,
    example="qlora-kit generate --run runs/chat --prompt 'Why is the sky blue?'",
    flags=GenerateFlags,
    settings=SETTINGS,
    read=as_given,
)
