"""Makes `meta` allocate what CUDA would: the kernels that differ, and what bitsandbytes' kernels allocate inside.

Shapes: M tokens, K inputs, N outputs of a linear layer; B batch, H heads, T positions, D features of a head.
Sources: bitsandbytes `backends/cuda/ops.py`, torch `ATen/native/transformers/cuda`; rewritten here from what they
allocate, none of their code is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qlora_kit.lean import varlen
from qlora_kit.memory import rules
from qlora_kit.memory.track import MemoryTracker, StandIn
from qlora_kit.model import sdpa

aten = torch.ops.aten


def stand_ins() -> dict[Any, StandIn]:
    """What runs on `meta` in the place of an operator, so that it allocates what it would on CUDA."""
    import bitsandbytes  # noqa: F401  (it registers its operators)

    bnb = torch.ops.bitsandbytes
    table: dict[Any, StandIn] = {
        aten._local_scalar_dense.default: scalars(),
        aten.nonzero.default: places(itertools.repeat(None)),  # a plan has every token supervised
        aten.unique_consecutive.default: _all_equal,
        aten.index.Tensor: _ends_of_text,
        aten._index_put_impl_.default: _put_where_masked,
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten._flash_attention_backward.default: _flash_varlen_backward,
        bnb.dequantize_4bit.default: _as_workspace,
    }
    for name, stand_in in (
        ("gemm_4bit", _gemm_4bit),
        ("int8_vectorwise_quant", _int8_quantize),
        ("int8_mixed_scaled_mm", _int8_mixed_product),
        ("int8_scaled_mm", _int8_product),
    ):
        if hasattr(bnb, name):  # bitsandbytes 0.49 has no gemm_4bit
            table[getattr(bnb, name).default] = stand_in
    return table


def open_kernels() -> dict[Any, StandIn]:
    """For real tensors: look inside bitsandbytes' operators, whose kernels on a CPU are Python over torch's."""
    import bitsandbytes  # noqa: F401

    names = (
        "gemm_4bit dequantize_4bit dequantize_blockwise quantize_blockwise quantize_4bit int8_vectorwise_quant "
        "int8_mixed_scaled_mm int8_scaled_mm int8_linear_matmul int8_mm_dequant optimizer_update_32bit "
        "optimizer_update_8bit_blockwise"
    )
    bnb = torch.ops.bitsandbytes
    opened: dict[Any, StandIn] = {getattr(bnb, name).default: _opened for name in names.split() if hasattr(bnb, name)}
    return {**opened, aten.native_dropout.default: cpu_dropout}


def _opened(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    backend = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with tracker:
        return func.redispatch(backend, *args, **kwargs)


def cpu_dropout(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fused dropout on a CPU multiplies by a copy of the mask in the input's dtype; on CUDA it has none."""
    result = func(*args, **kwargs)
    with tracker:
        tracker.see(result, str(func))
        tracker.label(torch.empty_like(args[0]), "workspaces")
    return result


def scalars(padded: bool = False) -> StandIn:
    """What `.item()` gives on `meta`: 1 for a number; whether masks are without padding and rows without packing."""

    def scalar(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args[0].device.type != "meta":
            return func(*args, **kwargs)
        if args[0].dtype == torch.bool:
            return not padded
        return 1.0 if args[0].is_floating_point() else 1

    return scalar


def places(counts: Iterator[int | None]) -> StandIn:
    """Where a mask is true: on `meta` in as many places as the next of `counts` says; for None everywhere."""

    def nonzero(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args[0].device.type != "meta":
            return func(*args, **kwargs)
        count = next(counts)
        with tracker:
            n_places = args[0].numel() if count is None else count
            return torch.empty((n_places, args[0].dim()), dtype=torch.int64, device="meta")

    return nonzero


def _all_equal(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Different values in a row: on `meta` one (T5 and BART check that each row has as many ends of text)."""
    if args[0].device.type != "meta":
        return func(*args, **kwargs)
    with tracker:
        return args[0].new_empty((1,)), args[0].new_empty((0,)), args[0].new_empty((0,))


def _ends_of_text(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The positions that a mask (B, T) selects: on `meta` one in each row, as T5's and BART's heads read."""
    values, indices = args
    mask = indices[0]
    if values.device.type != "meta" or mask is None or mask.dtype != torch.bool:
        return tracker.run(func, args, kwargs)
    with tracker:
        return values.new_empty((mask.shape[0], *values.shape[mask.dim() :]))


def _put_where_masked(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The way back: what is put changes no layout."""
    if args[0].device.type == "meta" and any(i is not None and i.dtype == torch.bool for i in args[1]):
        return args[0]
    return tracker.run(func, args, kwargs)


def _as_workspace(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with tracker:
        result = _dequantized(*args, **kwargs)
        tracker.label(result, "workspaces")
    return result


def _dequantized(
    packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: Any, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=packed.device)


def _gemm_4bit(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """`x @ W.T` from 4 bits: above a few tokens the kernel dequantizes W and calls the ordinary product."""
    x_MK, packed, shape_NK = args[:3]
    absmax_8bit = kwargs.get("absmax_8bit")
    with tracker:
        if x_MK.numel() // x_MK.shape[-1] <= rules.FUSED_4BIT_TOKENS:
            return torch.empty((*x_MK.shape[:-1], shape_NK[0]), dtype=x_MK.dtype, device=x_MK.device)
        buffers = [torch.empty(tuple(shape_NK), dtype=x_MK.dtype, device=packed.device)]
        if absmax_8bit is not None:  # dequantized first, and once more with their offset
            buffers += [torch.empty(absmax_8bit.shape, dtype=torch.float32, device=packed.device) for _ in range(2)]
        for buffer in buffers:
            tracker.label(buffer, "workspaces")
        return torch.nn.functional.linear(x_MK, buffers[0], kwargs.get("bias"))


def _int8_quantize(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows to int8 with their scales; with a threshold it looks for outlier columns, of which a plan expects none."""
    x_MK = args[0]
    threshold = args[1] if len(args) > 1 else kwargs.get("threshold", 0.0)
    with tracker:
        rows_M = torch.empty(x_MK.numel() // x_MK.shape[-1], dtype=torch.float32, device=x_MK.device)
        quantized_MK = torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device)
        if threshold <= 0.0:
            return quantized_MK, rows_M, None
        outliers_MK = x_MK.abs() >= threshold
        tracker.label(outliers_MK, "workspaces")
        return quantized_MK, rows_M, torch.empty(0, dtype=torch.int64, device=x_MK.device)


def _int8_product(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The product in int32, then fp16 (the only dtype that the kernel gives), then the dtype asked for."""
    x_MK, weight_NK = args[:2]
    dtype = (args[5] if len(args) > 5 else kwargs.get("dtype")) or torch.float16  # the dispatcher puts it in its place
    shape = (*x_MK.shape[:-1], weight_NK.shape[0])
    with tracker:
        sums_MN = torch.empty(shape, dtype=torch.int32, device=x_MK.device)
        result_MN = torch.empty_like(sums_MN, dtype=torch.float16)
        tracker.label(sums_MN, "workspaces")
        return result_MN.to(dtype)


def _int8_mixed_product(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x_MK, x_int8_MK, weight_NK, rows_M, columns_N = args[:5]
    with tracker:
        outliers = torch.empty(0, device=x_MK.device, dtype=x_MK.dtype)
        product = torch.ops.bitsandbytes.int8_scaled_mm.default
        return product(x_int8_MK, weight_NK, rows_M, columns_N, dtype=x_MK.dtype), outliers


def _flash_backward(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Flash attention's backward pass, with the buffers that its kernel takes for the time it runs."""
    query_BHTD, key_BHTD = args[1], args[2]
    n_bytes = rules.flash_backward_bytes(tuple(query_BHTD.shape), tuple(key_BHTD.shape), query_BHTD.element_size())
    return _with_buffers(tracker, n_bytes, func, args, kwargs)


def _flash_varlen_backward(tracker: MemoryTracker, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same where packed rows are attended example by example, by the kernel for variable lengths."""
    query_NHD, key_NHD, starts = args[1], args[2], args[6]
    shapes = tuple(query_NHD.shape), tuple(key_NHD.shape)
    n_bytes = rules.flash_varlen_backward_bytes(*shapes, starts.shape[0] - 1, query_NHD.element_size())
    return _with_buffers(tracker, n_bytes, func, args, kwargs)


def _with_buffers(
    tracker: MemoryTracker, n_bytes: tuple[int, ...], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with tracker:
        buffers = [torch.empty(n, dtype=torch.uint8, device="meta") for n in n_bytes]
        for buffer in buffers:
            tracker.label(buffer, "workspaces")
    result = func(*args, **kwargs)
    with tracker:
        tracker.see(result, str(func))
    del buffers
    return result


class CudaChoices(TorchFunctionMode):
    """Takes on `meta` the ways that torch takes on a GPU of `capability`: fused attention and fused dropout."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.capability = capability

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Send the functions that choose by device to what CUDA chooses."""
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(self.capability, *args, **kwargs)
        if func is sdpa.attend:
            with self:
                return sdpa.attend_on(self.capability, *args, **kwargs)
        if func is varlen.attend_at_once and self.capability < sdpa.FLASH_CAPABILITY:
            with self:  # each segment by the attention that this GPU has
                return varlen.attend_one_by_one(*args, **kwargs)
        return func(*args, **kwargs)


def backward(loss: torch.Tensor) -> None:
    """`loss.backward()`, but what it recomputes finds the function modes on; torch's own turns them off meanwhile."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """On CUDA dropout is fused: the result and a mask of one byte an element."""
    if not training or not 0 < p < 1 or input.device.type != "meta":
        return torch.dropout(input, p, training)
    return torch.native_dropout(input, p, True)[0]


def _attention(
    capability: tuple[int, int],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """By the kernel that CUDA would take; (B, H, T, D) each."""
    flash, efficient = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention
    call = sdpa.call_of(query, key, value, masked=attn_mask is not None, causal=is_causal, dropout=dropout_p)
    kernel = sdpa.kernel_of(call, capability)
    if kernel == sdpa.MATH:  # which torch takes on `meta`, with all its scores
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if kernel == sdpa.FLASH:
        width = query.shape[-1]
        query, key, value = (_padded(t, 8) for t in (query, key, value))
        scale = scale if scale is not None else width**-0.5
        out: torch.Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width]
    if call.grouped:  # as if the kernel repeated them; ours come here repeated
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = _bias(attn_mask, query, key)
    out = efficient(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
    return out


def _padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The mask as one to add, of the shape of the scores."""
    if mask is None:
        return None
    return additive_mask(mask, query.dtype).expand(*query.shape[:-1], key.shape[-2])


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask of true and false becomes one to add, in `dtype`, as torch's attention makes it; any other stays."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
