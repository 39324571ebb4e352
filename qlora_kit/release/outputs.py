"""The tensors of the release, each with what it is made from: planned in full before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.release.factors import Adapter, Factor
from qlora_kit.release.files.read import Checkpoint
from qlora_kit.release.mapping import ModelLayout, Weight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Output:
    """One weight of the release: the base's tensor `source`, and what the adapters do to it, in the order given."""

    name: str  # in the release's files
    source: str  # in the base's files
    loaded: torch.dtype  # what loading casts it to
    weight: Weight | None  # None for a tensor that loading splits, joins or reshapes, and that is copied as it is
    factors: tuple[tuple[Adapter, Factor], ...] = ()  # low-rank changes
    whole: tuple[tuple[Adapter, str], ...] = ()  # replacements: the names in the adapter's file
    biases: tuple[tuple[Adapter, Factor], ...] = ()  # what the factors' own biases add

    @property
    def adapted(self) -> bool:
        """Whether any adapter has something to say about it."""
        return bool(self.factors or self.whole or self.biases)

    @property
    def must_change(self) -> bool:
        """Whether it cannot be as it was; a tensor held whole may be a copy of the base's, saved for safety."""
        return bool(self.factors or self.biases)


@dataclass(frozen=True)
class Outputs:
    """Every weight of the release, the names in the base's files that are left out, and whether ties are cut."""

    weights: tuple[Output, ...]
    left_out: tuple[str, ...]
    untied: bool


def plan_outputs(
    layout: ModelLayout,
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    named_by_model: bool = False,
) -> Outputs:
    """What the release holds: the base's tensors in their order, without those that the model does not use.

    `dtype` is the one that the model is loaded in. They keep the names of the base's files, or (`named_by_model`, for
    a model with a new head, whose files may name all else without its prefix) get those of the live model.
    Where an adapter changes one of several weights that share a tensor, they part, as in the live model.
    """
    weights, left_out, untied = [], [], False
    for file_name in checkpoint.entries:
        live = layout.weight_of(file_name)
        if live is not None:
            name = live.name if named_by_model else file_name
            weights.append(_output(name, file_name, live, adapters))
        elif file_name in layout.converted:
            weights.append(Output(name=file_name, source=file_name, loaded=dtype, weight=None))
        else:
            left_out.append(file_name)
    for group in layout.tied:
        if not _alike(group, adapters):
            untied = True
            stand_in = next(layout.file_names[name] for name in group if name in layout.file_names)
            missing = [name for name in group if name not in layout.file_names]
            weights += [_output(name, stand_in, layout.weights[name], adapters) for name in missing]
    return Outputs(tuple(weights), tuple(left_out), untied)


def _output(name: str, source: str, weight: Weight, adapters: Sequence[Adapter]) -> Output:
    module, _, key = weight.name.rpartition(".")
    factors = [(adapter, adapter.factors[module]) for adapter in adapters if module in adapter.factors]
    whole = [(adapter, adapter.whole[weight.name]) for adapter in adapters if weight.name in adapter.whole]
    biases = [(adapter, factor) for adapter, factor in factors if factor.bias is not None and key == "bias"]
    of_weight = tuple(factors) if key == "weight" else ()
    return Output(
        name=name,
        source=source,
        loaded=weight.dtype,
        weight=weight,
        factors=of_weight,
        whole=tuple(whole),
        biases=tuple(biases),
    )


def _alike(group: Sequence[str], adapters: Sequence[Adapter]) -> bool:
    """Whether the adapters leave the weights of `group`, which are one tensor in the base, equal to each other."""
    modules = {name.rpartition(".")[0] for name in group}
    if any(module in adapter.factors for adapter in adapters for module in modules):
        return False
    return all(_same_whole(group, adapter) for adapter in adapters)


def _same_whole(group: Sequence[str], adapter: Adapter) -> bool:
    import torch

    keys = [adapter.whole.get(name) for name in group]
    if None in keys:
        return not any(keys)
    first, *others = (adapter.checkpoint.read(str(key)) for key in keys)
    return all(torch.equal(first, other) for other in others)


def seen_dtype(output: Output, checkpoint: Checkpoint, original: bool) -> torch.dtype:
    """The dtype that the base's tensor is cast to first: what loading made of it, or its own where `original`."""
    own = checkpoint.entries[output.source].torch_dtype
    return own if original or not own.is_floating_point else output.loaded


def written_dtype(output: Output, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.dtype:
    """The dtype in the release: `dtype`, but for integers and for what loading keeps in fp32 in a 16-bit model."""
    import torch

    own = checkpoint.entries[output.source].torch_dtype
    if not own.is_floating_point:
        return own
    kept = output.weight is not None and output.weight.kept_in_fp32
    return torch.float32 if kept else dtype
