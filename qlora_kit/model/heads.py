"""The new head that a task puts on a base: what it is, its first values, its dtype, and the loss on it.

A head is every module with weights beside the base: a classifier, the layer before it, an answer's span. It is never
quantized, and its weights are fp32 whatever those of the base and the factors are: they begin at random and go far, so
bf16 would round many of their steps away, and they are too few to cost anything. What comes in is cast to fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

from qlora_kit.data.encode import IGNORED
from qlora_kit.model.seeding import drawn_by
from qlora_kit.tasks.task_model import TaskModel


def head_names(model: Any) -> list[str]:
    """The names of the modules of a transformers model that make up its head.

    They stand beside the base; where a model has no module for its base, as T5's for question answering, and its parts
    stand there too, the head is the linear layers among them.
    """
    if model.base_model is model:
        return [name for name, child in model.named_children() if isinstance(child, nn.Linear)]
    return [name for name, child in model.named_children() if child is not model.base_model and has_weights(child)]


def has_weights(module: nn.Module) -> bool:
    """Whether there is any parameter in it."""
    return next(module.parameters(), None) is not None


def is_in_head(name: str, heads: Iterable[str]) -> bool:
    """Whether the weight `name` belongs to one of the modules `heads`."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def draw(model: Any, heads: Iterable[str], seed: int) -> None:
    """Give the modules `heads` of `model` new weights by `seed`, as transformers draws those of such a model."""
    for head in heads:
        for name, module in list(model.get_submodule(head).named_modules(prefix=head)):
            for key, parameter in list(module.named_parameters(recurse=False)):
                # a new tensor: transformers marks those that it has loaded, and would leave their values alone
                module.register_parameter(key, nn.Parameter(torch.zeros_like(parameter)))
            with drawn_by(seed, name, model.device):
                model._init_weights(module)


def keep_in_fp32(model: Any, heads: Iterable[str]) -> None:
    """Hold the modules `heads` of `model` in fp32, and cast what they are called with."""
    for head in heads:
        module = model.get_submodule(head).float()
        module.register_forward_pre_hook(_cast_to_own_dtype)


def _cast_to_own_dtype(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


class TaskLoss(nn.Module):
    """The loss of a task on a batch; without weights of its own, a module so that hooks can tell where it begins.

    `weights` (L,) are those of the labels, None for 1 each.
    """

    def __init__(self, task: TaskModel) -> None:
        super().__init__()
        self.task = task
        self.weights: torch.Tensor | None = None

    def forward(self, outputs: Any, attention_mask: torch.Tensor | None, labels: torch.Tensor, n_items: Any) -> Any:
        """The summed loss over `n_items`, by default the labels of the batch."""
        logits = self.task.logits(outputs, attention_mask)
        n_items = (labels != IGNORED).sum() if n_items is None else n_items
        weights = None if self.weights is None else self.weights.to(logits.device)
        return self.task.loss(logits, labels, n_items, weights)


def put_loss_on(model: Any, task: TaskModel) -> None:
    """Let `model` compute the loss of `task` where it is given labels; the logits are there too.

    transformers' own losses for such heads know no weights of classes, and most of them ignore by how many items the
    loss of an accumulated batch is to be divided.
    """
    model.task_loss = TaskLoss(task)
    model.accepts_loss_kwargs = True  # the Trainer then gives the number of items
    model.forward = MethodType(_with_loss(type(model).forward, task.decodes), model)


def _with_loss(stock: Callable[..., Any], decodes: bool) -> Callable[..., Any]:
    """The `forward` of a model, without its own loss; it keeps the signature, which PEFT and the Trainer look at.

    Where it `decodes`, the decoder is given what the labels are before it says them, as the model itself shifts them.
    """

    @functools.wraps(stock)
    def forward(
        self: Any, *args: Any, labels: torch.Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if decodes and labels is not None and kwargs.get("decoder_input_ids") is None:
            kwargs["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = stock(self, *args, **kwargs)
        if labels is not None:
            outputs["loss"] = self.task_loss(outputs, kwargs.get("attention_mask"), labels, num_items_in_batch)
        return outputs

    return forward


def is_over_tokens(model: Any) -> bool:
    """Whether the loss of `model`, which may be PEFT's, chooses among the tokens of a row, so needs its mask."""
    return any(isinstance(module, TaskLoss) and module.task.over_tokens for module in model.modules())


def set_weights(model: Any, weights_L: torch.Tensor) -> None:
    """Weigh the labels in the loss of `model`, which may be PEFT's."""
    for module in model.modules():
        if isinstance(module, TaskLoss):
            module.weights = weights_L
