"""Tells the tracker where a training step is and what its tensors are, by hooks on the model and the optimizer.

The hooks change nothing in the step: they only look. The same ones sit on the planner's model and on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from qlora_kit.lean.loss import ChunkedLoss
from qlora_kit.memory.track import MemoryTracker
from qlora_kit.model.blocks import find_blocks
from qlora_kit.model.heads import TaskLoss

LOSSES = (ChunkedLoss, ModulesToSaveWrapper, TaskLoss)  # the loss of a batch begins with any of these


@contextmanager
def watch(tracker: MemoryTracker, model: Any, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """While entered, `tracker` knows the phase, the block and the kind of what `model` and `optimizer` make."""
    label_model(tracker, model)
    with ExitStack() as stack:
        for handle in _hooks(tracker, model):
            stack.callback(handle.remove)
        if optimizer is not None:
            stack.callback(optimizer.register_step_pre_hook(lambda *_: _before_step(tracker, optimizer)).remove)
            stack.callback(optimizer.register_step_post_hook(lambda *_: _after_step(tracker, optimizer)).remove)
        yield


def label_model(tracker: MemoryTracker, model: Any) -> None:
    """Say what kind each weight, buffer and quantization state of `model` is."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            tracker.label(parameter, _category(model, module, name, parameter))
            for state in _quantization_tensors(module, parameter):
                tracker.label(state, "quantization state")
        for buffer in module.buffers(recurse=False):
            tracker.label(buffer, "norms and biases")
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            tracker.label(module.weight, "embeddings and head")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # factors may have frozen parts
        if "lora_" in name or ".modules_to_save." in name:
            tracker.label(tensor, "adapters")


def _category(model: Any, module: nn.Module, name: str, parameter: torch.Tensor) -> str:
    if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
        return "quantized weights"
    if isinstance(module, nn.Embedding):
        return "embeddings and head"
    return "weights" if parameter.ndim > 1 else "norms and biases"


def _quantization_tensors(module: nn.Module, parameter: Any) -> Iterator[torch.Tensor]:
    holders = [getattr(parameter, "quant_state", None)]
    holders.append(getattr(holders[0], "state2", None))
    for holder in filter(None, holders):
        yield from (v for v in vars(holder).values() if isinstance(v, torch.Tensor))
    for holder in (parameter, getattr(module, "state", None)):
        scales = getattr(holder, "SCB", None)
        if isinstance(scales, torch.Tensor):
            yield scales


def _hooks(tracker: MemoryTracker, model: Any) -> Iterator[Any]:
    blocks = find_blocks(model)
    yield model.register_forward_pre_hook(lambda *_: tracker.enter("forward"))
    yield model.register_forward_hook(lambda *_: tracker.enter("loss backward"))
    for index, block in enumerate(blocks):
        yield block.register_forward_pre_hook(_block_begins(tracker, index), with_kwargs=True)
        if hasattr(block, "_gradient_checkpointing_func"):
            yield _CheckpointWatch(tracker, index, block)
        yield block.register_forward_hook(lambda *_: _block_ends(tracker))
        for layer in block.children():  # a recomputation calls them, but not the block
            yield layer.register_forward_pre_hook(_layer_begins(tracker, index))
            yield layer.register_forward_hook(_layer_ends(tracker), always_call=True)
    for module in model.modules():  # the loss in chunks does without the head
        if module is model.get_output_embeddings() or isinstance(module, LOSSES):
            yield module.register_forward_pre_hook(_loss_begins(tracker, len(blocks)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter.register_post_accumulate_grad_hook(lambda p: tracker.label(p.grad, "gradients"))


class _CheckpointWatch:
    """Labels what the checkpoints of `block` keep, of the whole block or of its halves; `remove` ends that.

    A tensor that comes back from the host is a checkpoint, too.
    """

    def __init__(self, tracker: MemoryTracker, index: int, block: Any) -> None:
        self.block, self.checkpoint = block, block._gradient_checkpointing_func

        def watched(function: Any, *args: Any) -> Any:
            def run(*args: Any) -> Any:
                if tracker.region.phase == "backward" and tracker.region.block != index:
                    tracker.enter("backward", index)
                if args and isinstance(args[0], torch.Tensor) and torch.is_grad_enabled():
                    tracker.label(args[0], "checkpoints")
                return function(*args)

            return self.checkpoint(run, *args)

        block._gradient_checkpointing_func = watched

    def remove(self) -> None:
        """Give the block its own function back."""
        self.block._gradient_checkpointing_func = self.checkpoint


def _block_begins(tracker: MemoryTracker, index: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if tracker.region.phase != "forward":
            return
        tracker.enter("forward", index)
        hidden: Any = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            return
        if index > 0 and hidden.requires_grad:
            hidden.register_hook(lambda _: tracker.enter("backward", index - 1))  # type: ignore[no-untyped-call]

    return hook


def _block_ends(tracker: MemoryTracker) -> None:
    if tracker.region.phase == "forward":
        tracker.enter("forward")


def _layer_begins(tracker: MemoryTracker, index: int) -> Any:
    def hook(*_: object) -> None:
        tracker.layers_running += 1
        if tracker.region.phase != "forward" and tracker.region.block != index:
            tracker.enter("backward", index)

    return hook


def _layer_ends(tracker: MemoryTracker) -> Any:
    def hook(*_: object) -> None:
        tracker.layers_running -= 1

    return hook


def _loss_begins(tracker: MemoryTracker, n_blocks: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        tracker.enter("loss")
        if args and isinstance(args[0], torch.Tensor) and args[0].requires_grad:
            hidden: Any = args[0]
            hidden.register_hook(lambda _: tracker.enter("backward", n_blocks - 1))

    return hook


def _before_step(tracker: MemoryTracker, optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:  # gathered in a buffer, it has not been seen to arrive
                tracker.label(parameter.grad, "gradients")
    tracker.enter("optimizer")
    tracker.mark()


def _after_step(tracker: MemoryTracker, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor) and not getattr(value, "is_paged", False):
                tracker.label(value, "optimizer states")
    tracker.enter("idle")
