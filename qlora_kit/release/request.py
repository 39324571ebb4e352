"""What is asked of a merge, and the record of the run that the adapter comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import base, reopening
from qlora_kit.config import BaseConfig, DataConfig, flag
from qlora_kit.errors import Fault, UserError
from qlora_kit.release.quantize import Quantization
from qlora_kit.runs import RUN_FILE

if TYPE_CHECKING:
    import torch

INTO = ("trained", "original", "best")
# other words for "trained", each right for one way of holding the base: (bits, 4-bit type)
TRAINED_AS = {"nf4": (4, "nf4"), "fp4": (4, "fp4"), "int8": (8, None)}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FORMATS = ("dense", "nf4")


@dataclass(frozen=True)
class Request:
    """A merge: which adapters, into which base, where to and how. Raises `UserError` for what cannot go together."""

    base: BaseConfig  # and how the adapters saw it
    adapters: tuple[tuple[str, float], ...]  # folders as they were typed, and their weights
    out: str
    run: str | None = None
    into: str = "trained"  # one of `INTO`, or another word for "trained"
    dtype: str = "bf16"
    format: str = "dense"
    overwrite: bool = False
    allow_other_base: bool = False
    data: DataConfig | None = None  # what the proof asks; None: a built-in text
    data_given: bool = False  # on the command line, rather than by the run
    seed: int = 42

    def __post_init__(self) -> None:
        faults = []
        if not self.adapters:
            faults.append(Fault("--run", self.run, "is needed", "Give --run runs/x, or --adapter DIR --base MODEL."))
        for name, allowed in (("into", (*INTO, *TRAINED_AS)), ("dtype", tuple(DTYPES)), ("format", FORMATS)):
            value = getattr(self, name)
            if value not in allowed:
                rule = f"must be one of {', '.join(allowed)}"
                faults.append(Fault(flag(name), value, rule, f"For example {flag(name)} {allowed[0]}."))
        if self.base.full:
            rule = "trained every weight, so there is no adapter to merge"
            faults.append(Fault("--run", self.run, rule, "Its model/ folder can be served as it is."))
        if self.into in TRAINED_AS and (self.base.bits, self.base.quant_type) not in self._kinds(self.into):
            rule = f"is not how the adapter saw its base, which was held in {self.held}"
            faults.append(Fault("--into", self.into, rule, "Use --into trained, which is the default, or original."))
        if self.into == "best" and self.base.multi_label:
            rule = "is not decided for several labels at once"
            faults.append(Fault("--into", self.into, rule, "Use --into trained, which is the default, or original."))
        if self.into == "best" and not self._has_judge:
            rule = "is needed to choose between two bases"
            faults.append(Fault("--data", None, rule, "Give examples of what the model is for, with --data FILE."))
        if faults:
            raise UserError(faults)

    @property
    def _has_judge(self) -> bool:
        """Whether there is data to score releases on that the adapter was not trained on."""
        if self.data is None or self.data_given:
            return self.data is not None
        return self.data.held_out_source is not None or self.data.eval_fraction > 0

    @property
    def data_use(self) -> str:
        """How much the proof depends on the data, in the words of `questions.DATA_USES`."""
        if self.data is None:
            return "none"
        return "needed" if self.data_given or self.into == "best" else "preferred"

    @staticmethod
    def _kinds(word: str) -> set[tuple[int, str]]:
        bits, kind = TRAINED_AS[word]
        return {(bits, kind)} if kind is not None else {(bits, "nf4"), (bits, "fp4")}

    @property
    def held(self) -> str:
        """How the adapter saw the base, in a word."""
        if self.base.bits == 4:
            return self.base.quant_type
        return "int8" if self.base.bits == 8 else f"{self.base.bits} bits"

    @property
    def bases(self) -> tuple[str, ...]:
        """The kinds of base to merge into: trained, original, or both."""
        return (
            ("trained", "original") if self.into == "best" else ("original" if self.into == "original" else "trained",)
        )

    @property
    def how(self) -> Quantization:
        """How the adapter saw the base."""
        return Quantization(self.base.bits, self.base.quant_type, self.base.double_quant)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the release."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote down about itself, and the folder of it as the user typed it."""

    given: str
    content: Mapping[str, Any]

    @property
    def base_hash(self) -> str:
        """The content hash of the base that it trained on."""
        return str(self.content["base_hash"])

    @property
    def dtype_name(self) -> str:
        """The dtype that it loaded the base in, as torch calls it."""
        return str(self.content["resolved"].get("dtype", "bfloat16"))


def records_of(request: Request) -> list[RunRecord]:
    """The records of the runs that the adapters come from, as far as they lie where a run puts them.

    Raises `UserError`.
    """
    folders = [request.run] if request.run is not None else []
    for given, _ in request.adapters:
        run = Path(given).parent
        if Path(given).name == "adapter" and (run / RUN_FILE).is_file() and str(run) not in folders:
            folders.append(str(run))
    return [RunRecord(folder, reopening.find_run(folder, {}).record) for folder in folders]


def seen_dtype_name(request: Request, records: Iterable[RunRecord]) -> str:
    """The dtype in which the adapters saw the base: what their run says, else bf16 as nearly everyone trains.

    Raises `UserError` where the runs of several adapters differ.
    """
    if request.base.bits == 32:
        return "float32"
    names = {record.dtype_name for record in records} or {"bfloat16"}
    if len(names) > 1:
        rule = f"saw the base in different dtypes: {', '.join(sorted(names))}"
        raise UserError.of("--adapter", [given for given, _ in request.adapters], rule, "Merge one at a time.")
    return names.pop()


def check_base(request: Request, records: Iterable[RunRecord]) -> str:
    """Check that the base is the one that each run trained on, and held as it was; returns its hash.

    Raises `UserError`, which says how to overrule.
    """
    records = list(records)
    for record in records:
        trained = record.content["settings"].get("base", {})
        for name in ("bits", "quant_type", "double_quant"):
            if trained.get(name) != getattr(request.base, name):
                rule = f"is not how {record.given} held the base, which was {trained.get(name)!r}"
                raise UserError.of(flag(name), getattr(request.base, name), rule, "Leave it as it was in the run.")
    found = base.hash_base(request.base, request.seed)
    for record in records:
        if record.base_hash != found and not request.allow_other_base:
            rule = (
                f"is not the base that {record.given} was trained on: its content hash is {found[:19]}…, "
                f"and that of the run's base is {record.base_hash[:19]}…"
            )
            remedy = (
                "Give the one that it was trained on, or add --allow-other-base to merge into this one all the same."
            )
            raise UserError.of("--base", request.base.model, rule, remedy)
    return found
