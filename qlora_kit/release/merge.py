"""The merge, from the request to a finished release."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit.adapters.base_record import TrainedBase
from qlora_kit.config.settings import BaseConfig, DataConfig, RunConfig
from qlora_kit.errors import Faults, UserError, named
from qlora_kit.model.blocks import block_of
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.release import report, stream
from qlora_kit.release.factors import Adapter, open_adapter
from qlora_kit.release.files import side_files
from qlora_kit.release.files.folder import Place
from qlora_kit.release.files.read import FETCH_REMEDY, BadFileError, Checkpoint, open_base
from qlora_kit.release.files.write import SHARD_BYTES, Shard, plan_shards, writing
from qlora_kit.release.heads import config_fields, generation_fields, head_names, with_heads, with_task
from qlora_kit.release.mapping import ModelLayout, check_fits, check_mappable, read_layout
from qlora_kit.release.outputs import Outputs, plan_outputs
from qlora_kit.release.proof import live_side, verify
from qlora_kit.release.proof.first_blocks import adapter_of_first_blocks, blocks_that_fit, first_blocks
from qlora_kit.release.proof.tensors import TensorProof, check_files
from qlora_kit.release.quantize import Quantization
from qlora_kit.release.request import (
    MergeRequest,
    RunRecord,
    check_base,
    doubts,
    records_of,
    seen_dtype_name,
    trained_base,
)
from qlora_kit.release.stream import WeightRecipe
from qlora_kit.system import files, host_memory, quiet
from qlora_kit.system.progress import BytesProgress, say_line
from qlora_kit.tasks import registry
from qlora_kit.tasks.rows import separates_pairs

if TYPE_CHECKING:
    import torch

SPARE_BYTES = 64 << 20  # for everything that is not weights


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """All inputs of a merge, opened and checked."""

    request: MergeRequest  # with the task, if only an adapter knows it
    records: Sequence[RunRecord]
    adapters: Sequence[Adapter]
    trained_bases: Sequence[TrainedBase | None]  # each adapter's record of its base
    base_folder: Path
    base_hash: str
    tokenizer: Path | None
    checkpoint: Checkpoint
    seen_dtype: torch.dtype
    layout: ModelLayout
    outputs: Outputs
    heads: Sequence[str]  # modules that the task added to the base


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One finished set of weights: into which base, where, and the proofs of its tensors."""

    into: str
    folder: Path
    recipe: WeightRecipe
    tensors: Sequence[TensorProof]


def read_inputs(request: MergeRequest, say: Console) -> MergeInputs:
    """Open everything that `request` names and check that it belongs together. Raises `UserError`."""
    import torch

    found: list[Adapter] = []
    seen: list[TrainedBase | None] = []
    with Faults() as faults:
        with faults.collecting():
            records = records_of(request)
        for given, weight in request.adapters:
            with faults.collecting():
                found.append(open_adapter(given, weight))
            with faults.collecting():
                seen.append(trained_base(given))
        with faults.collecting():
            folder, checkpoint = open_base(request.base)
    _check_together(found)
    request = dataclasses.replace(request, base=with_task(request.base, found))
    tokenizer = side_files.find_tokenizer(request.base, [adapter.folder for adapter in found], folder)
    complete = _with_tokenizer(request, tokenizer)
    heads = head_names(complete.base)
    checkpoint = with_heads(checkpoint, found, heads)
    dtype: torch.dtype = getattr(torch, seen_dtype_name(request, seen))
    for line in doubts(request, [adapter.settings.get("base_model_name_or_path") for adapter in found], seen):
        say_line(say, line)
    with ThreadPoolExecutor(1) as beside, say.status("hashing the base"):
        hashing = beside.submit(check_base, complete, seen)
        layout = read_layout(complete.base, dtype, checkpoint)
        base_hash = hashing.result()
    for adapter in found:
        check_fits(adapter, layout)
    check_mappable(found, layout, request.base.bits <= 8 and request.into != "original")
    outputs = plan_outputs(layout, checkpoint, found, dtype, named_by_model=bool(heads))
    return MergeInputs(
        request=request,
        records=records,
        adapters=found,
        trained_bases=seen,
        base_folder=folder,
        base_hash=base_hash,
        tokenizer=tokenizer,
        checkpoint=checkpoint,
        seen_dtype=dtype,
        layout=layout,
        outputs=outputs,
        heads=heads,
    )


def _with_tokenizer(request: MergeRequest, tokenizer: Path | None) -> MergeRequest:
    """`request` with the tokenizer of the release for the base's, which need not have one."""
    chosen = request.base.tokenizer if tokenizer is None else str(tokenizer)
    return dataclasses.replace(request, base=dataclasses.replace(request.base, tokenizer=chosen))


def _check_together(adapters: Sequence[Adapter]) -> None:
    """Check that the adapters can be merged together, with their weights. Raises `UserError`."""
    for adapter in adapters:
        if adapter.weight != 1.0 and adapter.uses_dora:
            rule = f"cannot have the weight {adapter.weight:g}: its DoRA magnitudes fit only the full change"
            raise UserError.of("adapter", adapter.given, rule, "Merge it with weight 1.")
        if adapter.weight != 1.0 and adapter.settings.get("bias", "none") != "none":
            rule = f"cannot have the weight {adapter.weight:g}: it trained the base's biases, which PEFT does not scale"
            raise UserError.of("adapter", adapter.given, rule, "Merge it with weight 1.")
    if len(adapters) < 2:
        return
    given = [adapter.given for adapter in adapters]
    if any(adapter.uses_dora for adapter in adapters):
        rule = "include one with DoRA, whose magnitudes fit only its own change"
        raise UserError.of("adapter", given, rule, "Merge it alone.")
    replaced = [name for adapter in adapters for name in adapter.whole]
    twice = sorted({name for name in replaced if replaced.count(name) > 1})
    if twice:
        rule = f"each hold a whole {twice[0]}, and PEFT runs only one of them at a time"
        raise UserError.of("adapter", given, rule, "Merge one of them alone.")


def recipe_of(request: MergeRequest, inputs: MergeInputs, into: str) -> WeightRecipe:
    """What decides the weights of a merge into `into`."""
    original = into == "original"
    pack = Quantization(4, "nf4", request.base.double_quant) if request.format == "nf4" else None
    names: frozenset[str] = frozenset()
    if pack is not None:
        layout = inputs.layout
        if request.base.bits != 4:
            as_nf4 = dataclasses.replace(_with_tokenizer(request, inputs.tokenizer).base, bits=4)
            layout = read_layout(as_nf4, inputs.seen_dtype, inputs.checkpoint)
        names = frozenset(name for name, weight in layout.weights.items() if weight.quantized)
    return WeightRecipe(
        how=None if original else request.how,
        original=original,
        dtype=request.torch_dtype,
        pack=pack,
        packed_names=names,
    )


def plan_files(inputs: MergeInputs, recipe: WeightRecipe) -> list[Shard]:
    """The files of the release."""
    plans = [plan for out in inputs.outputs.weights for plan in stream.plans_of(out, inputs.checkpoint, recipe)]
    return plan_shards(plans, SHARD_BYTES)


def write_candidate(request: MergeRequest, inputs: MergeInputs, into: str, folder: Path, say: Console) -> Candidate:
    """Write and prove the weights of a merge into `into`, with all that a server needs beside them, in `folder`.

    Raises `UserError` if a tensor is wrong, or the disk is full.
    """
    recipe = recipe_of(request, inputs, into)
    shards = plan_files(inputs, recipe)
    folder.mkdir()
    total = sum(inputs.checkpoint.entries[out.source].n_bytes for out in inputs.outputs.weights)
    progress = BytesProgress(f"merging into the {into} base", total, say)
    try:
        with writing(folder, shards) as writer:
            written = stream.write_all(inputs.outputs.weights, inputs.checkpoint, recipe, writer, progress.advance)
            tensors = list(written)
    finally:
        progress.stop()
    with say.status("reading the files back"):
        check_files(folder, shards, writer.checksums)
    dtype = str(request.torch_dtype).removeprefix("torch.")
    with_code = request.base.trust_remote_code
    complete = _with_tokenizer(request, inputs.tokenizer).base
    fields, generation = config_fields(complete), generation_fields(complete, inputs.base_folder)
    side_files.write_config(
        inputs.base_folder, folder, dtype, inputs.outputs.untied, recipe.pack, with_code, inputs.heads, fields
    )
    side_files.copy_side_files(inputs.base_folder, inputs.tokenizer, folder, with_code)
    if generation is not None:
        files.write_json(folder / side_files.GENERATION_FILE, generation)
    return Candidate(into=into, folder=folder, recipe=recipe, tensors=tensors)


def prove(
    request: MergeRequest, inputs: MergeInputs, candidates: Sequence[Candidate], folder: Path
) -> list[verify.ModelProof]:
    """Compare each release with the live model in processes of their own. Raises `UserError` where they differ."""
    entries = inputs.checkpoint.entries
    needed, available = proof_bytes(inputs), verify.available_bytes()
    folder.mkdir()
    shown = _as_they_are(request, inputs, candidates)
    if needed > available:
        count = blocks_that_fit(entries, available - verify.PROCESS_BYTES, verify.MODEL_BYTES)
        shown = _first_blocks(inputs, candidates, count, folder)
    parameters = sum(entry.numel for name, entry in entries.items() if shown.has(name))
    vocabulary = max(entry.shape[0] for entry in entries.values() if len(entry.shape) == 2)
    recipe = candidates[0].recipe
    config = _run_config(request, inputs, shown.base)
    job = live_side.LiveJob(
        config=config.to_dict(),
        seen_dtype=str(inputs.seen_dtype).removeprefix("torch."),
        adapters=list(shown.adapters),
        bases=list(shown.releases),
        dtype=str(request.torch_dtype).removeprefix("torch."),
        pack=vars(recipe.pack) if recipe.pack is not None else None,
        packed_names=sorted(recipe.packed_names),
        token_budget=verify.token_budget(parameters, vocabulary, request.into == "best"),
        data_use=request.data_use,
        out=str(folder),
    )
    verify.Sides(job=job, releases=shown.releases, folder=folder, together=2 * needed <= available).run()
    tokenizer = load_tokenizer(config.base)
    cases = [
        verify.Case(
            into=into, dtype=request.dtype, held=request.held, packed=recipe.pack is not None, first=shown.first
        )
        for into in shown.releases
    ]
    return [verify.judge(folder, case, tokenizer) for case in cases]


def _sizes(inputs: MergeInputs) -> tuple[int, int]:
    """The parameters of the base, and at least as many as it has tokens in its vocabulary."""
    entries = inputs.checkpoint.entries.values()
    return sum(entry.numel for entry in entries), max(entry.shape[0] for entry in entries if len(entry.shape) == 2)


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What the proof looks at: everything, or stand-ins with the first blocks of each."""

    base: str
    releases: Mapping[str, Path]
    adapters: Sequence[tuple[str, float]]
    first: int | None = None  # number of blocks; None: all

    def has(self, name: str) -> bool:
        """Whether the weight `name` of the base's files is among what is looked at."""
        return self.first is None or (block_of(name) or 0) < self.first


def proof_bytes(inputs: MergeInputs) -> int:
    """The memory that a process of the proof takes for the whole model."""
    parameters, _ = _sizes(inputs)
    return parameters * verify.MODEL_BYTES + verify.PROCESS_BYTES


def _check_choice(request: MergeRequest, inputs: MergeInputs) -> None:
    """Check that two releases can be compared before they are made. Raises `UserError`."""
    needed, available = proof_bytes(inputs), verify.available_bytes()
    if request.into == "best" and needed > available:
        rule = f"needs {needed / 2**30:.1f} GiB of memory to compare both, and {available / 2**30:.1f} GiB are free"
        raise UserError.of("into", "best", rule, f"Choose {named('into', 'original')} or {named('into', 'trained')}.")


def _as_they_are(request: MergeRequest, inputs: MergeInputs, candidates: Sequence[Candidate]) -> _Shown:
    releases = {candidate.into: candidate.folder for candidate in candidates}
    return _Shown(base=str(inputs.base_folder), releases=releases, adapters=request.adapters)


def _first_blocks(inputs: MergeInputs, candidates: Sequence[Candidate], count: int, folder: Path) -> _Shown:
    chosen = [
        (str(part), adapter.weight)
        for number, adapter in enumerate(inputs.adapters)
        if (part := adapter_of_first_blocks(adapter.folder, count, folder / f"adapter-{number}")) is not None
    ]
    releases = {c.into: first_blocks(c.folder, count, folder / f"release-{c.into}") for c in candidates}
    return _Shown(
        base=str(first_blocks(inputs.base_folder, count, folder / "base")),
        releases=releases,
        adapters=chosen,
        first=count,
    )


def _run_config(request: MergeRequest, inputs: MergeInputs, model: str) -> RunConfig:
    """The settings of the live side, with the tokenizer of the release."""
    changed = dataclasses.replace(_with_tokenizer(request, inputs.tokenizer).base, model=model)
    return RunConfig(base=changed, data=request.data or DataConfig(), seed=request.seed)


@dataclass(frozen=True)
class MergeResult:
    """A finished release: its folder, and what `merge_report.json` in it says."""

    folder: Path
    report: report.Report


def merge(request: MergeRequest, console: Console | None = None, whole_model: bool = True) -> MergeResult:
    """Make the release that `request` describes, prove it, and put it in its place.

    All mistakes are found before anything is written; a release that fails its proof is removed. Progress goes to
    `console` (standard error by default). Without `whole_model` only the tensors are proven, which needs no other
    process: to measure the merge alone. Raises `UserError`.
    """
    quiet.quiet_libraries()
    say = console if console is not None else Console(stderr=True)
    place = Place.at(request.out)
    place.check(request.overwrite)
    with host_memory.building(), _unreadable_files(request, place):
        return _merge(request, place, say, whole_model)


@contextmanager
def _unreadable_files(request: MergeRequest, place: Place) -> Iterator[None]:
    """Turn the error of a file that changed while it was read into a `UserError` that names its owner."""
    try:
        yield
    except BadFileError as error:
        folder = error.file.parent if error.file is not None else None
        setting, value, remedy = "base", request.base.model, FETCH_REMEDY
        for given, _ in request.adapters:
            if folder == Path(given):
                setting, value, remedy = "adapter", given, "Copy it again."
        if folder is not None and place.working in folder.parents:
            setting, value, remedy = "out", request.out, "Merge again; the disk may be faulty."
        raise UserError.of(setting, value, f"a file changed while it was read: {error}", remedy) from None


def _merge(request: MergeRequest, place: Place, say: Console, whole_model: bool) -> MergeResult:
    inputs = read_inputs(request, say)
    request = inputs.request
    _check_choice(request, inputs)
    with place.made() as working:
        place.require_space(_needed_bytes(request, inputs, whole_model))
        candidates = [write_candidate(request, inputs, into, working / into, say) for into in request.bases]
        chosen, model_proof, choice = candidates[0], None, None
        if whole_model:
            if not say.is_terminal:
                say_line(say, "comparing the release with the live model, in processes of their own")
            with say.status("comparing the release with the live model"):
                proofs = prove(request, inputs, candidates, working / "proof")
            chosen, model_proof, choice = choose(candidates, proofs)
        found = _report(request, inputs, chosen, model_proof, choice)
        report.write_report(found, chosen.folder)
        place.put(chosen.folder, request.overwrite)
    return MergeResult(place.final, found)


def _needed_bytes(request: MergeRequest, inputs: MergeInputs, whole_model: bool) -> int:
    """Space for every release that is made, and for what the proof writes down."""
    recipes = [recipe_of(request, inputs, into) for into in request.bases]
    weights = sum(shard.n_bytes for recipe in recipes for shard in plan_files(inputs, recipe))
    parameters, vocabulary = _sizes(inputs)
    file_bytes = 4 * vocabulary * verify.token_budget(parameters, vocabulary, request.into == "best")  # fp32
    logits = file_bytes * verify.LOGIT_FILES * len(recipes) if whole_model else 0
    return weights + logits + SPARE_BYTES


def choose(
    candidates: Sequence[Candidate], proofs: Sequence[verify.ModelProof]
) -> tuple[Candidate, verify.ModelProof, dict[str, Any] | None]:
    """The release with the lower loss, its proof, and if there were two the scores of both."""
    if len(candidates) == 1:
        return candidates[0], proofs[0], None
    scores = {candidate.into: own.score for candidate, own in zip(candidates, proofs, strict=True)}
    best = min(range(len(candidates)), key=lambda number: scores[candidates[number].into]["loss"])
    chosen = candidates[best].into
    return candidates[best], proofs[best], {"chosen": chosen, "source": proofs[best].source, "scores": scores}


def _report(
    request: MergeRequest,
    inputs: MergeInputs,
    chosen: Candidate,
    model_proof: verify.ModelProof | None,
    choice: dict[str, Any] | None,
) -> report.Report:
    return report.make_report(
        request,
        report.Findings(
            base_hash=inputs.base_hash,
            base_licence=side_files.licence_of(inputs.base_folder),
            adapters=inputs.adapters,
            trained_bases=inputs.trained_bases,
            records=inputs.records,
            into=chosen.into,
            left_out=inputs.outputs.left_out,
            untied=inputs.outputs.untied,
            tensors=chosen.tensors,
            model=model_proof,
            choice=choice,
            joins_pairs=_joins_pairs(_with_tokenizer(request, inputs.tokenizer).base),
        ),
    )


def _joins_pairs(config: BaseConfig) -> bool:
    """Whether pairs of texts have a newline between them that the tokenizer does not put there."""
    if registry.task_named(config.task).pair_advice is None:
        return False
    return not separates_pairs(load_tokenizer(config))
