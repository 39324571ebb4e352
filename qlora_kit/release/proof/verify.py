"""The proof on the whole model: the release, reloaded by stock transformers, answers as the live model does.

Two processes of their own answer the same questions, the live model in one (`live_side`) and the release in the other
(`release_side`). Compared is in fp32 arithmetic, so that what differs is the weights; what each says in its own
arithmetic is reported beside it. A release in fp32 must be the live model. One that is rounded, or quantized after the
merge, must be what the live model's own weights, merged by PEFT, become when they are rounded or quantized in the same
way; how far both are from the live model is reported. Where the model does not fit into memory, its first blocks are
compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qlora_kit.errors import Fault, UserError, named
from qlora_kit.model.blocks import block_of
from qlora_kit.release.proof import live_side
from qlora_kit.release.proof.compare import Comparison, compare
from qlora_kit.release.proof.rows import ProofQuestions
from qlora_kit.release.proof.tensors import broken
from qlora_kit.system import files, host_memory

EXACT_LIMIT = 1e-4  # of the logits' scale: what the order of fp32 operations may make of the same weights
FLIPPED = 0.05  # of what rounding does: summed in another order, far fewer than 0.05² of the weights round otherwise
TIE_MARGIN = 1.25  # times what rounding does to the logits: so much may the best two of a tie move
MAX_TOKENS = 2048
MIN_TOKENS = 64
MULTIPLY_ADDS = 5e11  # of one pass over the questions, so that a large model does not take hours on a CPU
MAX_LOGIT_BYTES = 1 << 27  # of one file of logits
CHOICE_TIMES = 8  # as much of both where two releases are compared to choose one
LOGIT_FILES = 6  # for one release
PROCESS_BYTES = 1 << 30  # a process that proves takes so much beside the model
MODEL_BYTES = 5  # and so much for each weight: in fp32, and what it was made from
POLL_S = 0.1


@dataclass(frozen=True)
class Limit:
    """The largest difference allowed, in units of the logits' scale, and why it is that."""

    relative_max: float
    why: str


@dataclass(frozen=True, kw_only=True)
class AnswerComparison:
    """The greedy text of both, and where they part: at a token that leads its rivals by `lead` logits there."""

    reference: str
    release: str
    same: bool
    parted_at: int | None = None
    lead: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelProof:
    """What comparing the whole model found; `decisive` is what decides, the others are there to be read."""

    reference: str
    source: str
    rows: int
    blocks: str
    loaded_as: str
    exact: Comparison
    limit: Limit
    answer: AnswerComparison
    served: Comparison  # each in its own arithmetic, as it is trained and as it is served
    from_live: Comparison | None  # the release of `--into original` against the model that trained
    rounding: Comparison | None  # the reference with its weights rounded, against the reference; None in fp32
    rounded: Comparison | None  # the release against that
    task: str

    @property
    def decisive(self) -> Comparison:
        """The release against a model that must have the same weights."""
        return self.exact if self.rounded is None else self.rounded

    @property
    def score(self) -> dict[str, float]:
        """How well the release does on the data: its loss, and its KL from the model that trained."""
        against_live = self.exact if self.from_live is None else self.from_live
        assert against_live.loss is not None, "the questions have something supervised"
        error = against_live.loss_error or 0.0
        return {
            "loss": against_live.loss,
            "loss_error": error,
            "kl": against_live.kl,
            "tokens": against_live.supervised,
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        content = asdict(self)
        for name in ("exact", "served", "from_live", "rounding", "rounded"):
            own: Comparison | None = getattr(self, name)
            if own is not None:
                content[name] |= {"relative_max": own.relative_max, "relative_mean": own.relative_mean}
        return content


def token_budget(parameters: int, vocabulary: int, chooses: bool = False) -> int:
    """How many tokens to ask about, so that time and files of logits stay small; more where a choice hangs on it."""
    times = CHOICE_TIMES if chooses else 1
    by_time = int(times * MULTIPLY_ADDS / max(parameters, 1))
    by_space = times * MAX_LOGIT_BYTES // (4 * max(vocabulary, 1))
    return max(2, min(MAX_TOKENS, max(MIN_TOKENS, by_time), by_space))


def available_bytes() -> int:
    """Memory that processes may still take on this machine; all of it where the system does not tell."""
    available = host_memory.available_bytes()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if available is None else available


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The processes of a proof: the live model, and each release by what it was merged into."""

    job: live_side.LiveJob
    releases: Mapping[str, Path]
    folder: Path
    together: bool  # whether the machine has room for two at once

    def run(self) -> None:
        """Let all of them answer; what they say is then in `folder`, of a release in a folder of its own.

        Raises `UserError`.
        """
        job_file = self.folder / "job.json"
        files.write_json(job_file, asdict(self.job))
        commands = [[sys.executable, "-m", "qlora_kit.release.proof.live_side", str(job_file)]]
        stock = str(Path(__file__).with_name("release_side.py"))
        for into, release in self.releases.items():
            (self.folder / into).mkdir()
            places = (release, self.folder / live_side.ROWS_FILE, self.folder / into)
            code = ["--trust-remote-code"] if self.job.config["base"]["trust_remote_code"] else []
            commands.append([sys.executable, stock, *map(str, places), *code])
        at_once = 2 if self.together else 1
        for first in range(0, len(commands), at_once):
            self._answer(commands[first : first + at_once])

    def _answer(self, commands: Sequence[list[str]]) -> None:
        with _killed_at_the_end() as started:
            for command in commands:
                with (self.folder / f"{len(list(self.folder.glob('*.log')))}.log").open("wb") as log:
                    started.append(_start(command, log))
            waiting = list(started)
            while waiting:
                process = waiting.pop(0)
                try:
                    code = process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    waiting.append(process)
                    continue
                if code:
                    raise self._failure(code)

    def _failure(self, code: int) -> UserError:
        errors = self.folder / live_side.ERROR_FILE
        if errors.is_file():
            return UserError(Fault(*fault) for fault in json.loads(errors.read_text(encoding="utf-8"))["faults"])
        if code < 0:
            rule = (
                f"cannot be proven: a process of the proof was killed by signal {-code}, most likely for want of memory"
            )
            return UserError.of("out", "", rule, "Free some memory, and merge again.")
        logs = sorted(self.folder.glob("*.log"), key=lambda file: file.stat().st_mtime)
        said = logs[-1].read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return broken(f"a process of its proof ended with code {code}: {said[-1] if said else 'it said nothing'}")


def _start(command: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
    """Start a process that writes to `log`, and that ends when this one does (see `watch_parent`)."""
    return subprocess.Popen(  # noqa: S603
        command, env=_environment(), stdin=subprocess.PIPE, stdout=log, stderr=log
    )


def _environment() -> dict[str, str]:
    """The child finds this package where this process did, and asks no hub."""
    package = str(Path(__file__).resolve().parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


@contextmanager
def _killed_at_the_end() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list of processes; those that still run at the end, because of an error or Ctrl-C, are killed."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a release claims to be, for its judge."""

    into: str
    dtype: str
    held: str  # how the adapter saw the base
    packed: bool
    first: int | None = None  # so many blocks are compared; None: all of them

    @property
    def blocks(self) -> str:
        """Which blocks are compared, in words."""
        return "all" if self.first is None else f"the first {self.first}"


def judge(folder: Path, case: Case, tokenizer: Any) -> ModelProof:
    """Compare what both sides left in `folder`. Raises `UserError` where the release is not what it should be."""
    asked = ProofQuestions.read(folder / live_side.ROWS_FILE)
    own = folder / case.into
    theirs = json.loads((own / "release.json").read_text(encoding="utf-8"))
    ours = json.loads((folder / live_side.LIVE_FILE).read_text(encoding="utf-8"))
    _check_keys(theirs, case.first)
    for key, expected in asked.probe.items():
        if key != "text" and theirs["probe"][key] != expected:
            what = "chat template" if key == "template" else "tokens of a text"
            raise broken(f"its tokenizer has another {what} than that of the live model")
    name = "original" if case.into == "original" else live_side.LIVE

    def against(reference: str, model: Path) -> Comparison:
        return compare(folder / f"{reference}.safetensors", model, asked.labels)

    rounded = f"rounded-{case.into}"
    rounding = against(name, folder / f"{rounded}.safetensors") if rounded in ours else None
    proof = ModelProof(
        reference=_reference_text(case),
        source=asked.source,
        rows=len(asked.rows),
        blocks=case.blocks,
        loaded_as=theirs["class"],
        exact=against(name, own / "exact.safetensors"),
        limit=_limit(rounding, case),
        answer=_answer(ours[name], theirs["exact"], _words(asked, tokenizer)),
        served=against("literal", own / "served.safetensors"),
        from_live=against(live_side.LIVE, own / "exact.safetensors") if name == "original" else None,
        rounding=rounding,
        rounded=against(rounded, own / "exact.safetensors") if rounding is not None else None,
        task=asked.task,
    )
    _check(proof, case)
    return proof


def _reference_text(case: Case) -> str:
    if case.into == "original":
        return "the base's own weights with the adapter, in fp32 arithmetic"
    return f"the live model (the base in {case.held}, dequantized, with the adapter), in fp32 arithmetic"


def _limit(rounding: Comparison | None, case: Case) -> Limit:
    """fp32 has no rounding to speak of; otherwise a few weights may round the other way."""
    if rounding is None:
        return Limit(EXACT_LIMIT, "the order of operations in fp32")
    why = f"{FLIPPED:g} of what being {_rounded(case)} does: weights summed in another order may round the other way"
    return Limit(EXACT_LIMIT + FLIPPED * rounding.relative_max, why)


def _rounded(case: Case) -> str:
    return "quantized to nf4" if case.packed else f"rounded to {case.dtype}"


def _check_keys(found: Mapping[str, Any], first: int | None) -> None:
    """Check that stock transformers found every weight, and none without use but those of blocks left out."""
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        wrong = [name for name in found[key] if first is None or (block_of(name) or 0) < first]
        if wrong:
            raise broken(f"stock transformers reports {key.replace('_', ' ')}: {', '.join(wrong[:3])}")


def _words(asked: ProofQuestions, tokenizer: Any) -> Callable[[list[int]], str]:
    """What turns an answer's tokens, the numbers of labels, or places, into text."""
    if asked.prompt:
        return lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True))
    if not asked.names:  # places in a row
        return lambda numbers: ", ".join(map(str, numbers))
    return lambda numbers: ", ".join(asked.names[number] for number in numbers)


def _answer(
    reference: Mapping[str, Any], release: Mapping[str, Any], words: Callable[[list[int]], str]
) -> AnswerComparison:
    ours, theirs = reference["tokens"], release["tokens"]
    our_text, their_text = words(ours), words(theirs)
    if ours == theirs:
        return AnswerComparison(reference=our_text, release=their_text, same=True)
    parted = next(i for i, pair in enumerate(zip([*ours, None], [*theirs, None], strict=False)) if pair[0] != pair[1])
    lead = reference["leads"][parted] if parted < len(reference["leads"]) else 0.0
    return AnswerComparison(reference=our_text, release=their_text, same=False, parted_at=parted, lead=lead)


def _check(proof: ModelProof, case: Case) -> None:
    """Check the differences against their limits. Raises `UserError` that says where."""
    decisive, limit = proof.decisive, proof.limit
    reference = proof.reference if proof.rounded is None else f"{proof.reference}, {_rounded(case)},"
    if not (decisive.is_finite and decisive.relative_max <= limit.relative_max):
        row, token = decisive.where
        raise broken(
            f"its logits differ from {reference} by {decisive.relative_max:.2e} of their scale at token {token} of "
            f"row {row} ({proof.source}), and {limit.relative_max:.2e} is allowed ({limit.why})"
        )
    if not proof.served.is_finite:
        rule = f"gives logits that are not finite in {case.dtype} arithmetic, as it would be served ({proof.source})"
        raise UserError.of("dtype", case.dtype, rule, f"Use {named('dtype', 'bf16')} or fp32.")
    answer = proof.answer
    moved = limit.relative_max if proof.rounding is None else TIE_MARGIN * proof.rounding.relative_max
    allowed = 2 * moved * proof.exact.scale  # both of the best two may move
    if not answer.same and not (answer.lead is not None and answer.lead <= allowed):
        raise broken(
            f"its greedy answer parts from that of {proof.reference} at token {answer.parted_at}, where the first "
            f"choice leads by {answer.lead:.3g}, more than the {allowed:.3g} that may differ"
        )
