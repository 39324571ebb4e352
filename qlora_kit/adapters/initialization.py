"""The initial values of the factors, from the weights of their layers or from the data.

    what is trained:  W + s·B·A;  pissa, olora:  W + s·(B·A − B₀·A₀), from B = B₀, A = A₀
    pissa       s·B₀·A₀ = U_r Σ_r V_rᵀ of W            olora      B₀ = Q_r, A₀ = Q_rᵀ W, where W = Q·R
    loftq       s·B·A ≈ W_original − W                 eva        A = main directions of the layer's inputs, B = 0
    orthogonal  B·A = 0, neither of them zero          lora-xs    B·A = (U_r Σ_r)·R·V_rᵀ, of which R trains, from 0

Shapes: K inputs, N outputs of a layer, r rank; W (N, K) is what the layer computes with, dequantized; B (N, r),
A (r, K); s the scaling.

PEFT has these methods too, but only for unquantized weights (its PiSSA, LoftQ and orthogonal start fail on 4 bits), and
its PiSSA and OLoRA change the base: the adapter then fits no published base. Here the base stays as it is on disk.
Where a method subtracts B₀·A₀ from the base, a frozen −B₀·A₀ is kept beside the factors instead (`parts.HalfFrozen`):
the function and the gradients of A and B are the same, and the adapter is plain LoRA of twice the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qlora_kit.config.settings import AdapterConfig
from qlora_kit.data.encode import IGNORED
from qlora_kit.errors import UserError, named
from qlora_kit.model.quantize import dense_weight
from qlora_kit.model.reading import reading_part

if TYPE_CHECKING:
    import torch
    from torch import nn

NAME = "default"  # what PEFT calls the adapter
EXACT_SIDE = 1024  # matrices with a smaller side up to this are decomposed exactly
OVERSAMPLES, POWER_ITERATIONS = 16, 8  # of the randomized decomposition of larger ones
SETTLED = 0.99  # cosine between an input direction before and after a batch: the value of EVA's authors

Factors = tuple["torch.Tensor", "torch.Tensor"]  # B (N, r) and A (r, K)


def start(model: nn.Module, config: AdapterConfig, originals: nn.Module | None = None) -> None:
    """Give the factors that PEFT has just put on `model` their parts and initial values.

    `originals` is the base before quantization, for LoftQ. On `meta` the parts have no values.
    Raises `UserError` for a rank larger than a layer, and for LoftQ on a base that is not quantized.
    """
    import torch

    if config.variant == "lora" and config.init in ("default", "gaussian"):
        return
    layers = lora_layers(model)
    _check_ranks(layers, config)
    if config.init == "eva":
        return  # `start_from_data` does it
    if config.init == "loftq" and originals is None and not next(model.parameters()).is_meta:
        rule = "corrects quantization errors, and this base is not quantized"
        remedy = f"Use {named('bits', 4)} or 8, or another {named('init')}."
        raise UserError.of("init", "loftq", rule, remedy)
    for name, layer in layers.items():
        original = None if originals is None else originals.get_submodule(name.removeprefix("base_model.model."))
        with torch.no_grad():
            _start_layer(layer, config, original)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _check_ranks(layers: Mapping[str, Any], config: AdapterConfig) -> None:
    own = 2 if config.doubles_rank else 1
    wide = [(name, min(layer.in_features, layer.out_features)) for name, layer in layers.items()]
    wide = [(name, side) for name, side in wide if layers[name].r[NAME] // own > side]
    if wide:
        name, side = min(wide, key=lambda one: one[1])
        method = named("variant", "lora-xs") if config.variant == "lora-xs" else named("init", config.init)
        layer = name.rpartition("base_model.model.")[2]
        rule = f"is too large for {method}: the smaller side of {layer} is {side}"
        rank = layers[name].r[NAME] // own
        raise UserError.of("r", rank, rule, f"Use {named('r', side)} or less, or other {named('targets')}.")


def _start_layer(layer: Any, config: AdapterConfig, original: Any) -> None:
    from qlora_kit.adapters.parts import CoreFactor, Frozen, HalfFrozen

    a_rK, b_Nr = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    if not a_rK.is_meta:
        b, a = _begin(layer, config, original)
        b, a = b.to(b_Nr.dtype).contiguous(), a.to(a_rK.dtype).contiguous()
    elif config.doubles_rank:
        b, a = b_Nr.chunk(2, 1)[0].clone(), a_rK.chunk(2, 0)[0].clone()
    else:
        b, a = b_Nr.data, a_rK.data
    if config.variant == "lora-xs":
        layer.lora_A[NAME], layer.lora_B[NAME] = Frozen(a), CoreFactor(b)
    elif config.doubles_rank:
        layer.lora_A[NAME] = HalfFrozen(a, a.clone(), 0)
        layer.lora_B[NAME] = HalfFrozen(b, -b, 1)
    else:
        layer.lora_A[NAME].weight.data, layer.lora_B[NAME].weight.data = a, b


def _begin(layer: Any, config: AdapterConfig, original: Any) -> Factors:
    """B and A in fp32, of the rank that was set."""
    weight_NK = dense_weight(layer.base_layer).float()
    r = layer.r[NAME] // (2 if config.doubles_rank else 1)
    scale = layer.scaling[NAME]
    if config.variant == "lora-xs":
        return lora_xs(weight_NK, r)
    if config.init == "loftq":
        if not type(layer.base_layer).__module__.startswith("bitsandbytes."):  # T5's `wo`: nothing to make up for
            return layer.lora_B[NAME].weight.data, layer.lora_A[NAME].weight.data
        return loftq(dense_weight(original).to(weight_NK.device).float(), weight_NK, r, scale)
    method: Callable[..., Factors] = {"orthogonal": orthogonal, "pissa": pissa, "olora": olora}[config.init]
    return method(weight_NK, r, scale)


def truncated_svd(weight_NK: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The r largest singular values (r) of a matrix, with their vectors as columns (N, r) and as rows (r, K).

    The same on every call, and the largest entry of each left vector positive. A matrix with a side up to `EXACT_SIDE`
    is decomposed whole; a larger one by randomized subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061,
    algorithm 4.4), which costs a few products with it.
    """
    import torch

    if min(weight_NK.shape) <= EXACT_SIDE:
        left, values, right = torch.linalg.svd(weight_NK, full_matrices=False)
        left_Nr, values_r, right_rK = left[:, :r], values[:r], right[:r]
    else:
        devices = [weight_NK.device] if weight_NK.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            sampled = min(r + OVERSAMPLES, *weight_NK.shape)
            left, values, right = torch.svd_lowrank(weight_NK, sampled, POWER_ITERATIONS)
        left_Nr, values_r, right_rK = left[:, :r], values[:r], right.T[:r]
    signs_r = left_Nr.gather(0, left_Nr.abs().argmax(0, keepdim=True)).sign().flatten()
    return left_Nr * signs_r, values_r, right_rK * signs_r[:, None]


def orthogonal(weight_NK: torch.Tensor, r: int, scale: float) -> Factors:
    """Both factors non-zero, and their product zero: their r columns and rows lie in two halves of one random basis.

    Source: https://datta0.github.io/posts/rethink-lora-init, as in PEFT. In bf16 the product is zero up to rounding.
    """
    import torch

    rows, columns = weight_NK.shape
    basis_rr = torch.linalg.qr(torch.randn(r, r))[0]
    a_rK = basis_rr[0::2].T @ torch.randn(r // 2, columns) / 10
    b_Nr = torch.randn(rows, r // 2) @ basis_rr[1::2] / 10
    return b_Nr.to(weight_NK.device), a_rK.to(weight_NK.device)


def pissa(weight_NK: torch.Tensor, r: int, scale: float) -> Factors:
    """The principal part of W: s·B·A is its best approximation of rank r (Meng et al., arXiv 2404.02948, eq. 2-3)."""
    left_Nr, values_r, right_rK = truncated_svd(weight_NK, r)
    roots_r = (values_r / scale).sqrt()
    return left_Nr * roots_r, roots_r[:, None] * right_rK


def olora(weight_NK: torch.Tensor, r: int, scale: float) -> Factors:
    """The first r columns of Q and rows of R, where W = Q·R (Büyükakyüz, arXiv 2406.01775, algorithm 1).

    Those columns come from the first r of W alone, and those rows are Qᵀ·W.
    """
    import torch

    q_Nr, upper_rr = torch.linalg.qr(weight_NK[:, :r])
    q_Nr = q_Nr * torch.where(upper_rr.diagonal() < 0, -1.0, 1.0)  # so that it does not depend on the library
    return q_Nr, q_Nr.T @ weight_NK


def loftq(original_NK: torch.Tensor, weight_NK: torch.Tensor, r: int, scale: float) -> Factors:
    """The best correction of rank r of what quantization did: s·B·A ≈ W_original − W.

    That is LoftQ (Li et al., arXiv 2310.08659, algorithm 1) of one step, which leaves the quantized base as it is;
    more steps would quantize it again.
    """
    return pissa(original_NK - weight_NK, r, scale)


def lora_xs(weight_NK: torch.Tensor, r: int) -> Factors:
    """The frozen factors of LoRA-XS (Bałazy et al., arXiv 2405.17604): U·Σ and Vᵀ of W, cut at rank r.

    Between them the core trains, from zero here; its authors draw it with a deviation of 1e-5.
    """
    left_Nr, values_r, right_rK = truncated_svd(weight_NK, r)
    return left_Nr * values_r, right_rK


def start_from_data(model: Any, batches: Iterable[Mapping[str, Any]]) -> None:
    """EVA (Paischer et al., arXiv 2410.07170): the rows of every A become the main directions of its layer's inputs.

    Of the supervised tokens; B stays zero, and every layer keeps the rank that was set. `batches`, on the model's
    device, are run until the directions have settled, or to their end. PEFT supplies the incremental SVD; its own loop
    repeats the data without end where a batch has fewer tokens than the rank.
    Raises `UserError` if there is too little data.
    """
    import torch

    layers = lora_layers(model)
    watch = _InputWatch(max(layer.r[NAME] for layer in layers.values()), bool(model.config.is_encoder_decoder))
    handles = [layer.register_forward_pre_hook(watch.hook(name)) for name, layer in layers.items()]
    if model.config.is_encoder_decoder:
        handles.append(reading_part(model).register_forward_hook(watch.encoded))
    try:
        with torch.no_grad():
            for batch in batches:
                watch.begin(batch)
                model(**batch)
                if watch.is_settled:
                    break
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for name, layer in layers.items():
            a_rK = layer.lora_A[NAME].weight
            a_rK.copy_(watch.directions_of(name)[: a_rK.shape[0]])


class _Directions:
    """The main directions of rows that arrive a few at a time."""

    def __init__(self, rank: int) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        self.rank = rank
        self.pca = IncrementalPCA(rank, lowrank=True, lowrank_seed=0)
        self.waiting: list[torch.Tensor] = []
        self.is_settled = False
        self.batch = 0  # the last one that was added

    def add(self, rows_MK: torch.Tensor) -> None:
        """Take `rows_MK` in, once there are twice as many as directions."""
        import torch

        self.waiting.append(rows_MK.float())
        if sum(len(rows) for rows in self.waiting) < 2 * self.rank:
            return
        before = getattr(self.pca, "components_", None)
        self.pca.lowrank = rows_MK.shape[1] > max(EXACT_SIDE, 2 * self.rank)
        self.pca.partial_fit(torch.cat(self.waiting))
        self.waiting = []
        if before is not None:
            alike = torch.nn.functional.cosine_similarity(self.pca.components_, before)
            self.is_settled = bool((alike >= SETTLED).all())


class _InputWatch:
    """Follows the inputs of layers by name; layers that get the same tensor are followed once.

    Only supervised tokens count, or all but padding if the labels are not tokens of the input; with an encoder and a
    decoder, padding is left out in the one, unsupervised tokens in the other.
    """

    def __init__(self, rank: int, has_encoder: bool) -> None:
        self.rank, self.has_encoder = rank, has_encoder
        self.found: dict[str, _Directions] = {}
        self.last: tuple[torch.Tensor, _Directions] | None = None
        self.batch = 0

    def begin(self, batch: Mapping[str, Any]) -> None:
        """What runs from now on is `batch`."""
        labels, mask = batch["labels"], batch.get("attention_mask")
        is_by_token = labels.dim() == 2 and not labels.is_floating_point()
        self.supervised = labels != IGNORED if is_by_token else None
        self.shown = None if mask is None else mask.bool()
        self.hidden = None
        self.batch += 1
        self.last = None

    def encoded(self, module: Any, args: Any, output: Any) -> None:
        """A hook for an encoder: what is not what it gave is of the target from now on."""
        self.hidden = output[0]

    def hook(self, name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        """A hook for the layer `name`."""

        def before(_: Any, args: tuple[Any, ...]) -> None:
            x = args[0]
            if name not in self.found:
                is_same = self.last is not None and self.last[0] is x
                self.found[name] = self.last[1] if is_same and self.last is not None else _Directions(self.rank)
            own = self.found[name]
            self.last = (x, own)
            if own.batch < self.batch and not own.is_settled:
                own.batch = self.batch
                own.add(self._rows(x))

        return before

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """The inputs that count, (M, K); all of them where `x` is a part of the batch."""
        of_source = self.has_encoder and (self.hidden is None or x is self.hidden)
        counts = self.shown if of_source or self.supervised is None else self.supervised
        if counts is not None and x.shape[:-1] == counts.shape:
            return x[counts]
        return x.reshape(-1, x.shape[-1])

    @property
    def is_settled(self) -> bool:
        """Whether one more batch would change little."""
        return all(own.is_settled for own in self.found.values())

    def directions_of(self, name: str) -> torch.Tensor:
        """The directions (rank, K) of the layer `name`, the main one first. Raises `UserError` for too little data."""
        own = self.found.get(name)
        if own is None or not hasattr(own.pca, "components_"):
            rule = f"needs at least {2 * self.rank} supervised tokens in the training data"
            remedy = f"Use another {named('init')}, a smaller {named('r')}, or more data."
            raise UserError.of("init", "eva", rule, remedy)
        components: torch.Tensor = own.pca.components_
        return components
