"""The request of a merge, and the records that the adapters and their runs have of their base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters.base_record import TrainedBase, read_record
from qlora_kit.config.files import read_settings
from qlora_kit.config.settings import BaseConfig, DataConfig, RunConfig
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.model import source
from qlora_kit.release.quantize import Quantization
from qlora_kit.runs import finished
from qlora_kit.runs.folder import RUN_FILE

if TYPE_CHECKING:
    import torch

INTO = ("trained", "original", "best")
# other words for "trained", each right for one way of holding the base: (bits, 4-bit type)
TRAINED_AS = {"nf4": (4, "nf4"), "fp4": (4, "fp4"), "int8": (8, None)}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FORMATS = ("dense", "nf4")
TRAINED_REMEDY = f"Use {named('into', 'trained')}, which is the default,"


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """A merge: which adapters, into which base, where to and how. Raises `UserError` for invalid combinations."""

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
    data_given: bool = False  # by the user, not by the run
    seed: int = 42

    def __post_init__(self) -> None:
        faults = []
        if not self.adapters:
            remedy = f"Give {named('run', 'runs/x')}, or {named('adapter', 'DIR')} {named('base', 'MODEL')}."
            faults.append(Fault("run", self.run, "is needed", remedy))
        for name, allowed in (("into", (*INTO, *TRAINED_AS)), ("dtype", tuple(DTYPES)), ("format", FORMATS)):
            value = getattr(self, name)
            if value not in allowed:
                rule = f"must be one of {', '.join(allowed)}"
                faults.append(Fault(name, value, rule, f"For example {named(name, allowed[0])}."))
        if self.base.full:
            rule = "trained every weight, so there is no adapter to merge"
            faults.append(Fault("run", self.run, rule, "Serve its model/ folder as it is."))
        if self.into in TRAINED_AS and (self.base.bits, self.base.quant_type) not in self._kinds(self.into):
            rule = f"is not how the adapter saw its base, which was held in {self.held}"
            faults.append(Fault("into", self.into, rule, f"{TRAINED_REMEDY} or original."))
        if self.into == "best" and self.base.multi_label:
            rule = "cannot be decided for several labels at once"
            faults.append(Fault("into", self.into, rule, f"{TRAINED_REMEDY} or original."))
        if self.into == "best" and not self._has_judge:
            rule = "is needed to choose between two bases"
            remedy = f"Give examples of what the model is for, with {named('data', 'FILE')}."
            faults.append(Fault("data", None, rule, remedy))
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
        """How much the proof depends on the data, in the words of `proof.rows.DATA_USES`."""
        if self.data is None:
            return "none"
        if self.into == "best":
            return "choice"
        return "needed" if self.data_given else "preferred"

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
    """A run's record of itself, and its folder as the user typed it."""

    given: str
    content: Mapping[str, Any]

    @property
    def base(self) -> TrainedBase:
        """The base that it trained on. Raises `UserError` for settings that break a rule."""
        settings = RunConfig.from_flat(read_settings({"settings": self.content["settings"]})).base
        dtype = str(self.content["resolved"].get("dtype", "bfloat16"))
        return TrainedBase.of(settings, str(self.content["base_hash"]), dtype)


def records_of(request: MergeRequest) -> list[RunRecord]:
    """The records of the runs that the adapters come from, for adapters that are still in their run.

    Raises `UserError`.
    """
    folders = [request.run] if request.run is not None else []
    for given, _ in request.adapters:
        run = _run_around(given)
        if run is not None and not any(Path(folder).resolve() == Path(run).resolve() for folder in folders):
            folders.append(run)
    records = [_record(folder) for folder in folders]
    _check_start(request, records)
    return records


def _check_start(request: MergeRequest, records: Iterable[RunRecord]) -> None:
    """Check that no adapter corrects quantization errors that the base does not have. Raises `UserError`."""
    begun = [r.given for r in records if r.content["settings"].get("adapter", {}).get("init") == "loftq"]
    if begun and "original" in request.bases:
        rule = f"lacks the quantization errors that the factors of {begun[0]} correct (they began with LoftQ)"
        raise UserError.of("into", request.into, rule, f"{TRAINED_REMEDY[:-1]}.")


def _record(run: str) -> RunRecord:
    return RunRecord(run, finished.find_run(run, {}).record)


def _run_around(given: str) -> str | None:
    """The run whose `adapter/` is the folder `given`, in the user's spelling; None if it is in no run."""
    folder = Path(given).resolve()
    if folder.name != "adapter" or not (folder.parent / RUN_FILE).is_file():
        return None
    return str(Path(given).parent if Path(given).name == "adapter" else Path(given) / "..")


def trained_base(given: str) -> TrainedBase | None:
    """The base that the adapter in the folder `given` was trained on; None if there is no record.

    The record is beside the weights; older runs have it only in their own record. Raises `UserError`.
    """
    found = read_record(Path(given), "adapter")
    run = _run_around(given)
    return _record(run).base if found is None and run is not None else found


def held_by(adapters: Iterable[str], given: Mapping[str, object], into: str | None) -> dict[str, object] | None:
    """The settings of how the adapters saw their base: from their records, else as follows from `given`.

    None if unknown. Raises `UserError` if the adapters differ, or if it must be known and is not.
    """
    adapters = list(adapters)
    held = [own.held for own in map(trained_base, adapters) if own is not None]
    if held:
        if any(other != held[0] for other in held):
            rule = "were trained on bases held in different ways"
            raise UserError.of("adapter", adapters, rule, "Merge one at a time.")
        return held[0]
    if "bits" in given:
        return {}
    if into in TRAINED_AS:
        bits, kind = TRAINED_AS[into]
        return {"bits": bits} if kind is None else {"bits": bits, "quant_type": kind}
    if "quant_type" in given or "double_quant" in given:
        return {"bits": 4}
    if into in ("trained", "best"):
        rule = f"is needed for {named('into', into)}: the adapter has no record of how its base was held"
        remedy = f"Give {named('bits', 4)}, 8, 16 or 32, or {named('into', 'original')}."
        raise UserError.of("bits", None, rule, remedy)
    return None


def seen_dtype_name(request: MergeRequest, seen: Iterable[TrainedBase | None]) -> str:
    """The dtype in which the adapters saw the base: from their records, else bf16, the usual one.

    Raises `UserError` if several adapters differ.
    """
    if request.base.bits == 32:
        return "float32"
    names = {own.dtype for own in seen if own is not None} or {"bfloat16"}
    if len(names) > 1:
        rule = f"were trained on the base in different dtypes: {', '.join(sorted(names))}"
        raise UserError.of("adapter", [given for given, _ in request.adapters], rule, "Merge one at a time.")
    return names.pop()


def check_base(request: MergeRequest, seen: Sequence[TrainedBase | None]) -> str:
    """Check that the base is the one that each adapter was trained on, and held as it was; returns its hash.

    `seen` has the record of each. Raises `UserError`, which says how to overrule it.
    """
    known = [(given, own) for (given, _), own in zip(request.adapters, seen, strict=True) if own is not None]
    for given, own in known:
        for name, value in own.held.items():
            if getattr(request.base, name) != value:
                rule = f"is not how {given} saw the base, which was {value!r}"
                raise UserError.of(name, getattr(request.base, name), rule, "Leave it as it was in training.")
    try:
        found = source.hash_base(request.base, request.seed)
    except OSError as error:
        rule = f"its files cannot be read ({error.strerror})"
        raise UserError.of("base", request.base.model, rule, "Fetch or copy it again.") from None
    for given, own in known:
        if own.hash != found and not request.allow_other_base:
            rule = (
                f"is not the base that {given} was trained on: its content hash is {found[:19]}…, "
                f"and that of the adapter's base is {own.hash[:19]}…"
            )
            anyway = named("allow_other_base", True)
            remedy = f"Give the one that it was trained on, or add {anyway} to merge into this one anyway."
            raise UserError.of("base", request.base.model, rule, remedy)
    return found


def doubts(request: MergeRequest, stated: Sequence[object], seen: Sequence[TrainedBase | None]) -> list[str]:
    """Warnings about bases that cannot be checked, if the adapter's own settings name (`stated`) another one."""
    return [
        f"warning: {given} names {name} as its base, but {request.base.model} was given; whether they are the same "
        "cannot be checked"
        for (given, _), name, own in zip(request.adapters, stated, seen, strict=True)
        if own is None and isinstance(name, str) and name and not _same_place(name, request.base.model)
    ]


def _same_place(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/") or Path(one).resolve() == Path(other).resolve()
