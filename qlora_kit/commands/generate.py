"""`qlora-kit generate`: answers to prompts, from the live model of a run or from any model folder.

Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit import quiet
from qlora_kit.config import DEFAULT_NEW_TOKENS, RunConfig, flag
from qlora_kit.errors import Fault, UserError, said_of

if TYPE_CHECKING:
    from qlora_kit.generating import Prompt
    from qlora_kit.reopening import Opened
    from qlora_kit.scoring import Answer, Sampling

OF_A_RUN = ("model", "revision", "bits", "tokenizer")  # what a run has of its own
READY = "One prompt a line, each answered by itself; Ctrl-D ends."


@dataclass(frozen=True)
class Session:
    """A loaded model, and how it is to answer."""

    model: Any
    opened: Opened
    sampling: Sampling
    json: bool
    say: Console


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
    from qlora_kit.generating import seeded
    from qlora_kit.reopening import memory_errors
    from qlora_kit.scoring import Sampling

    seed = RunConfig.from_flat({name: given[name] for name in ("seed",) if name in given}).seed
    say = Console(stderr=True, highlight=False)
    config, opened = _open(given, run, base, say)
    raw = opened.is_plain_text if raw is None else raw
    from_file = _prompts_of_file(config, opened, raw) if "data" in given else None
    asked = _asked(prompt, opened, raw, say) if from_file is None else iter(())
    with memory_errors(config.base.device):
        with say.status(f"loading {opened.title}"):
            model = opened.load()
        session = Session(model, opened, Sampling(max_new_tokens, temperature, top_p), json, say)
        with seeded(model, seed):
            if from_file is not None:
                _answer_file(session, from_file, config.optim.batch_size)
            for one in asked:
                _answer(session, one)


def _check(
    given: Mapping[str, Any],
    run: str | None,
    base: str | None,
    prompt: Sequence[str],
    temperature: float,
    top_p: float,
) -> None:
    """The rules that join several flags. Raises one `UserError` with every fault."""
    faults = []
    if run is None and "model" not in given:
        faults.append(Fault("--run", None, "is missing, and so is --model", "Give --run RUN or --model MODEL."))
    if run is not None:
        rule, remedy = (
            "cannot go with --run, which has its own",
            "Give one of the two (--base says where a base moved).",
        )
        faults += [Fault(flag(name), given[name], rule, remedy) for name in OF_A_RUN if name in given]
    if base is not None and run is None:
        faults.append(Fault("--base", base, "is the base of a run, and there is no --run", "Give --model instead."))
    if prompt and "data" in given:
        faults.append(Fault("--prompt", prompt[0], "cannot go with --data", "Give one of the two."))
    if top_p != 1 and temperature == 0:
        rule = "changes nothing at --temperature 0, which always takes the likeliest token"
        faults.append(Fault("--top-p", top_p, rule, "Add for example --temperature 0.7."))
    if faults:
        raise UserError(faults)


def _open(given: Mapping[str, Any], run: str | None, base_model: str | None, say: Console) -> tuple[RunConfig, Opened]:
    """The settings, and the model that is to answer, not loaded yet. Raises `UserError`."""
    from qlora_kit import base, narration, reopening
    from qlora_kit.progress import say_line

    if run is None:
        config = RunConfig.from_flat(given)
        device = base.resolve_device(config.base.device)
        opened = reopening.open_model(config.base, device, as_saved="bits" not in given)
        warning = None
    else:
        found = reopening.find_run(run, {k: v for k, v in given.items() if k != "seed"}, base_model)
        config = found.config
        device = base.resolve_device(config.base.device)
        with say.status("checking the base"):
            warning = None if config.base.full else reopening.check_base(found)
        opened = reopening.open_run(found, device)
    quiet.quiet_progress_bars()
    for line in (*narration.opening(config, device), opened.title, *([warning] if warning else [])):
        say_line(say, line)
    return config, opened


def _prompts_of_file(config: RunConfig, opened: Opened, raw: bool) -> list[Prompt]:
    from qlora_kit import data
    from qlora_kit.generating import encode_prompts

    with said_of("--data", instead_of="--eval-data"):  # the held-out part, where a source has several
        examples = data.read_prompts(config.data.data, config.data.columns, "--eval-data")
    return encode_prompts(examples, opened, raw, "--data")


def _asked(texts: Sequence[str], opened: Opened, raw: bool, say: Console) -> Iterator[Prompt]:
    """The prompts of the flags, or of standard input as its lines come. Raises `UserError`."""
    from qlora_kit.generating import encode_prompts, typed_prompt

    if texts:
        return iter(encode_prompts([typed_prompt(text) for text in texts], opened, raw, "--prompt"))
    if sys.stdin.isatty():
        return _typed_prompts(opened, raw, say)
    piped = _piped_prompts(opened, raw)
    first = next(piped, None)  # before the model is loaded
    if first is None:
        remedy = "Give --prompt TEXT or --data FILE, or pipe in one prompt a line."
        raise UserError.of("prompts", "standard input", "holds none", remedy)
    return chain([first], piped)


def _piped_prompts(opened: Opened, raw: bool) -> Iterator[Prompt]:
    from qlora_kit.generating import encode_prompts, typed_prompt

    try:
        for line in sys.stdin:
            if line.strip():
                yield from encode_prompts([typed_prompt(line.rstrip("\r\n"))], opened, raw, "standard input")
    except UnicodeDecodeError:
        raise UserError.of("standard input", "a line", "is not UTF-8", "Convert it.") from None


def _typed_prompts(opened: Opened, raw: bool, say: Console) -> Iterator[Prompt]:
    """What is typed at the terminal; a prompt that cannot be answered is said and asked for again."""
    from qlora_kit.generating import encode_prompts, typed_prompt
    from qlora_kit.progress import say_line

    say_line(say, READY)
    while (line := _typed_line()) is not None:
        try:
            if line.strip():
                yield from encode_prompts([typed_prompt(line)], opened, raw, "prompt")
        except UserError as error:
            say_line(say, f"error: {error}")


def _typed_line() -> str | None:
    """A line of the terminal, None at its end; the mark before it goes to standard error where output is kept."""
    import readline  # noqa: F401  # gives `input` its arrow keys and its memory

    if not sys.stdout.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    try:
        return input("> " if sys.stdout.isatty() else "")
    except EOFError:
        sys.stderr.write("\n")
        return None


def _answer(session: Session, prompt: Prompt) -> None:
    """Answer one prompt on standard output: its text as it comes, or one line of JSON."""
    from qlora_kit.generating import stream
    from qlora_kit.progress import say_line

    tokenizer = session.opened.tokenizer
    if session.json:
        answer = stream(session.model, tokenizer, prompt, session.sampling, lambda piece: None)
        _write(_json_line(prompt, answer))
        return
    try:
        answer = stream(session.model, tokenizer, prompt, session.sampling, _write)
    finally:
        _write("\n")
    if answer.is_cut:
        say_line(session.say, _cut_note(session, "cut off"))


def _answer_file(session: Session, prompts: Sequence[Prompt], batch_size: int) -> None:
    """One line of JSON for each prompt, in their order."""
    from qlora_kit.generating import answer_in_order
    from qlora_kit.progress import counted, say_line

    cut = 0
    shows_lines = sys.stdout.isatty() and session.say.is_terminal  # a bar would be among them
    with nullcontext(lambda _: None) if shows_lines else counted(session.say, "answered", len(prompts)) as tick:
        answers = answer_in_order(session.model, session.opened.tokenizer, prompts, session.sampling, batch_size)
        for prompt, answer in zip(prompts, answers, strict=True):
            _write(_json_line(prompt, answer))
            cut += answer.is_cut
            tick(1)
    if cut:
        say_line(session.say, _cut_note(session, f"{cut} of {len(prompts)} answers were cut off"))


def _json_line(prompt: Prompt, answer: Answer) -> str:
    return jsonlib.dumps({"prompt": prompt.text, "generated": answer.text}, ensure_ascii=False) + "\n"


def _cut_note(session: Session, what: str) -> str:
    return f"({what} at {session.sampling.max_new_tokens} tokens, --max-new-tokens, or where the model's positions end)"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
