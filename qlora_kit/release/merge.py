"""The merge, from what is asked to a finished release."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit import base, host_memory, quiet, runs
from qlora_kit.config import BaseConfig, DataConfig, RunConfig
from qlora_kit.errors import Faults, UserError
from qlora_kit.progress import BytesProgress, say_line
from qlora_kit.release import content, live, proof, report, stream, verify
from qlora_kit.release.blocks import adapter_of_first_blocks, blocks_that_fit, first_blocks
from qlora_kit.release.factors import Adapter, open_adapter
from qlora_kit.release.heads import config_fields, head_names, with_heads, with_task
from qlora_kit.release.mapping import Layout, check_fits, check_mappable, read_layout
from qlora_kit.release.outputs import Outputs, plan_outputs
from qlora_kit.release.place import Place
from qlora_kit.release.quantize import Quantization
from qlora_kit.release.request import Request, RunRecord, check_base, records_of, seen_dtype_name
from qlora_kit.release.shards import SHARD_BYTES, Shard, plan_shards, writing
from qlora_kit.release.source import Checkpoint, open_base
from qlora_kit.release.stream import Recipe

if TYPE_CHECKING:
    import torch

SPARE_BYTES = 64 << 20  # for everything that is not weights


@dataclass(frozen=True)
class Inputs:
    """All that a merge reads, opened and checked."""

    request: Request  # with the task, where only an adapter says it
    records: Sequence[RunRecord]
    adapters: Sequence[Adapter]
    base_folder: Path
    base_hash: str
    checkpoint: Checkpoint
    seen_dtype: torch.dtype
    layout: Layout
    outputs: Outputs
    heads: Sequence[str]  # modules that the task put beside the base


@dataclass(frozen=True)
class Candidate:
    """One finished set of weights: into which base, where, and the proofs of its tensors."""

    into: str
    folder: Path
    recipe: Recipe
    tensors: Sequence[proof.TensorProof]


def read_inputs(request: Request, say: Console) -> Inputs:
    """Open everything that `request` names and check that it belongs together. Raises `UserError`."""
    import torch

    faults = Faults()
    records = faults.collect(lambda: records_of(request))
    adapters = [faults.collect(lambda own=own: open_adapter(*own)) for own in request.adapters]  # type: ignore[misc]
    opened = faults.collect(lambda: open_base(request.base))
    faults.raise_if_any()
    assert records is not None
    assert opened is not None
    found = [adapter for adapter in adapters if adapter is not None]
    folder, checkpoint = opened
    _check_together(found)
    request = dataclasses.replace(request, base=with_task(request.base, found))
    heads = head_names(request.base)
    checkpoint = with_heads(checkpoint, found, heads)
    dtype: torch.dtype = getattr(torch, seen_dtype_name(request, records))
    with ThreadPoolExecutor(1) as beside, say.status("hashing the base"):
        hashing = beside.submit(check_base, request, records)
        layout = read_layout(request.base, dtype, checkpoint)
        base_hash = hashing.result()
    for adapter in found:
        check_fits(adapter, layout)
    check_mappable(found, layout, request.base.bits <= 8 and request.into != "original")
    outputs = plan_outputs(layout, checkpoint, found, dtype, named_by_model=bool(heads))
    return Inputs(request, records, found, folder, base_hash, checkpoint, dtype, layout, outputs, heads)


def _check_together(adapters: Sequence[Adapter]) -> None:
    """Check that the adapters and their weights have a common meaning. Raises `UserError`."""
    for adapter in adapters:
        if adapter.weight != 1.0 and adapter.settings.get("bias", "none") != "none":
            rule = f"cannot have the weight {adapter.weight:g}: it trained the base's biases, which PEFT does not scale"
            raise UserError.of("--adapter", adapter.given, rule, "Merge it with weight 1.")
    if len(adapters) < 2:
        return
    given = [adapter.given for adapter in adapters]
    if any(adapter.uses_dora for adapter in adapters):
        rule = "include one with DoRA, whose lengths are meant for its own directions alone"
        raise UserError.of("--adapter", given, rule, "Merge it alone.")
    replaced = [name for adapter in adapters for name in adapter.whole]
    twice = sorted({name for name in replaced if replaced.count(name) > 1})
    if twice:
        rule = f"each hold {twice[0]} whole, and PEFT runs only one of them at a time"
        raise UserError.of("--adapter", given, rule, "Merge one of them alone.")


def recipe_of(request: Request, inputs: Inputs, into: str) -> Recipe:
    """What decides the weights of a merge into `into`."""
    original = into == "original"
    pack = Quantization(4, "nf4", request.base.double_quant) if request.format == "nf4" else None
    names: frozenset[str] = frozenset()
    if pack is not None:
        layout = inputs.layout
        if request.base.bits != 4:
            as_nf4 = BaseConfig(**{**vars(request.base), "bits": 4})
            layout = read_layout(as_nf4, inputs.seen_dtype, inputs.checkpoint)
        names = frozenset(name for name, weight in layout.weights.items() if weight.quantized)
    return Recipe(None if original else request.how, original, request.torch_dtype, pack, names)


def plan_files(inputs: Inputs, recipe: Recipe) -> list[Shard]:
    """The files of the release."""
    plans = [plan for out in inputs.outputs.weights for plan in stream.plans_of(out, inputs.checkpoint, recipe)]
    return plan_shards(plans, SHARD_BYTES)


def write_candidate(request: Request, inputs: Inputs, into: str, folder: Path, say: Console) -> Candidate:
    """Write and prove the weights of a merge into `into`, with all that a server needs beside them, in `folder`.

    Raises `UserError` where a tensor is not right, or the disk is full.
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
    proof.check_files(folder, shards)
    dtype = str(request.torch_dtype).removeprefix("torch.")
    with_code = request.base.trust_remote_code
    fields = config_fields(request.base)
    content.write_config(
        inputs.base_folder, folder, dtype, inputs.outputs.untied, recipe.pack, with_code, inputs.heads, fields
    )
    tokenizers = [adapter.folder for adapter in inputs.adapters]
    if request.base.tokenizer is not None:
        tokenizers.append(Path(request.base.tokenizer))
    content.copy_side_files(inputs.base_folder, [*tokenizers, inputs.base_folder], folder, with_code)
    return Candidate(into, folder, recipe, tensors)


def prove(request: Request, inputs: Inputs, candidates: Sequence[Candidate], folder: Path) -> list[verify.ModelProof]:
    """Compare each release with the live model in processes of their own. Raises `UserError` where they differ."""
    parameters = sum(entry.numel for entry in inputs.checkpoint.entries.values())
    vocabulary = max(entry.shape[0] for entry in inputs.checkpoint.entries.values() if len(entry.shape) == 2)
    needed = parameters * verify.MODEL_BYTES + verify.PROCESS_BYTES
    available = verify.available_bytes()
    folder.mkdir()
    shown = _as_they_are(request, candidates)
    if needed > available:
        room = available - verify.PROCESS_BYTES
        count = blocks_that_fit(inputs.checkpoint.entries, room, verify.MODEL_BYTES)
        shown = _first_blocks(inputs, candidates, count, folder)
    recipe = candidates[0].recipe
    config = _run_config(request, inputs, shown.base)
    job = live.Job(
        config=config.to_dict(),
        seen_dtype=str(inputs.seen_dtype).removeprefix("torch."),
        adapters=list(shown.adapters),
        bases=list(shown.releases),
        dtype=str(request.torch_dtype).removeprefix("torch."),
        pack=vars(recipe.pack) if recipe.pack is not None else None,
        packed_names=sorted(recipe.packed_names),
        token_budget=verify.token_budget(parameters, vocabulary),
        data_use=request.data_use,
        out=str(folder),
    )
    verify.Sides(job, shown.releases, folder, together=2 * needed <= available).run()
    tokenizer = base.load_tokenizer(config.base)
    cases = [
        verify.Case(into, request.dtype, request.held, recipe.pack is not None, shown.blocks) for into in shown.releases
    ]
    return [verify.judge(folder, case, tokenizer) for case in cases]


@dataclass(frozen=True)
class _Shown:
    """What the proof looks at: everything, or stand-ins with the first blocks of each."""

    base: str
    releases: Mapping[str, Path]
    adapters: Sequence[tuple[str, float]]
    blocks: str


def _as_they_are(request: Request, candidates: Sequence[Candidate]) -> _Shown:
    releases = {candidate.into: candidate.folder for candidate in candidates}
    return _Shown(request.base.model, releases, request.adapters, "all")


def _first_blocks(inputs: Inputs, candidates: Sequence[Candidate], count: int, folder: Path) -> _Shown:
    chosen = [
        (str(adapter_of_first_blocks(adapter.folder, count, folder / f"adapter-{number}")), adapter.weight)
        for number, adapter in enumerate(inputs.adapters)
    ]
    releases = {c.into: first_blocks(c.folder, count, folder / f"release-{c.into}") for c in candidates}
    return _Shown(str(first_blocks(inputs.base_folder, count, folder / "base")), releases, chosen, f"the first {count}")


def _run_config(request: Request, inputs: Inputs, model: str) -> RunConfig:
    """The settings of the live side: the tokenizer is the one that came with the adapter, where one did."""
    own = request.base.tokenizer
    with_tokenizer = [a for a in inputs.adapters if (a.folder / "tokenizer.json").is_file()]
    tokenizer = str(with_tokenizer[0].folder) if own is None and with_tokenizer else own
    changed = dataclasses.replace(request.base, model=model, tokenizer=tokenizer)
    return RunConfig(base=changed, data=request.data or DataConfig(), seed=request.seed)


@dataclass(frozen=True)
class Result:
    """A finished release: its folder, and what `merge_report.json` in it says."""

    folder: Path
    report: report.Report


def merge(request: Request, console: Console | None = None, whole_model: bool = True) -> Result:
    """Make the release that `request` describes, prove it, and put it in its place.

    Everything that can be wrong is found before anything is written; nothing is left of a release that fails its
    proof. Progress goes to `console` (standard error by default). Without `whole_model` only the tensors are proven,
    which needs no other process: for measuring the merge alone. Raises `UserError`.
    """
    quiet.quiet_libraries()
    host_memory.return_large_blocks()
    say = console if console is not None else Console(stderr=True)
    place = Place.at(request.out)
    place.check(request.overwrite)
    inputs = read_inputs(request, say)
    request = inputs.request
    with place.made() as working:
        runs.require_space(working, _needed_bytes(request, inputs, whole_model))
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
        place.put(chosen.folder)
    return Result(place.final, found)


def _needed_bytes(request: Request, inputs: Inputs, whole_model: bool) -> int:
    """Space for every release that is made, and for what the proof writes down."""
    recipes = [recipe_of(request, inputs, into) for into in request.bases]
    weights = sum(shard.n_bytes for recipe in recipes for shard in plan_files(inputs, recipe))
    logits = verify.MAX_LOGIT_BYTES * verify.LOGIT_FILES * len(recipes) if whole_model else 0
    return weights + logits + SPARE_BYTES


def choose(
    candidates: Sequence[Candidate], proofs: Sequence[verify.ModelProof]
) -> tuple[Candidate, verify.ModelProof, dict[str, Any] | None]:
    """The release with the lower loss, its proof, and where there were two how both did."""
    if len(candidates) == 1:
        return candidates[0], proofs[0], None
    scores = {candidate.into: own.score for candidate, own in zip(candidates, proofs, strict=True)}
    best = min(range(len(candidates)), key=lambda number: scores[candidates[number].into]["loss"])
    chosen = candidates[best].into
    return candidates[best], proofs[best], {"chosen": chosen, "source": proofs[best].source, "scores": scores}


def _report(
    request: Request,
    inputs: Inputs,
    chosen: Candidate,
    model_proof: verify.ModelProof | None,
    choice: dict[str, Any] | None,
) -> report.Report:
    licences = {"base": content.licence_of(inputs.base_folder), "data": None}
    return report.make_report(
        request,
        inputs.base_hash,
        inputs.adapters,
        inputs.records,
        chosen.into,
        licences,
        inputs.outputs.left_out,
        inputs.outputs.untied,
        chosen.tensors,
        model_proof,
        choice,
    )
