"""What a profile on a CPU uses: the planner's tracker on the real tensors, and the same steps predicted on `meta`.

The prediction counts as a CPU runs, not as CUDA would: its attention kernel, its unfused dropout, its optimizer loop,
storages at their own size. It has to be compared with live bytes on a CPU, and says nothing about a GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from qlora_kit import build
from qlora_kit.config.settings import RunConfig
from qlora_kit.lean import mask, varlen
from qlora_kit.memory import kernels
from qlora_kit.memory.shortcut import MetaResults
from qlora_kit.memory.simulate import META, nothing_left_behind, run_step
from qlora_kit.memory.track import Event, MemoryTracker
from qlora_kit.memory.watch import watch
from qlora_kit.model import sdpa
from qlora_kit.optim.adversarial import passes_of
from qlora_kit.optim.kind import PlannedDevice
from qlora_kit.optim.optimizers import resolve_optim

if TYPE_CHECKING:
    from transformers import PretrainedConfig

aten = torch.ops.aten
CPU = torch.device("cpu")
MAX_FRAMES = 60  # how far up a stack the line that made a tensor is looked for
_BORING = ("/torch/", "/memory/track.py", "/memory/profile", "/memory/kernels.py", "/memory/watch.py", "<frozen")


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A forward pass: rows, tokens in each, whether some of them are padding, and how many have a loss (None: all).

    `batch` is what the model was called with, its tensors on `meta` (None: rows without packing).
    """

    rows: int
    tokens: int
    padded: bool = False
    supervised: int | None = None
    batch: Mapping[str, Any] | None = None


class CpuTracker(MemoryTracker):  # type: ignore[no-untyped-call]  # torch's class is untyped
    """Follows the real storages, each at its own size, and notes the line of Python that made it."""

    def __init__(self) -> None:
        super().__init__("cpu", 1, kernels.open_kernels())
        self.lines: dict[int, str] = {}  # by the identity of a storage that an event keeps

    def _follow(self, untyped: torch.UntypedStorage, operation: str, category: str | None) -> None:
        before = len(self.events)
        super()._follow(untyped, operation, category)
        if operation and len(self.events) > before:
            self.lines[id(self.events[-1].storage)] = line_of_caller()


def line_of_caller() -> str:
    """The innermost line of Python that is in no library of tensors: `folder/file.py:12 in function`."""
    frame = sys._getframe(1)
    for _ in range(MAX_FRAMES):
        code = frame.f_code
        if not is_boring(code.co_filename):
            return short_line(code.co_filename, frame.f_lineno, code.co_name)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return ""


def is_boring(filename: str) -> bool:
    """Whether a line in `filename` says nothing about what a tensor is for."""
    return any(part in filename.replace("\\", "/") for part in _BORING)


def short_line(filename: str, line: int, function: str) -> str:
    """`transformers/models/gpt2/modeling_gpt2.py` → `gpt2/modeling_gpt2.py:12 in forward`."""
    parts = filename.replace("\\", "/").split("/")
    return f"{'/'.join(parts[-2:])}:{line} in {function}"


def mark_clipping(tracker: MemoryTracker, model: Any) -> Any:
    """Tell `tracker` when a backward pass of `model` is over; returns the handle that removes it.

    The Trainer has no callback between the backward pass and clipping, but autograd's engine has one.
    """
    engine = torch.autograd.Variable._execution_engine

    def hook(module: Any, args: Any, output: Any) -> None:
        loss = output.get("loss")
        if loss is not None and loss.requires_grad:
            loss.register_hook(lambda _: engine.queue_callback(lambda: tracker.enter("clip")))

    return model.register_forward_hook(hook)


def predict(config: RunConfig, architecture: PretrainedConfig, steps: Sequence[Sequence[BatchShape]]) -> list[Event]:
    """Every change of live bytes of the optimizer steps `steps` (each a list of forward passes) on a CPU."""
    config = dataclasses.replace(config, lean=config.lean.resolved("cpu"))
    results = MetaResults()
    tracker = MemoryTracker("meta", 1, _stand_ins(), results.run)
    with nothing_left_behind():
        built = build.build_model(config, META, copy.deepcopy(architecture))
        model = built.model.train()
        has_mask = not mask.is_on(model)
        optimizer = built.plan_optimizer(config.optim, resolve_optim(config, CPU), PlannedDevice(type="cpu"))
        mark_clipping(tracker, model)
        n_passes = passes_of(config.optim)  # over each batch
        with watch(tracker, model, optimizer), _CpuChoices(), tracker:
            for shapes in steps:
                tracker.begin_step()
                padded = has_mask and any(shape.padded for shape in shapes)
                tracker.stand_ins[aten._local_scalar_dense.default] = kernels.scalars(padded)
                tracker.stand_ins[aten.nonzero.default] = kernels.places(iter([s.supervised for s in shapes]))
                batches = [_batch(shape) for shape in shapes[::n_passes]]
                run_step(tracker, built, optimizer, batches, config.optim.clip)
                del batches
        tracker.stop()
    return tracker.events


def _batch(shape: BatchShape) -> dict[str, Any]:
    if shape.batch is not None:
        return {name: torch.empty_like(v) if torch.is_tensor(v) else v for name, v in shape.batch.items()}
    names = ("input_ids", "labels", "attention_mask")
    return {name: torch.zeros((shape.rows, shape.tokens), dtype=torch.int64, device=META) for name in names}


def _stand_ins() -> dict[Any, Any]:
    """Those of bitsandbytes' 4-bit products serve here too: a CPU dequantizes the weight likewise."""
    flash = aten._scaled_dot_product_flash_attention_backward.default
    shared = {func: stand_in for func, stand_in in kernels.stand_ins().items() if func is not flash}
    return {**shared, aten.native_dropout.default: kernels.cpu_dropout}


class _CpuChoices(TorchFunctionMode):
    """Takes on `meta` the attention that torch takes on a CPU: fused where it can be, one segment at a time."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention and _is_fused(kwargs):
            return _attention(*args, **kwargs)
        if func is sdpa.attend:
            with self:
                return sdpa.attend_on(None, *args, **kwargs)
        if func is varlen.attend_at_once:
            with self:
                return varlen.attend_one_by_one(*args, **kwargs)
        return func(*args, **kwargs)


def _is_fused(options: Mapping[str, Any]) -> bool:
    """Not with dropout, nor where the mask gets a gradient, which a checkpointed T5 asks for."""
    mask = options.get("attn_mask")
    return not options.get("dropout_p") and not (mask is not None and mask.requires_grad)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is not None:
        attn_mask = kernels.additive_mask(attn_mask, query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
