"""Every way in which factors begin, against its definition in fp64, PEFT's own where it has one, and its release."""

from __future__ import annotations

import math

import pytest
import torch
from families import save_tiny
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from releases import check_release, difference
from transformers import AutoModelForCausalLM

from qlora_kit.adapters import initialization
from qlora_kit.adapters.files import save_adapter
from qlora_kit.adapters.initialization import NAME, lora_layers, start_from_data, truncated_svd
from qlora_kit.adapters.inject import inject, trainable
from qlora_kit.adapters.parts import CoreFactor, HalfFrozen
from qlora_kit.config.settings import AdapterConfig, BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.model.load import load_base, load_originals
from qlora_kit.model.quantize import dense_weight

CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20)
EPS = torch.finfo(torch.float32).eps
R = 4


def base(folder, bits=4):
    return load_base(BaseConfig(model=str(folder), bits=bits), CPU)


def begun(folder, bits, seed=0, **settings):
    """The base in `folder` with factors as training finds them."""
    torch.manual_seed(seed)
    config = AdapterConfig(**{"r": R, "adapter_dtype": "fp32", **settings})
    source = BaseConfig(model=str(folder), bits=bits)
    originals = load_originals(source, CPU) if config.init == "loftq" else None
    return inject(base(folder, bits), config, originals=originals)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: save_tiny(tmp_path_factory.mktemp(family), family) for family in ("gpt2", "llama")}


def best_error(matrix, r):
    """The Frobenius norm of what a matrix is off its best approximation of rank r (Eckart and Young)."""
    return float(torch.linalg.svdvals(matrix.double())[r:].norm())


def rounding(matrix):
    """What a backward stable decomposition in fp32 may be off, in the Frobenius norm."""
    return EPS * max(matrix.shape) * float(matrix.double().norm())


def halves(layer):
    """The trained and the frozen factors of a layer in fp64: B₁, A₁, B₀, A₀."""
    a, b = layer.lora_A[NAME], layer.lora_B[NAME]
    return b.trained.detach().double(), a.trained.detach().double(), -b.frozen.double(), a.frozen.double()


# the decomposition


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_truncated_svd_is_the_best_approximation_of_its_rank(rows, columns, data):
    r = data.draw(st.integers(1, min(rows, columns)))
    torch.manual_seed(rows * 41 + columns)
    matrix = torch.randn(rows, columns)
    state = torch.random.get_rng_state()
    left_Nr, values_r, right_rK = truncated_svd(matrix, r)
    assert torch.equal(torch.random.get_rng_state(), state)
    error = float((matrix.double() - (left_Nr * values_r).double() @ right_rK.double()).norm())
    assert error <= best_error(matrix, r) + rounding(matrix)
    for vectors in (left_Nr.double(), right_rK.double().T):
        assert float((vectors.T @ vectors - torch.eye(r)).norm()) <= EPS * max(rows, columns) * r
    assert (left_Nr.gather(0, left_Nr.abs().argmax(0, keepdim=True)) > 0).all()
    assert all(map(torch.equal, truncated_svd(matrix, r), (left_Nr, values_r, right_rK)))


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_a_large_matrix_is_decomposed_as_well_by_sampling(monkeypatch, shape):
    """The bound is that of Halko et al. (theorem 10.6 and corollary 10.10), for the mean error in the spectral norm.

    Singular values 1/i, as slowly as those of real weights fall.
    """
    monkeypatch.setattr(initialization, "EXACT_SIDE", 8)
    r, p, q = 8, initialization.OVERSAMPLES, initialization.POWER_ITERATIONS
    torch.manual_seed(0)
    side = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], side, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(shape[1], side, dtype=torch.float64))[0]
    exact = 1 / torch.arange(1, side + 1, dtype=torch.float64)
    matrix = ((left * exact) @ right.T).float()
    left_Nr, values_r, right_rK = truncated_svd(matrix, r)
    off = torch.linalg.matrix_norm(matrix.double() - (left_Nr * values_r).double() @ right_rK.double(), 2)
    growth = 1 + math.sqrt(r / (p - 1)) + math.e * math.sqrt(r + p) / p * math.sqrt(side - r)
    assert float(off) <= exact[r] * growth ** (1 / (2 * q + 1)) + rounding(matrix)
    torch.manual_seed(99)
    assert all(map(torch.equal, truncated_svd(matrix, r), (left_Nr, values_r, right_rK)))


# methods that take a part out of the weight


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_pissa_begins_at_the_principal_part_of_what_the_layer_computes_with(folders, family, bits):
    model = begun(folders[family], bits, init="pissa", alpha=6.0)
    for layer in lora_layers(model).values():
        weight_NK, scale = dense_weight(layer.base_layer).double(), layer.scaling[NAME]
        b1, a1, b0, a0 = halves(layer)
        assert scale == 1.5
        assert float((weight_NK - scale * b1 @ a1).norm()) <= best_error(weight_NK, R) + rounding(weight_NK)
        grams = torch.stack([b1.T @ b1, a1 @ a1.T])  # the singular values are shared out evenly
        assert float((grams[0] - grams[1]).norm()) <= R * rounding(weight_NK)
        assert torch.equal(b1, b0)
        assert torch.equal(a1, a0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_olora_begins_at_the_first_columns_of_q_and_rows_of_r(folders, family, bits):
    model = begun(folders[family], bits, init="olora")
    for layer in lora_layers(model).values():
        weight_NK = dense_weight(layer.base_layer).double()
        b1, a1, b0, a0 = halves(layer)
        q, upper = torch.linalg.qr(weight_NK)
        signs_r = upper.diagonal().sign()[:R]
        # the first columns are what a QR in fp32 is off, times how badly they are conditioned
        off = rounding(weight_NK) / float(torch.linalg.svdvals(weight_NK[:, :R])[-1])
        assert float((b1 - q[:, :R] * signs_r).norm()) <= off
        assert float((a1 - signs_r[:, None] * upper[:R]).norm()) <= off * float(weight_NK.norm())
        assert torch.equal(b1, b0)
        assert torch.equal(a1, a0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("rslora", [False, True])
def test_training_goes_as_with_pefts_own_which_changes_the_base(folders, family, init, rslora):
    """Three steps of SGD in fp32: the same function as PEFT's, whose base is W − s·B₀·A₀.

    PEFT's OLoRA takes Conv1D's weight for its transpose, and does not run on it.
    """
    if (family, init) == ("gpt2", "olora"):
        pytest.skip("PEFT's own does not run on Conv1D")
    ours = begun(folders[family], 32, init=init, rslora=rslora)
    targets = list({name.rsplit(".", 1)[-1] for name in lora_layers(ours)})
    options = {"r": R, "lora_alpha": 2 * R, "target_modules": targets, "use_rslora": rslora}
    stock = AutoModelForCausalLM.from_pretrained(folders[family])
    theirs = get_peft_model(stock, LoraConfig(init_lora_weights=init, fan_in_fan_out=family == "gpt2", **options))
    start = logits(ours)
    assert difference(start, logits(base(folders[family], 32))) < 1e-4
    for model in (ours, theirs):
        model.train()
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.02 * parameter.grad
                        parameter.grad = None
    assert difference(logits(ours), start) > 0.05
    assert difference(logits(ours), logits(theirs)) < 1e-3


# methods that leave it


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rslora", [False, True])
def test_loftq_makes_up_for_what_quantization_did(folders, family, bits, rslora):
    model = begun(folders[family], bits, init="loftq", rslora=rslora)
    originals = dict(base(folders[family], 16).named_modules())
    for name, layer in lora_layers(model).items():
        original_NK = dense_weight(originals[name.removeprefix("base_model.model.")]).double()
        lost_NK = original_NK - dense_weight(layer.base_layer).double()
        made_up = (
            layer.scaling[NAME]
            * layer.lora_B[NAME].weight.detach().double()
            @ layer.lora_A[NAME].weight.detach().double()
        )
        error = float((lost_NK - made_up).norm())
        assert error <= best_error(lost_NK, R) + rounding(original_NK)
        assert error < 0.95 * float(lost_NK.norm())


def test_loftq_brings_the_model_nearer_to_the_original(folders):
    original = logits(base(folders["llama"], 32))
    before = float((logits(base(folders["llama"])) - original).norm())
    assert float((logits(begun(folders["llama"], 4, init="loftq", r=32)) - original).norm()) < 0.9 * before


@pytest.mark.parametrize("bits", [16, 32])
def test_loftq_needs_a_quantized_base(folders, bits):
    with pytest.raises(UserError, match=r"init = 'loftq': corrects .*\n.*bits=4 or 8"):
        inject(base(folders["llama"], bits), AdapterConfig(init="loftq", adapter_dtype="fp32"))


@pytest.mark.parametrize("bits", [4, 32])
def test_orthogonal_factors_are_there_and_their_product_is_not(folders, bits):
    model = begun(folders["gpt2"], bits, init="orthogonal")
    for layer in lora_layers(model).values():
        a_rK, b_Nr = layer.lora_A[NAME].weight.detach().double(), layer.lora_B[NAME].weight.detach().double()
        assert float((b_Nr @ a_rK).norm()) <= R * EPS * float(b_Nr.norm() * a_rK.norm())
        for factor in (a_rK, b_Nr):  # rank r / 2 each, entries of a deviation of 0.1 · √(r/2)/√r
            values = torch.linalg.svdvals(factor)
            assert float(values[R // 2]) < 1e-5 < float(values[R // 2 - 1])
            assert float(factor.std()) == pytest.approx(0.1 / math.sqrt(2), rel=0.4)
    assert difference(logits(model), logits(base(folders["gpt2"], bits))) < (1e-4 if bits == 32 else 0.05)


def test_gaussian_factors_have_pefts_deviation(folders):
    model = begun(folders["llama"], 4, init="gaussian", r=16)
    a = torch.cat([layer.lora_A[NAME].weight.flatten() for layer in lora_layers(model).values()])
    assert float(a.detach().std()) == pytest.approx(1 / 16, rel=0.02)
    assert not any(layer.lora_B[NAME].weight.any() for layer in lora_layers(model).values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_lora_xs_has_the_weights_singular_vectors_on_both_sides_of_a_core_of_zero(folders, family, bits):
    model = begun(folders[family], bits, variant="lora-xs")
    for layer in lora_layers(model).values():
        weight_NK = dense_weight(layer.base_layer).double()
        b, right_rK = layer.lora_B[NAME], layer.lora_A[NAME].weight.detach().double()
        assert isinstance(b, CoreFactor)
        assert not b.core.any()
        assert float((weight_NK - b.left.double() @ right_rK).norm()) <= best_error(weight_NK, R) + rounding(weight_NK)
        assert float((right_rK @ right_rK.T - torch.eye(R)).norm()) <= EPS * max(weight_NK.shape) * R
    assert torch.equal(logits(model), logits(base(folders[family], bits)))


def test_the_gradient_of_a_core_is_that_of_its_definition(folders):
    """∂L/∂R = s·Lᵀ·(∂L/∂W)·Uᵀ, from the gradient of the whole weight in fp32."""
    model = begun(folders["llama"], 32, variant="lora-xs").train()
    full = AutoModelForCausalLM.from_pretrained(folders["llama"])
    for whole in (model, full):
        whole(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in lora_layers(model).items():
        b, a = layer.lora_B[NAME], layer.lora_A[NAME]
        grad_NK = full.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        expected = layer.scaling[NAME] * b.left.double().T @ grad_NK.double() @ a.weight.double().T
        assert float((b.core.grad.double() - expected).norm()) <= 1e-4 * float(expected.norm())


# from the data


def batches(n=3):
    draw = torch.Generator().manual_seed(1)
    for _ in range(n):
        ids = torch.randint(0, 256, (4, 16), generator=draw)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.3, -100)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [4, 32])
def test_eva_begins_at_the_main_directions_of_the_supervised_inputs(folders, family, bits):
    """Of a single batch they are those of a principal component analysis in fp64."""
    [batch] = batches(1)
    model = begun(folders[family], bits, init="eva").eval()
    seen = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].double()}))
        for name, layer in lora_layers(model).items()
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    before = logits(model)
    start_from_data(model, [batch])
    for name, layer in lora_layers(model).items():
        rows_MK = seen[name][batch["labels"] != -100]
        rows_MK = rows_MK - rows_MK.mean(0)
        a_rK = layer.lora_A[NAME].weight.detach().double()
        assert float((a_rK @ a_rK.T - torch.eye(R)).norm()) < 1e-5
        kept = float((rows_MK @ a_rK.T).norm() ** 2)
        best = float(torch.linalg.svdvals(rows_MK)[:R].norm() ** 2)
        assert kept >= (1 - 1e-5) * best
    assert torch.equal(logits(model), before)  # B is zero


def test_eva_takes_layers_with_one_input_together_and_ranks_of_their_own(folders):
    model = begun(folders["llama"], 4, init="eva", rank_pattern={"q_proj": 2})
    start_from_data(model, batches())
    for block in model.base_model.model.model.layers:
        q, k = (getattr(block.self_attn, name).lora_A[NAME].weight for name in ("q_proj", "k_proj"))
        assert (q.shape[0], k.shape[0]) == (2, R)
        assert torch.equal(q, k[:2])
    assert not any(layer._forward_pre_hooks for layer in lora_layers(model).values())


def test_eva_needs_more_tokens_than_directions(folders):
    model = begun(folders["llama"], 4, init="eva", r=32)
    [batch] = batches(1)
    with pytest.raises(UserError, match="init = 'eva': needs at least 64 supervised tokens"):
        start_from_data(model, [{name: value[:1] for name, value in batch.items()}])
    assert not any(layer._forward_pre_hooks for layer in lora_layers(model).values())


# what goes with what, and the release


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "pissa"}, "adapter_dtype = 'bf16': would round away the steps of the large factors that init=pissa"),
        (
            {"init": "orthogonal", "r": 3, "adapter_dtype": "fp32"},
            "r = 3: is odd, and init=orthogonal needs even ranks",
        ),
        ({"init": "eva", "variant": "lora-xs"}, "init = 'eva': sets factors that train"),
        ({"init": "olora", "dora": True, "adapter_dtype": "fp32"}, "dora = True: cannot be combined with init=olora"),
        ({"variant": "lora-xs", "dora": True}, "dora = True: cannot be combined with variant=lora-xs"),
        ({"init": "svd"}, "init = 'svd': must be one of default"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AdapterConfig(**settings)


@pytest.mark.parametrize("method", [{"init": "pissa"}, {"init": "eva"}, {"variant": "lora-xs"}])
def test_a_rank_beyond_the_layer_is_refused(folders, method):
    with pytest.raises(UserError, match=r"r = 65: is too large for .*: the smaller side of .* is 64"):
        begun(folders["llama"], 4, r=65, **method)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "method",
    [{"init": init} for init in ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")]
    + [{"variant": "lora-xs"}],
    ids=str,
)
def test_releases_are_what_the_live_model_computes(folders, tmp_path, family, method):
    pattern = {"c_proj": 2} if family == "gpt2" else {"o_proj": 2}
    model = begun(folders[family], 4, rank_pattern=pattern, **method)
    if method == {"init": "eva"}:
        start_from_data(model, batches())
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter -= 0.1 * parameter.grad
    save_adapter(model, tmp_path / "adapter")
    check_release(folders[family], [(tmp_path / "adapter", 1.0)], tmp_path / "out")


def test_halves_exist_for_every_layer(folders):
    model = begun(folders["llama"], 4, init="pissa")
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert layers
    assert all(isinstance(m.lora_A[NAME], HalfFrozen) and m.r[NAME] == 2 * R for m in layers)
