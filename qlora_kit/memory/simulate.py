"""Two steps of training on `meta`: everything the real step does to memory, and none of its arithmetic.

Two, because the optimizer's states are born in the first.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit import assembly
from qlora_kit.config import RunConfig
from qlora_kit.memory import kernels, rules
from qlora_kit.memory.autocast import MetaAutocast
from qlora_kit.memory.shortcut import MetaResults
from qlora_kit.memory.track import Event, MemoryTracker
from qlora_kit.memory.watch import watch
from qlora_kit.trainer import resolve_optim

if TYPE_CHECKING:
    from transformers import PretrainedConfig

META = torch.device("meta")
STEPS = 2

Autocast = Callable[[bool], AbstractContextManager[Any]]
Build = Callable[[RunConfig, torch.device, Any], Any]


@dataclass(frozen=True)
class Recipe:
    """What to simulate beside the run's settings.

    `optim` is the resolved optimizer; `autocast`: fp32 weights under bf16 autocast, as Trainer's `bf16=True` does;
    `capability` is that of the GPU.
    """

    seq_len: int
    optim: str
    autocast: bool = False
    capability: tuple[int, int] = rules.DEFAULT_CAPABILITY


@dataclass(frozen=True)
class Record:
    """What a simulation saw: every change of live bytes, states outside torch's allocator, and the model's size."""

    events: list[Event]
    paged_bytes: int
    n_parameters: int
    n_trainable: int
    attention: str


def simulate(
    config: RunConfig,
    recipe: Recipe,
    architecture: PretrainedConfig | None = None,
    *,
    first_step: bool = True,
    results: MetaResults | None = None,
    build: Build = assembly.build_model,
) -> Record:
    """Build the model of `config` on `meta`, train it for two steps, and return what that did to memory.

    Without `first_step` only the optimizer runs in the first one: the states are born, and its forward and backward
    pass, which need less than the second's, are left out. `results` is shared between simulations to save time.
    `build` makes the model: the trainer's own, unless a benchmark compares it with another.
    Leaves nothing behind in the process. Raises `UserError` for a model that cannot be found or built.
    """
    from qlora_kit.base import count_parameters

    results = results if results is not None else MetaResults()
    tracker = MemoryTracker("meta", stand_ins=kernels.stand_ins(), run=results.run)
    with nothing_left_behind():
        model = build(config, META, architecture)
        model.train()
        paged: list[torch.Tensor] = []
        optimizer = make_optimizer(model, config, recipe.optim, paged)
        count = count_parameters(model)
        with watch(tracker, model, optimizer), kernels.CudaChoices(recipe.capability), tracker:
            for step in range(STEPS):
                tracker.begin_step()
                if step == 0 and not first_step:
                    _bear_states(tracker, model, optimizer, config.optim.clip)
                    continue
                batches = [make_batch(config, recipe.seq_len, model.config) for _ in range(config.optim.grad_accum)]
                autocast = _meta_autocast if recipe.autocast else None
                run_step(tracker, model, optimizer, batches, config.optim.clip, autocast)
                del batches
        tracker.stop()
        attention = str(getattr(model.config, "_attn_implementation", ""))
    paged_bytes = sum(t.nbytes for t in paged)
    return Record(tracker.events, paged_bytes, count.total, count.trainable, attention)


def run_step(
    tracker: MemoryTracker,
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, torch.Tensor]],
    clip: float,
    autocast: Autocast | None = None,
) -> None:
    """One optimizer step over `batches`, all on the device already, in the order of transformers' Trainer.

    `autocast(recomputes)` gives the context of a forward pass, and of a backward pass, which may recompute one.
    """
    n_items = sum((batch["labels"] != -100).sum() for batch in batches)
    for batch in batches:
        loss = _forward(model, batch, n_items, autocast)
        with nullcontext() if autocast is None else autocast(True):
            kernels.backward(loss)
        del loss
    _optimize(tracker, model, optimizer, clip)


def _bear_states(tracker: MemoryTracker, model: Any, optimizer: torch.optim.Optimizer, clip: float) -> None:
    """The end of a step: gradients are there, and the optimizer runs."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            tracker.label(parameter.grad, "gradients")
    _optimize(tracker, model, optimizer, clip)


def _optimize(tracker: MemoryTracker, model: Any, optimizer: torch.optim.Optimizer, clip: float) -> None:
    tracker.enter("clip")
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    model.zero_grad(set_to_none=True)


def _forward(model: Any, batch: dict[str, torch.Tensor], n_items: Any, autocast: Autocast | None) -> torch.Tensor:
    """The loss of a batch; the logits die with this call, but for what autograd keeps."""
    if autocast is None:
        return model(**batch, num_items_in_batch=n_items).loss  # type: ignore[no-any-return]
    with autocast(False):
        outputs = model(**batch, num_items_in_batch=n_items)
    outputs["logits"] = outputs["logits"].float()  # accelerate gives a user fp32 outputs
    return outputs.loss  # type: ignore[no-any-return]


def _meta_autocast(recomputes: bool) -> MetaAutocast:
    return MetaAutocast(caches=not recomputes)


def make_batch(config: RunConfig, seq_len: int, model_config: Any) -> dict[str, torch.Tensor]:
    """A full batch on `meta`, with the shapes and dtypes of `data.Collator`'s."""
    from qlora_kit.data import packed_mask_dtype

    shape = (config.optim.batch_size, seq_len)
    batch = {name: torch.zeros(shape, dtype=torch.int64, device=META) for name in ("input_ids", "labels")}
    if not config.data.pack:
        return {**batch, "attention_mask": torch.zeros(shape, dtype=torch.int64, device=META)}
    mask_dtype = packed_mask_dtype(model_config, 0)
    mask = torch.zeros((shape[0], 1, seq_len, seq_len), dtype=mask_dtype, device=META)
    return {**batch, "position_ids": torch.zeros(shape, dtype=torch.int64, device=META), "attention_mask": mask}


def make_optimizer(model: Any, config: RunConfig, optim: str, paged: list[torch.Tensor]) -> torch.optim.Optimizer:
    """The optimizer `optim` as it works on CUDA; its paged states, which torch does not count, go to `paged`."""
    groups = _groups(model, config.optim.weight_decay)
    if optim == "adamw":
        return MetaFusedAdamW(groups, lr=config.optim.lr)
    if optim == "sgd":
        return torch.optim.SGD(groups, lr=config.optim.lr, foreach=True)  # torch's own choice on CUDA
    import bitsandbytes as bnb

    kind = bnb.optim.Lion if optim.startswith("lion") else bnb.optim.AdamW
    optimizer = kind(
        groups, lr=config.optim.lr, optim_bits=8 if "8bit" in optim else 32, is_paged=optim.startswith("paged")
    )
    _without_kernels(optimizer, paged, _fp32_state_parameters(model, optim))
    return optimizer  # type: ignore[no-any-return]


class MetaFusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW as it is to memory: states and no temporaries. torch itself refuses to fuse on `meta`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states of every parameter that has a gradient and none yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.grad is not None and not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)


def _groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay and vectors do not, each a group of its own, as in transformers' Trainer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = ({"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _fp32_state_parameters(model: Any, optim: str) -> set[int]:
    """The trained embeddings: transformers' Trainer keeps their states in fp32 under 8-bit optimizers."""
    if "8bit" not in optim:
        return set()
    embeddings = (m for m in model.modules() if isinstance(m, torch.nn.Embedding))
    return {id(m.weight) for m in embeddings if m.weight.requires_grad}


def _without_kernels(optimizer: Any, paged: list[torch.Tensor], fp32_states: set[int]) -> None:
    """Let a bitsandbytes optimizer make its states on `meta` and skip its kernels, which allocate nothing."""
    get_config = optimizer.get_config

    def config_of(self: Any, gindex: int, pindex: int, group: Any) -> Any:
        parameter = self.param_groups[gindex]["params"][pindex]
        return {**get_config(gindex, pindex, group), **({"optim_bits": 32} if id(parameter) in fp32_states else {})}

    def state_buffer(self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if self.is_paged and p.numel() >= rules.PAGED_MIN_ELEMENTS:
            with torch.utils._python_dispatch._disable_current_modes():
                paged.append(torch.empty(p.shape, dtype=dtype, device=META))
            return paged[-1]
        return torch.zeros_like(p, dtype=dtype)

    def update_step(self: Any, group: Any, p: torch.Tensor, gindex: int, pindex: int) -> None:
        p.data, p.grad = p.data.contiguous(), p.grad.contiguous()  # type: ignore[union-attr]

    optimizer.get_config = MethodType(config_of, optimizer)
    optimizer.get_state_buffer = MethodType(state_buffer, optimizer)
    optimizer.update_step = MethodType(update_step, optimizer)
    optimizer.prefetch_state = MethodType(lambda self, p: None, optimizer)


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Keep the caller's random state, and what bitsandbytes keeps for the whole process."""
    from bitsandbytes import functional
    from bitsandbytes.optim import GlobalOptimManager

    tables = dict(functional.name2qmap)
    manager = GlobalOptimManager.get_instance()
    overrides = dict(manager.pid2config)
    collects = gc.isenabled()
    gc.disable()  # a collection takes longer than the step; what dies, dies by its count of references
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            if collects:
                gc.enable()
            functional.name2qmap.clear()
            functional.name2qmap.update(tables)
            manager.pid2config = overrides


def resolve_cuda_optim(config: RunConfig) -> str:
    """The optimizer that `config` gets on CUDA."""
    return resolve_optim(config, torch.device("cuda"))
