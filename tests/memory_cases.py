"""Real training steps on a CPU, recorded twice: by our tracker and by torch's profiler."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families import FAMILIES

from qlora_kit import build
from qlora_kit.config.settings import RunConfig
from qlora_kit.data import Collator, packed_mask_dtype
from qlora_kit.lean import flat, varlen
from qlora_kit.memory import kernels
from qlora_kit.memory.simulate import run_step
from qlora_kit.memory.track import Event, MemoryTracker, overall_peak
from qlora_kit.memory.watch import watch
from qlora_kit.optim.adamw import trains_split
from qlora_kit.optim.split_adamw import SplitAdamW

CPU = torch.device("cpu")
BATCH, TOKENS = 4, 96


def small_config(family: str, layers: int = 2, dropout: float = 0.0) -> Any:
    """A model whose activations outweigh the odd kilobyte: hidden size 128, 640 tokens of vocabulary."""
    config = FAMILIES[family]()
    config.vocab_size, config.num_hidden_layers = 640, layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    if family == "gpt2":
        config.n_embd = 128
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    else:
        config.hidden_size = 128
        if family == "opt":
            config.word_embed_proj_dim, config.ffn_dim, config.dropout = 128, 512, dropout
        elif family == "gpt_neox":
            config.intermediate_size, config.hidden_dropout = 512, dropout
        else:
            config.intermediate_size = 384
    return config


def settings(**changes: Any) -> RunConfig:
    """A run of random weights on a CPU."""
    flat = {"model": "gpt2", "weights": "random", "batch_size": BATCH, "seq_len": TOKENS, "r": 8, "bits": 32}
    config = RunConfig.from_flat({**flat, "optim": "adamw", "adapter_dtype": "fp32", **changes})
    return dataclasses.replace(config, lean=config.lean.resolved("cpu"))  # on `meta` too


def real_batch(config: RunConfig, vocab: int) -> dict[str, torch.Tensor]:
    """A batch without padding."""
    ids = torch.randint(0, vocab, (config.optim.batch_size, config.data.seq_len))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


ROWS = {  # the lengths of the examples in each row of a batch
    "plain": [[96]] * BATCH,
    "padded": [[96], [40], [72], [96]],
    "packed": [[40, 30, 26], [60, 30], [96], [20] * 4],
}


def collated_batch(kind: str, model: Any) -> dict[str, Any]:
    """A batch of `ROWS[kind]` as a run makes it, the first quarter of each row without a loss."""
    rows = [{"segment_lengths": lengths, **_tokens(sum(lengths))} for lengths in ROWS[kind]]
    if kind != "packed":
        return Collator(0)([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
    if varlen.is_on(model.config):
        return Collator(0, packed=True, max_tokens=TOKENS, varlen=True)(rows)
    return Collator(0, packed=True, max_tokens=TOKENS, mask_dtype=packed_mask_dtype(model.config, TOKENS))(rows)


def _tokens(length: int) -> dict[str, list[int]]:
    return {"input_ids": [7] * length, "labels": [-100] * (length // 4) + [7] * (length - length // 4)}


def cpu_optimizer(built: build.Built, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer that the Trainer would make on a CPU."""
    import bitsandbytes as bnb

    model, factors = built.model, built.factors
    groups = flat.parameter_groups(model, factors, config.optim.weight_decay, 1e-3, built.lora_plus)
    optim = config.optim.optim
    if optim == "adamw":
        adamw = SplitAdamW(groups, lr=1e-3) if trains_split(model) else torch.optim.AdamW(groups, lr=1e-3, fused=True)
        return flat.connect(adamw, factors)
    kind = bnb.optim.Lion if optim.startswith("lion") else bnb.optim.AdamW
    bits = 8 if "8bit" in optim else 32
    made = kind(groups, lr=1e-3, optim_bits=bits, is_paged=optim.startswith("paged"))
    return flat.connect(made, factors)


def cpu_autocast(recomputes: bool) -> Any:
    """bf16 on a CPU, where the backward pass brings its own context."""
    return torch.autocast("cpu", torch.bfloat16, enabled=not recomputes)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Peaks of two steps, in bytes, weights included."""

    tracked_bytes: int
    profiled_bytes: int
    events: list[Event]
    static_bytes: int

    @property
    def error(self) -> float:
        return self.tracked_bytes / self.profiled_bytes - 1


def record(config: RunConfig, architecture: Any, autocast: bool = False, block_bytes: int = 1) -> Recorded:
    """Two real steps under the profiler and the tracker at once."""
    torch.manual_seed(0)
    built = build.build_model(config, CPU, architecture)
    model = built.model.train()
    optimizer = cpu_optimizer(built, config)
    tracker = MemoryTracker("cpu", block_bytes, kernels.open_kernels())
    batches = [real_batch(config, architecture.vocab_size) for _ in range(config.optim.grad_accum)]
    with watch(tracker, model, optimizer):
        for batch in batches:
            for tensor in batch.values():
                tracker.label(tensor, "inputs")
        static_bytes = tracker.live_bytes
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with nothing_collected(), profile, tracker:
            for _ in range(2):
                tracker.begin_step()
                run_step(tracker, built, optimizer, batches, 1.0, cpu_autocast if autocast else None)
    tracker.stop()
    profiled_bytes = static_bytes + profiled_peak(profile)
    return Recorded(overall_peak(tracker.events).n_bytes, profiled_bytes, tracker.events, static_bytes)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Free what earlier tests left before, not meanwhile: the profiler would count it as freed in the step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def profiled_peak(profile: torch.profiler.profile) -> int:
    """The peak of the profiler's own record of every allocation and release, above where it began."""
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
