"""Memory that no tracker sees, a small rule for each: kernels' buffers, libraries' workspaces, allocator and driver.

    needed on the device = peak + context + max(20 MiB, 3 % of the peak)
    in the peak          = tensors + 2 · cuBLAS workspace + the buffers of the kernel that runs

Every rule states its basis: "source" (read in the code of the library named), "measured" (by us, on which device),
or "estimate". All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_kit.errors import UserError

MIB = 1 << 20

FUSED_4BIT_TOKENS = 4
"""Up to this many tokens bitsandbytes' `gemm_4bit` never dequantizes the weight. Source: bitsandbytes 0.50
`backends/cuda/ops.py`; between 5 and 1536 tokens it depends on device and shape, and the plan assumes that it does,
which is the larger of the two."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as the rules see it: memory in bytes, compute capability."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Bytes besides those that torch counts as allocated.

    `on_device`: they must fit into the GPU's memory too. `moves`: between the GPU's and the host's.
    """

    name: str
    n_bytes: int
    on_device: bool
    basis: str
    moves: bool = False


_GIB = 1 << 30
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("rtx3060", 12 * _GIB, (8, 6)),
        Gpu("rtx3080", 10 * _GIB, (8, 6)),
        Gpu("rtx3090", 24 * _GIB, (8, 6)),
        Gpu("rtx4060ti", 16 * _GIB, (8, 9)),
        Gpu("rtx4070", 12 * _GIB, (8, 9)),
        Gpu("rtx4080", 16 * _GIB, (8, 9)),
        Gpu("rtx4090", 24 * _GIB, (8, 9)),
        Gpu("rtx5090", 32 * _GIB, (12, 0)),
        Gpu("t4", 15 * _GIB, (7, 5)),  # 16 GB, of which a driver with ECC leaves 15 GiB
        Gpu("v100", 16 * _GIB, (7, 0)),
        Gpu("a10", 23 * _GIB, (8, 6)),
        Gpu("l4", 23 * _GIB, (8, 9)),
        Gpu("a100", 40 * _GIB, (8, 0)),
        Gpu("a100-80", 80 * _GIB, (8, 0)),
        Gpu("h100", 80 * _GIB, (9, 0)),
        Gpu("h200", 141 * _GIB, (9, 0)),
    )
}
"""Nominal sizes; of a device at hand the true size is used."""

DEFAULT_CAPABILITY = (8, 0)
BF16_CAPABILITY = (8, 0)


def has_bf16(capability: tuple[int, int]) -> bool:
    """Whether a GPU computes in bf16; where it does not, runs are in fp16. Source: `torch.cuda.is_bf16_supported`."""
    return capability >= BF16_CAPABILITY


def find_gpu(name: str) -> Gpu:
    """The GPU called `name` (in any case, blanks and dashes ignored). Raises `UserError` with the known names."""
    wanted = name.lower().replace(" ", "").replace("-", "")
    for gpu in GPUS.values():
        if gpu.name.replace("-", "") == wanted:
            return gpu
    raise UserError.of("gpu", name, "is not a known GPU", f"Known: {', '.join(GPUS)}.")


def flash_backward_bytes(query_BHTD: tuple[int, ...], key_BHTD: tuple[int, ...], element_bytes: int) -> tuple[int, ...]:
    """The buffers of flash attention's backward pass, from the shapes of queries and keys.

    The gradient of the queries is summed in fp32, (B, H, T rounded up to 128, D rounded up to 32, or 256 above 192),
    beside one fp32 a row; with fewer keys than queries (grouped), gradients of keys and values are first made for
    every query's head, (B, T, H, D) in the dtype of the keys. Source: torch 2.11 to 2.13,
    `ATen/native/transformers/cuda/flash_attn/flash_api.cpp`, `mha_bwd` (of FlashAttention 2.7).
    """
    batch, heads, queries, width = query_BHTD
    rows = batch * (-(-queries // 128) * 128)
    return _flash_buffers(rows, batch * key_BHTD[2], heads, key_BHTD[1], width, element_bytes)


def flash_varlen_backward_bytes(
    query_NHD: tuple[int, ...], key_NHD: tuple[int, ...], segments: int, element_bytes: int
) -> tuple[int, ...]:
    """The same of the kernel for variable lengths, which takes 128 rows more for each segment.

    Source: the same file, `mha_varlen_bwd`.
    """
    tokens, heads, width = query_NHD
    return _flash_buffers(tokens + 128 * segments, key_NHD[0], heads, key_NHD[1], width, element_bytes)


def _flash_buffers(
    rows: int, key_rows: int, heads: int, key_heads: int, width: int, element_bytes: int
) -> tuple[int, ...]:
    wide = -(-width // 32) * 32 if width <= 192 else 256
    sums = 4 * rows * heads * wide
    per_row = 4 * rows * heads
    if key_heads == heads:
        return sums, per_row
    expanded = element_bytes * key_rows * heads * width
    return sums, per_row, expanded, expanded


CUBLAS_32_MIB_MAJORS = (9, 10, 12)


def cublas_workspace_bytes(capability: tuple[int, int]) -> int:
    """The workspace of cuBLAS, allocated through torch at the first product and kept: 8.125 MiB, 32 from Hopper on.

    One for each pair of handle and stream: one for the training thread, one more for the autograd thread, which
    has a handle of its own. If a GPU of `capability` is present, the size that torch reports (from 2.13) is used.
    Source: torch `ATen/cuda/CublasHandlePool.cpp`, default `CUBLAS_WORKSPACE_CONFIG` (:4096:2:16:8 is 8.125 MiB,
    :4096:8 is 32 MiB); older torch has 32 MiB on Hopper only, and a plan for Blackwell then has 48 MiB too much.
    """
    reported = _workspace_of_present_gpu(capability)
    if reported is not None:
        return reported
    return 32 * MIB if capability[0] in CUBLAS_32_MIB_MAJORS else 8 * MIB + 128 * 1024


def _workspace_of_present_gpu(capability: tuple[int, int]) -> int | None:
    import torch

    ask = getattr(torch.backends.cuda, "cublas_workspace_size", None)
    if ask is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() != capability:
        return None
    return int(ask())


def extras(peak_bytes: int, paged_bytes: int, host_bytes: int, capability: tuple[int, int]) -> tuple[Extra, ...]:
    """The bytes besides the allocated ones, each with its basis."""
    pool = "source: our own pool allots them, in whole MiB for each checkpoint; they never leave the host"
    managed = "source: bitsandbytes keeps them in managed memory, which moves to the host when the GPU is full"
    return (
        Extra(
            name="CUDA context",
            n_bytes=context_bytes(capability),
            on_device=True,
            basis="estimate by compute capability",
        ),
        Extra(
            name="fragmentation",
            n_bytes=fragmentation_bytes(peak_bytes),
            on_device=True,
            basis="estimate: 3 %, at least 20 MiB",
        ),
        Extra(name="paged optimizer states", n_bytes=paged_bytes, on_device=False, basis=managed, moves=True),
        Extra(name="checkpoints on the host (pinned)", n_bytes=host_bytes, on_device=False, basis=pool),
    )


def peak_within(device_bytes: int, capability: tuple[int, int]) -> int:
    """The largest peak that leaves room, in `device_bytes` of a GPU, for the context and for fragmentation."""
    room_bytes = device_bytes - context_bytes(capability)
    return max(0, min(room_bytes - 20 * MIB, room_bytes * 100 // 103))


def context_bytes(capability: tuple[int, int]) -> int:
    """The CUDA context with the kernels loaded: outside torch's counters, but not free memory either. Estimate."""
    return {7: 350, 8: 450, 9: 550}.get(capability[0], 600) * MIB


def fragmentation_bytes(peak_bytes: int) -> int:
    """Memory reserved by torch's allocator beyond what is allocated at the peak. Estimate: 3 %, at least 20 MiB."""
    return max(20 * MIB, peak_bytes * 3 // 100)
