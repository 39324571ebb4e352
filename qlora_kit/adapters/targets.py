"""Which linear layers get factors, in which blocks, and of which rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qlora_kit.config.settings import AdapterConfig
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.model.blocks import block_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear layer inside the blocks by its full name, whatever its class; the head is not among them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and block_of(name) is not None
    }


def choose_targets(
    model: PreTrainedModel, wanted: tuple[str, ...] | None, blocks: frozenset[int] | None = None
) -> list[str]:
    """The names to give PEFT: `wanted`, or by default all of `linear_layers`, by their shortest unambiguous names.

    With `blocks` they are the full names of the layers in those blocks (of an encoder-decoder model, in both stacks):
    PEFT's own `layers_to_transform` ignores targets that are given by their full names.
    Raises `UserError` if one of `wanted` matches no linear layer, or the model lacks one of `blocks`.
    """
    layers = linear_layers(model)
    short = sorted({name.rsplit(".", 1)[-1] for name in layers})
    if blocks is not None:
        _check_blocks(blocks, layers)
        names = choose_targets(model, wanted)
        layers = {n: m for n, m in layers.items() if block_of(n) in blocks and any(matches(n, t) for t in names)}
        if not layers:
            rule = f"has no layer in the blocks {_ranges(blocks)}"
            remedy = f"Choose other {named('layers')} or {named('targets')}."
            raise UserError.of("targets", ",".join(wanted or short), rule, remedy)
        return sorted(layers)
    if wanted is None:
        return _unambiguous(model, layers, short)
    missing = [t for t in wanted if not any(matches(name, t) for name in layers)]
    if missing:
        remedy = f"This model has: {', '.join(short)}."
        raise UserError(Fault("targets", target, "matches no linear layer", remedy) for target in missing)
    return _unambiguous(model, [name for name in layers if any(matches(name, t) for t in wanted)], wanted)


def _unambiguous(model: PreTrainedModel, chosen: Iterable[str], names: Sequence[str]) -> list[str]:
    """`names` if they match the layers `chosen` and no other module (such as a pooler's), else the full names."""
    everywhere = {name for name, _ in model.named_modules() if any(matches(name, target) for target in names)}
    return list(names) if everywhere == set(chosen) else sorted(chosen)


def matches(name: str, target: str) -> bool:
    """Whether the layer `name` is `target` or ends in it, as PEFT matches them."""
    return name == target or name.endswith("." + target)


def _check_blocks(blocks: frozenset[int], layers: Iterable[str]) -> None:
    there = {number for name in layers if (number := block_of(name)) is not None}
    if not blocks <= there:
        rule = f"names blocks that the model does not have: {_ranges(blocks - there)}"
        raise UserError.of("layers", _ranges(blocks), rule, f"It has {_ranges(there)}.")


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` for the numbers 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def ranks_of(names: Iterable[str], config: AdapterConfig) -> dict[str, int]:
    """The rank of each of the layers `names`, as PEFT chooses it: by the first pattern that matches.

    Raises `UserError` for patterns that match none of them.
    """
    names = list(names)
    unused = [p for p in config.rank_pattern if not any(matches(name, p) for name in names)]
    if unused:
        short = sorted({name.rsplit(".", 1)[-1] for name in names})
        remedy = f"The layers that get factors are: {', '.join(short)}."
        given = [f"{pattern}={config.rank_pattern[pattern]}" for pattern in unused]
        rule = "matches no layer that gets factors"
        raise UserError(Fault("rank_pattern", shown, rule, remedy) for shown in given)
    own = {name: [r for pattern, r in config.rank_pattern.items() if matches(name, pattern)] for name in names}
    return {name: found[0] if found else config.r for name, found in own.items()}
