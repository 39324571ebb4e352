"""The LoRA-first layers against PEFT's own and a naive oracle.

Tolerances are computed: what the stock step errs against the oracle in the same dtype, or a bound of the rounding.
"""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import weakref
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from families import FAMILIES, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NaiveLora, naive_lora_model
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from qlora_kit.adapters.files import load_adapter, save_adapter
from qlora_kit.adapters.inject import inject, trainable
from qlora_kit.config.settings import AdapterConfig, BaseConfig, RunConfig
from qlora_kit.lean import apply
from qlora_kit.lean.linear import put_on
from qlora_kit.memory.kernels import open_kernels
from qlora_kit.memory.simulate import Simulation, simulate
from qlora_kit.memory.track import MemoryTracker
from qlora_kit.model.load import load_base

CPU = torch.device("cpu")
KINDS = ("nf4", "nf4 nested", "fp4", "linear", "conv1d", "int8")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def base_layer(kind: str, n_in: int, n_out: int, bias: bool, dtype: torch.dtype, device: str) -> nn.Module:
    """Quantized on its `device`, as loading does: moved with its parent, an 8-bit layer leaves its scales behind."""
    weight_NK = (torch.randn(n_out, n_in) * n_in**-0.5).to(dtype)
    if kind in ("linear", "conv1d"):
        layer: Any = nn.Linear(n_in, n_out, bias=bias) if kind == "linear" else Conv1D(n_out, n_in)
        layer.weight = nn.Parameter((weight_NK if kind == "linear" else weight_NK.T.contiguous()).to(device))
    elif kind == "int8":
        layer = bnb.nn.Linear8bitLt(n_in, n_out, bias=bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight_NK, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        name, nested = kind.split()[0], kind.endswith("nested")
        layer = bnb.nn.Linear4bit(n_in, n_out, bias=bias, compute_dtype=dtype)
        options = {"quant_type": name, "compress_statistics": nested, "requires_grad": False}
        layer.weight = bnb.nn.Params4bit(weight_NK, **options).to(device)
        layer.support_avx512bf16_for_cpu = False
    if bias or kind == "conv1d":
        layer.bias = nn.Parameter(torch.randn(n_out).to(device, dtype))
    return layer.requires_grad_(False)


def lora_model(
    kinds: str | list[str],
    sizes: tuple[int, ...] = (64, 128),
    dtype: torch.dtype = BF16,
    factors: torch.dtype | None = None,
    bias: bool = True,
    device: str = "cpu",
    **config: Any,
) -> nn.Module:
    """A chain of LoRA layers `0`, `1`, …, with random factors, as PEFT injects them."""
    kinds = [kinds] * (len(sizes) - 1) if isinstance(kinds, str) else kinds
    chain = zip(kinds, sizes[:-1], sizes[1:], strict=True)
    model: Any = nn.Sequential(*(base_layer(kind, n_in, n_out, bias, dtype, device) for kind, n_in, n_out in chain))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = "4" in kinds[0], kinds[0] == "int8"
    names = [str(i) for i in range(len(kinds))]
    options = {"r": 4, "lora_alpha": 6, "target_modules": names, "fan_in_fan_out": "conv1d" in kinds, **config}
    model = inject_adapter_in_model(LoraConfig(**options), model)
    randomize_factors(model, factors or dtype)
    return model.train()


def randomize_factors(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = (torch.randn_like(parameter) * 0.1).to(dtype or parameter.dtype)


def lean(model: Any) -> Any:
    outcome = put_on(model)
    assert outcome.left == ""
    return model


def both(*args: Any, **options: Any) -> tuple[Any, Any]:
    """The same layers twice: PEFT's, and lean."""
    torch.manual_seed(0)
    stock = lora_model(*args, **options)
    return stock, lean(copy.deepcopy(stock))


def output_and_gradients(
    model: nn.Module, x: torch.Tensor, grad_y: torch.Tensor, checkpoints: bool = False
) -> list[torch.Tensor]:
    """The output, the gradient of `x`, and those of the factors."""
    x = x.detach().requires_grad_()
    y = checkpoint(model, x, use_reentrant=False) if checkpoints else model(x)
    factors = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *factors], grad_y)]


def relative_error(values: list[torch.Tensor], oracles: list[torch.Tensor]) -> float:
    """The error of all together, by norm."""
    pairs = list(zip(values, oracles, strict=True))
    squares = sum(float((v.double() - o.double()).square().sum()) for v, o in pairs)
    return (squares / sum(float(o.double().square().sum()) for o in oracles)) ** 0.5


class Products(TorchDispatchMode):
    """Records the operators that take one of `weights` (frozen, as they lie in memory)."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.storages = {w.untyped_storage()._cdata for w in weights}
        self.products: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(func) or "dequantize_4bit" in str(func):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if any(t.untyped_storage()._cdata in self.storages for t in tensors):
                self.products.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_collector():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a tiny model of each family, written when first asked for."""
    return functools.cache(lambda family: save_tiny(tmp_path_factory.mktemp(family), family))


def model_and_oracle(folder, bits, adapter_dtype="bf16"):
    torch.manual_seed(0)
    base = load_base(BaseConfig(model=str(folder), bits=bits), CPU)
    model = inject(base, AdapterConfig(r=4, adapter_dtype=adapter_dtype)).train()
    randomize_factors(model)
    return model, naive_lora_model(model, *((FP32, FP64) if bits == 32 else (BF16, FP32)))


def step(model, ids_BT):
    """The loss, the logits and every gradient of the adapter."""
    model.zero_grad()
    out = model(input_ids=ids_BT, labels=ids_BT)
    out.loss.backward()
    return out.loss.item(), [out.logits.detach()], [p.grad for _, p in trainable(model)]


def steps_of_each(folder, bits, adapter_dtype="bf16", batches=1):
    """What the oracle, PEFT's step and ours give on the same batches."""
    model, oracle = model_and_oracle(folder, bits, adapter_dtype)
    ids = [torch.randint(0, 256, (2, 24)) for _ in range(batches)]
    expected, stock = [step(oracle, i) for i in ids], [step(model, i) for i in ids]
    lean(model)
    return expected, stock, [step(model, i) for i in ids]


def check_losses(expected, stock, ours):
    """The loss moves by at most twice what a logit does; PEFT's logits say how far they may move."""
    for (true_loss, [true_logits], _), (_, [stock_logits], _), (loss, _, _) in zip(expected, stock, ours, strict=True):
        assert abs(loss - true_loss) <= 2 * (stock_logits - true_logits).abs().amax(-1).mean() + 1e-6


def check_that_it_errs_less(folder, bits, adapter_dtype="bf16"):
    """Our median error over 3 batches is below PEFT's largest (a token near zero may have a large one)."""
    expected, stock, ours = steps_of_each(folder, bits, adapter_dtype, batches=3)
    check_losses(expected, stock, ours)
    for part in (1, 2):  # logits, gradients
        errors = [[relative_error(s[part], e[part]) for s, e in zip(g, expected, strict=True)] for g in (stock, ours)]
        assert statistics.median(errors[1]) <= max(errors[0])


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_bf16_errs_less_than_pefts(folders, family, bits):
    check_that_it_errs_less(folders(family), bits)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_fp32_factors_cast_to_bf16_lose_nothing_in_a_step(folders, family, bits):
    check_that_it_errs_less(folders(family), bits, adapter_dtype="fp32")


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_int8_or_fp32_errs_as_pefts(folders, family, bits):
    """As many roundings as PEFT's: below the error of its worst gradient."""
    expected, stock, ours = steps_of_each(folders(family), bits, adapter_dtype="bf16" if bits == 8 else "fp32")
    check_losses(expected, stock, ours)
    worst = max(relative_error([s], [e]) for s, e in zip(stock[0][2], expected[0][2], strict=True))
    assert relative_error(ours[0][2], expected[0][2]) <= worst


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_adapter_saves_and_loads_as_ever(folders, tmp_path, family):
    model, _ = model_and_oracle(folders(family), 4)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    after = lean(model).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    save_adapter(model, tmp_path)
    fresh = lean(load_adapter(load_base(BaseConfig(model=str(folders(family)), bits=4), CPU), tmp_path))
    ids = torch.randint(0, 256, (2, 24))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, fresh.eval()(input_ids=ids).logits)


# --- one layer ------------------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(KINDS),
    n_in=st.sampled_from([2, 16, 66]),
    n_out=st.sampled_from([2, 32, 70]),
    lead=st.sampled_from([(), (1,), (7,), (2, 3), (2, 1, 3), (0, 4)]),
    r=st.integers(1, 9),
    alpha=st.sampled_from([0.5, 6.0, 16.0]),
    rslora=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_one_layer_in_fp32_agrees_to_its_rounding(kind, n_in, n_out, lead, r, alpha, rslora, bias, seed):
    torch.manual_seed(seed)
    options = {"r": r, "lora_alpha": alpha, "use_rslora": rslora}
    layer = lora_model(kind, (n_in, n_out), FP32, bias=bias, **options)[0]
    oracle = NaiveLora(layer, FP32).double()
    x, grad_y = torch.randn(*lead, n_in), torch.randn(*lead, n_out)
    lean(nn.ModuleList([layer]))
    values = output_and_gradients(layer, x, grad_y)
    expected = output_and_gradients(oracle, x.double(), grad_y.double())
    for tensor in (*oracle.buffers(), *oracle.parameters()):
        tensor.data.abs_()  # then it adds up the magnitudes of all terms
    magnitudes = output_and_gradients(oracle, x.double().abs(), grad_y.double().abs())
    # a term is rounded when it is made and whenever another is added
    roundings = n_in + n_out + r + x[..., 0].numel() + 4
    for value, true, magnitude in zip(values, expected, magnitudes, strict=True):
        assert value.shape == true.shape
        assert ((value - true).abs() <= roundings * torch.finfo(FP32).eps * magnitude).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_x_h_and_the_factors(kind):
    model = lean(lora_model(kind, (64, 128), r=4))
    x = torch.randn(2, 8, 64, dtype=BF16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    assert sorted(t.nbytes for t in saved) == sorted(2 * n for n in (16 * 64, 16 * 4, 4 * 64, 128 * 4))


def test_dropout_saves_a_mask_of_one_byte_an_element_beside():
    model = lean(lora_model("nf4", (64, 128), r=4, lora_dropout=0.5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.randn(2, 8, 64, dtype=BF16, requires_grad=True))
    assert sum(t.nbytes for t in saved) == 2 * (16 * 64 + 16 * 4 + 4 * 64 + 128 * 4) + 16 * 64


@pytest.mark.parametrize("kind", ["nf4 nested", "linear", "conv1d"])
def test_a_checkpoint_does_not_recompute_the_last_base_product(kind):
    """Two layers: PEFT recomputes both base products for two gradients; ours recomputes one."""
    products = []
    for model in both(kind, (64, 128, 64)):
        model.insert(1, nn.GELU())
        x = torch.randn(3, 64, dtype=BF16, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=False)
        with Products([p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]) as seen:
            y.sum().backward()
        products.append(len(seen.products))
    assert products == [4, 3]


@pytest.mark.parametrize("offered", [True, False])
def test_an_input_without_gradient_costs_no_product(offered):
    _, model = both("nf4 nested")
    x = torch.randn(3, 64, dtype=BF16, requires_grad=offered)
    y = model(x)
    with Products([model[0].base_layer.weight]) as seen:
        y.sum().backward()
    assert len(seen.products) == int(offered)
    assert (x.grad is not None) == offered
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_without_gradients_the_product_is_bitsandbytes_own():
    """On CUDA that never dequantizes the weight for a few tokens, as in generation."""
    _, model = both("nf4 nested")
    x, base = torch.randn(1, 1, 64, dtype=BF16), model[0].base_layer
    with torch.no_grad(), Products([base.weight]) as seen:
        base(x)
        model(x)
    assert seen.products[:1] == seen.products[1:]


def test_a_backward_pass_makes_the_weight_once_and_one_buffer_of_the_size_of_x():
    torch.manual_seed(0)
    model = lean(lora_model("nf4", (512, 256), r=4))
    x = torch.randn(1024, 512, dtype=BF16, requires_grad=True)
    y, grad_y = model(x), torch.randn(1024, 256, dtype=BF16)
    with MemoryTracker("cpu", block_bytes=1, stand_ins=open_kernels()) as tracker:
        y.backward(grad_y)
    made = [e for e in tracker.events if "view" not in e.storage.operation]  # those are x and the gradient of y
    assert [e.change_bytes for e in made if e.change_bytes > 100_000] == [2 * 512 * 256, x.nbytes]


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_inside_a_checkpoint_dies_with_its_forward_pass(kind):
    """The 8-bit product of bitsandbytes keeps it, where a checkpoint cannot drop it."""
    alive = []
    for model in both(kind):
        inner: list[Any] = []

        def block(x, model=model, inner=inner):
            inner.append(weakref.ref(hidden := x * 2))
            return model(hidden)

        with no_collector():
            y = checkpoint(block, torch.randn(3, 64, dtype=BF16, requires_grad=True), use_reentrant=False)
            alive.append(inner[0]() is not None)
            y.sum().backward()
    assert alive == [kind == "int8", False]


def test_the_recomputed_input_is_gone_when_its_gradient_is_made():
    torch.manual_seed(0)
    model = lean(lora_model("nf4", (512, 256), r=4))
    x = torch.randn(1024, 512, dtype=BF16, requires_grad=True)
    y = checkpoint(lambda x: model(x * 2), x, use_reentrant=False)
    with MemoryTracker("cpu", block_bytes=1, stand_ins=open_kernels()) as tracker:
        y.sum().backward()
    like_x = [e for e in tracker.events if abs(e.change_bytes) == x.nbytes]
    assert [(e.storage.operation, e.change_bytes > 0) for e in like_x[:3]] == [
        ("aten.mul.Tensor", True),
        ("aten.mul.Tensor", False),
        ("aten.mm.default", True),
    ]


def test_graph_and_layers_die_without_the_collector():
    with no_collector():
        model = lean(lora_model("nf4"))
        y = model(torch.randn(3, 64, dtype=BF16))
        layer, graph = weakref.ref(model[0]), weakref.ref(y)
        del model, y
        assert layer() is None
        assert graph() is None


# --- however it is used ---------------------------------------------------------------------------------------------


def close_to_stock(use, kind="nf4", device="cpu", **options):
    """`use(model, x)` gives a list of tensors: in fp32 ours are PEFT's, up to the rounding of its own sums."""
    stock, model = both(kind, (64, 128, 64), FP32, device=device, **options)
    x = torch.randn(2, 5, 64, device=device)
    values, expected = use(model, x.clone()), use(stock, x.clone())
    for value, true in zip(values, expected, strict=True):
        assert value.shape == true.shape
        assert value.dtype == true.dtype
        torch.testing.assert_close(value, true, rtol=1e-4, atol=1e-4 * float(true.abs().max()))


def grads(model, *tensors):
    return [t.grad for t in tensors] + [p.grad for p in model.parameters() if p.requires_grad]


def shared_input(model, x):
    """Two layers and a residual read the same x."""
    x.requires_grad_()
    hidden = x * 1.0
    (model[0](hidden).sum() + model[1](model[0](hidden)).mul(hidden).sum() + hidden.square().sum()).backward()
    return grads(model, x)


def graph_kept(model, x):
    y = model(x.requires_grad_())
    y.square().sum().backward(retain_graph=True)
    y.sum().backward()
    return grads(model, x)


def hooked_input(model, x):
    seen = []
    hidden = x.requires_grad_() * 1.0
    hidden.register_hook(lambda g: seen.append(g.clone()))
    hidden.register_hook(lambda g: g * 2)
    model(hidden).square().sum().backward()
    return seen + grads(model, x)


def two_dimensional(model, x):
    x = x[0].detach().requires_grad_()
    model(x).square().sum().backward()
    return grads(model, x)


def strided(model, x):
    """Neither x nor the gradient of y is contiguous."""
    x.requires_grad_()
    model(x.transpose(0, 1)).transpose(0, 1)[:, ::2].square().sum().backward()
    return grads(model, x)


def expanded(model, x):
    """An expanded x, and the gradient of a sum."""
    x = x[:1, :1].detach().requires_grad_()
    model(x.expand(3, 4, -1)).sum().backward()
    return grads(model, x)


def first_layer(model, x):
    model(x).square().sum().backward()
    return grads(model)


def changed_in_place(model, x):
    y = model(x.requires_grad_())
    y += 1
    y.square().sum().backward()
    return grads(model, x)


def accumulated(model, x):
    for part in x:
        model(part).square().sum().backward()
    return grads(model)


def checkpointed(model, x):
    x.requires_grad_()
    checkpoint(model, x * 2, use_reentrant=False).square().sum().backward()
    return grads(model, x)


def checkpointed_with_reentrance(model, x):
    x.requires_grad_()
    checkpoint(model, x * 2, use_reentrant=True).square().sum().backward()
    return grads(model, x)


def without_gradients(model, x):
    with torch.no_grad():
        one_token = model(x[:1, :1])
        return [model(x), one_token, model.eval()(x)]


def in_evaluation(model, x):
    y = model.eval()(x.requires_grad_())
    y.sum().backward()
    return [y.detach(), *grads(model, x)]


def half_of_the_factors_frozen(model, x):
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    model(x.requires_grad_()).square().sum().backward()
    return grads(model, x)


USES = (
    shared_input,
    graph_kept,
    hooked_input,
    two_dimensional,
    strided,
    expanded,
    first_layer,
    changed_in_place,
    accumulated,
    checkpointed,
    checkpointed_with_reentrance,
    without_gradients,
    in_evaluation,
    half_of_the_factors_frozen,
)


CASES = [(use, kind) for use in USES for kind in ("nf4 nested", "linear" if use is strided else "conv1d")]


@pytest.mark.parametrize(("use", "kind"), CASES)  # PEFT's Conv1D takes no strided input
def test_however_it_is_used_it_gives_what_peft_gives(use, kind):
    close_to_stock(use, kind)


@pytest.mark.parametrize("use", [checkpointed, checkpointed_with_reentrance, without_gradients, graph_kept])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_draws_what_peft_draws(use, p):
    close_to_stock(seeded(use), lora_dropout=p)


def seeded(use):
    def run(model, x):
        torch.manual_seed(7)
        return use(model, x)

    return run


def test_the_scale_is_the_layers_at_the_time_of_the_call():
    def scaled(model, x):
        model[0].scale_layer(3.0)
        return first_layer(model, x)

    close_to_stock(scaled)


# --- where PEFT's own forward pass runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"use_dora": True}, "DoRA: PEFT's own forward on 2"),
        ({"lora_bias": True}, "factors with a bias: PEFT's own forward on 2"),
    ],
)
def test_what_it_does_not_understand_is_left_and_said(options, why):
    model = lora_model("linear", (64, 128, 64), **options)
    types = [type(m) for m in model.modules()]
    outcome = put_on(model)
    assert (outcome.done, outcome.left) == ("", why)
    assert [type(m) for m in model.modules()] == types


def test_other_kinds_of_layers_are_left_and_said():
    model: Any = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    model = inject_adapter_in_model(LoraConfig(target_modules=["0", "1", "2"]), model)
    model[2].base_layer.requires_grad_(True)
    outcome = put_on(model)
    assert outcome.done == "1 linear layers"
    assert outcome.left == "lora.Embedding: PEFT's own forward on 1; the base trains: PEFT's own forward on 1"


def disabled(model):
    for layer in (model[0], model[1]):
        layer.enable_adapters(False)


def merged(model):
    for layer in (model[0], model[1]):
        layer.merge()


def two_adapters(model):
    settings = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(settings, model, adapter_name="other")
    for layer in (model[0], model[1]):
        layer.set_adapter(["default", "other"])


def other_adapter(model):
    two_adapters(model)
    for layer in (model[0], model[1]):
        layer.set_adapter(["other"])


def hooked_base(model):
    for layer in (model[0], model[1]):
        layer.base_layer.register_forward_hook(lambda module, args, y: y * 3)


@pytest.mark.parametrize("change", [disabled, merged, two_adapters, other_adapter, hooked_base])
def test_a_layer_that_changes_later_runs_as_pefts(change):
    stock, model = both("linear", (64, 128, 64), FP32)
    for m in (stock, model):
        change(m)
    x = torch.randn(2, 5, 64)
    y, expected = model(x), stock(x)
    if change is other_adapter:  # one active adapter: ours still runs
        torch.testing.assert_close(y, expected)
        return
    assert torch.equal(y, expected)


def test_adapters_by_row_run_as_pefts(folders):
    model, _ = model_and_oracle(folders("llama"), 16)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.randint(0, 256, (2, 24))
    names = ["__base__", "default"]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, adapter_names=names).logits
        lean(model)
        assert torch.equal(model(input_ids=ids, adapter_names=names).logits, expected)


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "linear", "int8"])
def test_fp16_under_autocast_with_fp32_factors_and_a_scaler(kind):
    """As the Trainer does on CUDA without bf16."""
    stock, model = both(kind, (64, 128, 64), torch.float16, FP32)
    oracle = nn.Sequential(*(NaiveLora(layer, torch.float16) for layer in copy.deepcopy(stock))).float()
    x = torch.linspace(-1, 1, 5 * 64).reshape(5, 64)  # fp32, as a norm gives it under autocast
    values, expected = fp16_step(model, x), fp16_step(stock, x)
    y = oracle(x)
    y.square().mean().backward()
    true = [y.detach(), *(p.grad for p in oracle.parameters())]
    if kind != "int8":  # on CUDA its kernel gives the dtype of x, as ours does; on a CPU autocast reaches into it
        assert [v.dtype for v in values] == [e.dtype for e in expected]
    assert relative_error(values, true) <= max(relative_error([e], [t]) for e, t in zip(expected, true, strict=True))


def fp16_step(model, x):
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.SGD(factors), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.float16):
        y = checkpoint(model, x, use_reentrant=False)
    scaler.scale(y.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    return [y.detach(), *(p.grad for p in factors)]


# --- the plan -------------------------------------------------------------------------------------------------------


def simulated(monkeypatch, pieces, bits=4):
    monkeypatch.setattr(apply, "PIECES", pieces)
    flat = {"model": "llama-3.2-1b", "weights": "random", "batch_size": 2, "bits": bits}
    architecture = FAMILIES["llama"]()
    architecture.hidden_size, architecture.intermediate_size = 512, 2048
    return simulate(
        RunConfig.from_flat(flat), Simulation(seq_len=256, optim="paged_adamw_8bit"), architecture, first_step=False
    )


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_plan_sees_less_in_every_recomputation(monkeypatch, bits):
    piece = apply.Piece(name="linear layers", put_on=put_on, setting="lora_first")
    peaks = [recomputation_peak(simulated(monkeypatch, pieces, bits)) for pieces in ((), (piece,))]
    assert peaks[1] < peaks[0]


def recomputation_peak(record):
    live = peak = 0
    for event in record.events:
        live += event.change_bytes
        if event.region.phase == "backward" and event.region.recomputes:
            peak = max(peak, live)
    return peak


def test_the_plan_sees_the_dequantized_weight_in_both_directions(monkeypatch):
    record = simulated(monkeypatch, (apply.Piece(name="linear layers", put_on=put_on, setting="lora_first"),))
    down_bytes = 2 * 512 * 2048
    seen = {
        (e.region.phase, e.region.recomputes, e.storage.category)
        for e in record.events
        if e.change_bytes == down_bytes and e.region.step == 2
        if e.storage.category == "workspaces"
    }
    assert seen == {
        (phase, recomputes, "workspaces")
        for phase, recomputes in (("forward", False), ("backward", False), ("backward", True))
    }


# --- CUDA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_errs_less_than_pefts_worst_tensor_on_each_device(kind, device):
    stock, model = both(kind, (64, 128, 64), device=device)
    x, grad_y = (torch.randn(2, 40, 64).to(device, BF16) for _ in range(2))
    theirs, ours = (output_and_gradients(m, x, grad_y, checkpoints=True) for m in (stock, model))
    oracle = nn.Sequential(*(NaiveLora(layer, BF16) for layer in stock)).float()
    true = output_and_gradients(oracle, x.float(), grad_y.float())
    worst = max(relative_error([s], [t]) for s, t in zip(theirs, true, strict=True))
    assert relative_error(ours, true) <= worst


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_lie_on_their_device_with_all_that_they_compute_with(kind, device):
    model = lora_model(kind, device=device)
    layer = model[0].base_layer
    scales = getattr(layer.weight, "quant_state", None)
    held = [*model.parameters(), *(t for t in vars(layer.weight).values() if isinstance(t, torch.Tensor))]
    held += [] if scales is None else [scales.absmax, scales.code]
    assert {tensor.device.type for tensor in held} == {device}


@pytest.mark.gpu
@pytest.mark.parametrize("use", [checkpointed, checkpointed_with_reentrance, without_gradients, graph_kept])
def test_on_cuda_dropout_draws_what_peft_draws(use):
    close_to_stock(seeded(use), device="cuda", lora_dropout=0.1)
