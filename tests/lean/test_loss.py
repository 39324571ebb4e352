from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math

import oracles
import pytest
import torch
from families import EOS_ID, FAMILIES, VOCAB, save_tiny, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_cases import (
    Step,
    assert_within_stock_error,
    batch,
    exact_step,
    take_step,
    tiny_peft_model,
    with_factors,
)
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, train
from qlora_kit.config.settings import LeanConfig
from qlora_kit.lean import apply, heads, loss
from qlora_kit.lean.heads import Head
from qlora_kit.memory import kernels
from qlora_kit.memory.track import MemoryTracker, overall_peak
from qlora_kit.tasks.decoding import answer, mean_loss

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
IGNORED = -100

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
OTHERS = {  # architectures of the table beside those of `families`: what makes each one tiny
    "arcee": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "granite": {"logits_scaling": 3.0},
    "helium": {"head_dim": 16},
    "olmo": {},
    "olmo2": {},
    "phi3": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


def any_model(kind: str, dtype: torch.dtype):
    """A tiny model of any architecture of the table, with factors, its matrices wide enough that logits differ."""
    if kind in FAMILIES:
        return tiny_peft_model(kind, dtype)
    tokens = {"vocab_size": VOCAB, "bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **{**tokens, "intermediate_size": 128, **SIZES, **OTHERS[kind]})
    for name in ("embd_pdrop", "attn_pdrop", "attention_dropout", "residual_dropout", "embedding_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for weight in base.parameters():
            if weight.ndim > 1:
                weight.data = torch.randn(weight.shape).to(dtype) * 0.15
    base.config.use_cache = False
    return with_factors(base)


def lean_copy(model):
    """A copy of `model` with the chunked loss, of which a few rows fit a chunk."""
    lean = copy.deepcopy(model)
    assert loss.put_on(lean).left == ""
    return lean


@pytest.fixture
def seven_rows(monkeypatch):
    """So many rows at a time that tiny batches take several chunks, the last one ragged."""
    monkeypatch.setattr(loss, "chunk_rows", lambda n_vocab: 7)


def test_every_architecture_of_the_table_is_tested():
    assert heads.KINDS.keys() == FAMILIES.keys() | OTHERS.keys()


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, BF16) for kind in sorted(heads.KINDS)), *((kind, FP32) for kind in FAMILIES)], ids=str
)
def test_loss_and_gradients_are_the_stock_step_s(kind, dtype, seven_rows):
    model, inputs = any_model(kind, dtype), batch()
    n_items = None if dtype == FP32 else torch.tensor(45)
    exact, stock = exact_step(model, inputs, n_items), take_step(model, inputs, n_items)
    assert loss.put_on(model).left == ""
    lean = take_step(model, inputs, n_items)
    assert lean.token_losses is None  # no logits
    assert_within_stock_error(lean, stock, exact)


def test_the_rounding_of_a_plain_head_is_the_stock_step_s():
    """Not only as good: bf16 gradients come out the same to the last bit, whatever the number of tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(64, 32, generator=generator).to(BF16)
    head = Head(weight=torch.randn(200, 32, generator=generator).to(BF16))
    targets_M = torch.randint(0, 200, (64,), generator=generator)
    for n_items in (64, 61, 4099):
        stock_MD, lean_MD = (hidden_MD.clone().requires_grad_() for _ in range(2))
        logits_MV = functional.linear(stock_MD, head.weight).float()
        (functional.cross_entropy(logits_MV, targets_M, reduction="sum") / n_items).backward()
        loss.linear_cross_entropy(lean_MD, targets_M, head, n_items).backward()
        different = (lean_MD.grad != stock_MD.grad).float().mean()
        assert different <= 0.01  # an fp32 sum in another order may fall on the other side of a rounding


@st.composite
def cases(draw):
    """Shapes, a head, and which rows are supervised."""
    M, D, V = draw(st.integers(0, 9)), draw(st.integers(1, 9)), draw(st.integers(2, 33))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([FP32, BF16]))

    def tensor(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    bias = tensor(V) if draw(st.booleans()) else None
    head = Head(
        weight=tensor(V, D),
        bias=bias,
        scale=draw(st.sampled_from([1.0, 0.0625, 3.0])),
        soft_cap=draw(st.sampled_from([None, 1.5, 30.0])),
    )
    targets = torch.randint(0, V, (M,), generator=generator)
    ignored = torch.rand(M, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    return tensor(M, D), targets.masked_fill(ignored, IGNORED), head, draw(st.integers(1, 15))


def naive(hidden_MD, targets_M, head, dtype):
    """The oracle's loss and gradient in `dtype`."""
    hidden_MD = hidden_MD.detach().clone().to(dtype).requires_grad_()
    bias = None if head.bias is None else head.bias.to(dtype)
    total = oracles.linear_cross_entropy(hidden_MD, targets_M, head.weight.to(dtype), bias, head.scale, head.soft_cap)
    if not total.requires_grad:
        return total, torch.zeros_like(hidden_MD)
    total.backward()
    return total.detach(), hidden_MD.grad


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any_shape_agrees_with_the_naive_loss(case):
    hidden_MD, targets_M, head, rows_at_once = case
    exact_loss, exact_MD = naive(hidden_MD, targets_M, head, torch.float64)
    same_loss, same_MD = naive(hidden_MD, targets_M, head, hidden_MD.dtype)
    rows_N = (targets_M != IGNORED).nonzero().squeeze(1)
    leaf_MD = hidden_MD.clone().requires_grad_()
    total = loss.linear_cross_entropy(leaf_MD, targets_M[rows_N], head, 1, rows_N, rows_at_once)
    total.backward()
    with torch.no_grad():
        without_gradient = loss.linear_cross_entropy(leaf_MD, targets_M[rows_N], head, 1, rows_N, rows_at_once)

    # A logit z is off by eps · |z| in that dtype, and moves its row's loss by as much, its gradient by |w| times that.
    eps, fp32_eps = torch.finfo(hidden_MD.dtype).eps, torch.finfo(FP32).eps
    size = 1 + (hidden_MD.double() @ head.weight.double().T).abs().amax().item() if hidden_MD.numel() else 1.0
    size = (size + (0 if head.bias is None else head.bias.abs().max().item())) * head.scale + 1
    loss_size = size * len(rows_N) + exact_loss.item()
    assert abs(total.item() - exact_loss.item()) <= abs(same_loss.item() - exact_loss.item()) + eps * loss_size
    assert abs(without_gradient.item() - total.item()) <= 2 * fp32_eps * loss_size
    slack = eps * size * 2 * head.weight.double().norm(dim=1).max().item() * head.scale * math.sqrt(len(rows_N))
    error = (same_MD.double() - exact_MD).norm().item()
    assert (leaf_MD.grad.double() - exact_MD).norm().item() <= error + slack
    assert not leaf_MD.grad[targets_M == IGNORED].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2000), st.integers(1, 300))
def test_chunks_cover_every_row_once_and_are_never_smaller_for_more_rows(n_rows, at_most):
    chunks = loss._chunks(n_rows, at_most)
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(n_rows))
    assert len(chunks) == math.ceil(n_rows / at_most)
    assert max(sizes, default=0) <= at_most
    assert max(sizes, default=0) <= max(chunk.stop - chunk.start for chunk in loss._chunks(n_rows + 1, at_most))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 9), (3, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("supervised", [1.0, 0.5])
def test_short_batches(shape, supervised, seven_rows):
    model, inputs = tiny_peft_model("llama"), batch(*shape, supervised=supervised)
    inputs["labels"][0, -1] = inputs["input_ids"][0, -1]
    stock, exact = take_step(model, inputs), exact_step(model, inputs)
    lean = take_step(lean_copy(model), inputs)
    if shape[1] > 1:
        return assert_within_stock_error(lean, stock, exact)
    assert_nothing_learned(lean, stock)


def assert_nothing_learned(lean: Step, stock: Step) -> None:
    assert torch.equal(lean.loss, stock.loss) or bool(lean.loss.isnan() and stock.loss.isnan())
    assert lean.gradients.keys() == stock.gradients.keys()
    for name, gradient in lean.gradients.items():
        assert not gradient.any()
        assert not stock.gradients[name].any()


@pytest.mark.parametrize("n_items", [None, 7, torch.tensor(7), torch.tensor(0)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_a_batch_with_nothing_supervised(n_items, dtype):
    """The stock loss is no number as a mean, 0 as a share of other batches' tokens; nothing is learned either way."""
    model, inputs = tiny_peft_model("qwen2", dtype), batch(supervised=0.0)
    assert_nothing_learned(take_step(lean_copy(model), inputs, n_items), take_step(model, inputs, n_items))


def test_targets_that_are_shifted_already_and_another_ignored_label(seven_rows):
    model, inputs = tiny_peft_model("gpt2"), batch()
    lean = lean_copy(model)
    shifted = torch.roll(inputs["labels"], -1, 1)
    for extra in ({"shift_labels": shifted}, {"ignore_index": 5, "labels": inputs["input_ids"] % 9}):
        arguments = {**inputs, **extra}
        assert lean(**arguments).loss.item() == pytest.approx(model(**arguments).loss.item(), rel=1e-6)


def test_the_loss_is_summed_in_fp32_for_bf16():
    """`F.linear_cross_entropy` of torch 2.13 gives 11.0 here; a batch of logits in fp32 is never made."""
    n_vocab = 64_800
    head = Head(weight=torch.zeros(n_vocab, 4, dtype=BF16))
    hidden_MD = torch.zeros(300, 4, dtype=BF16, requires_grad=True)
    targets_M = torch.arange(300)
    mean = loss.linear_cross_entropy(hidden_MD, targets_M, head, 300)
    assert mean.dtype == FP32
    assert mean.item() == pytest.approx(math.log(n_vocab), rel=1e-6)  # 11.079
    assert loss.linear_cross_entropy(hidden_MD.detach(), targets_M, head, 300).item() == pytest.approx(mean.item())


def test_fp16_gradients_survive_a_large_number_of_tokens():
    """Divided by the number of tokens before the scaler's factor comes in, they would vanish."""
    generator = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(32, 64, generator=generator).to(FP16)
    head = Head(weight=(torch.randn(500, 64, generator=generator) * 0.02).to(FP16))
    targets_M = torch.randint(0, 500, (32,), generator=generator)
    n_items, scaler = 2**20 + 1, 2.0**16
    _, exact_MD = naive(hidden_MD, targets_M, head, torch.float64)
    exact_MD *= scaler / n_items
    stock_MD, lean_MD = (hidden_MD.clone().requires_grad_() for _ in range(2))
    logits_MV = functional.linear(stock_MD, head.weight).float()
    (functional.cross_entropy(logits_MV, targets_M, reduction="sum") / n_items * scaler).backward()
    (loss.linear_cross_entropy(lean_MD, targets_M, head, n_items) * scaler).backward()
    stock_error = (stock_MD.grad.double() - exact_MD).norm()
    assert (lean_MD.grad - stock_MD.grad).double().norm() <= 2 * stock_error
    assert stock_error < 0.01 * exact_MD.norm()


def test_under_autocast_the_product_is_in_its_dtype():
    model, inputs = tiny_peft_model("llama"), batch()
    lean = lean_copy(model)
    exact = exact_step(model, inputs)
    steps = []
    for each in (model, lean):
        with torch.autocast("cpu", BF16):
            steps.append(take_step(each, inputs))
    assert_within_stock_error(steps[1], steps[0], exact)


def test_a_second_backward_pass_over_the_same_graph_is_refused():
    hidden_MD = torch.randn(3, 4, requires_grad=True)
    value = loss.linear_cross_entropy(hidden_MD, torch.tensor([0, 1, 2]), Head(weight=torch.randn(5, 4)), 3)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        value.backward()


# ---- memory


def every_element(tracker, func, args, kwargs):
    """What a plan takes `nonzero` to find: every element."""
    with tracker:
        return torch.empty((args[0].numel(), args[0].dim()), dtype=torch.int64, device=args[0].device)


def empty(*shape: int, dtype: torch.dtype = torch.int64, **options):
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def tracked(*tensors: torch.Tensor) -> MemoryTracker:
    """A tracker that knows what is there already."""
    tracker = MemoryTracker("meta", 1)
    for tensor in tensors:
        tracker.label(tensor, "inputs")
    return tracker


def peak_bytes(tracker: MemoryTracker, before_bytes: int) -> int:
    return overall_peak(tracker.events).n_bytes - before_bytes


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize(("n_vocab", "width"), [(50257, 1280), (128256, 4096), (256000, 2048)])
def test_peak_bytes_are_two_fp32_chunks_and_the_gradient(dtype, soft_cap, n_vocab, width):
    M, N = 4096, 3000
    head = Head(weight=empty(n_vocab, width, dtype=dtype), bias=None, scale=1.0, soft_cap=soft_cap)
    hidden_MD = empty(M, width, dtype=dtype, requires_grad=True)
    rows_N, targets_N = empty(N), empty(N)
    tracker = tracked(head.weight, hidden_MD, rows_N, targets_N)
    before_bytes = tracker.live_bytes
    with tracker:
        value = loss.linear_cross_entropy(hidden_MD, targets_N, head, N, rows_N)
        forward_bytes = peak_bytes(tracker, before_bytes)
        between_bytes = tracker.live_bytes - before_bytes
        value.backward()
    chunks = loss._chunks(N, loss.chunk_rows(n_vocab))
    C = chunks[0].stop
    gradient_bytes, chunk_bytes = N * width * dtype.itemsize, 2 * 4 * C * n_vocab
    small_bytes = C * width * dtype.itemsize + 8 * 4 * C + 64  # the chunk's hidden state, its targets, scalars
    assert loss.chunk_rows(n_vocab) < 2 * C
    assert chunk_bytes <= 2 * loss.MAX_FP32_BYTES
    assert gradient_bytes + chunk_bytes <= forward_bytes <= gradient_bytes + chunk_bytes + small_bytes
    assert gradient_bytes <= between_bytes <= gradient_bytes + 64
    assert peak_bytes(tracker, before_bytes) <= max(forward_bytes, gradient_bytes + M * width * dtype.itemsize + 64)


def test_evaluation_keeps_no_gradient():
    M, V, D = 4096, 50257, 1280
    head, hidden_MD, targets_M = Head(weight=empty(V, D, dtype=BF16)), empty(M, D, dtype=BF16), empty(M)
    tracker = tracked(head.weight, hidden_MD, targets_M)
    before_bytes = tracker.live_bytes
    with tracker:
        loss.linear_cross_entropy(hidden_MD, targets_M, head, M)
    assert peak_bytes(tracker, before_bytes) <= 2 * 4 * 256 * V + 2 * 256 * D + 8 * M + 8 * 256 + 64


def test_a_step_on_meta_needs_only_an_answer_to_nonzero():
    config = FAMILIES["gpt2"]()
    config.vocab_size, config.use_cache = 50_000, False
    stand_ins = {**kernels.stand_ins(), torch.ops.aten.nonzero.default: every_element}
    peaks = []
    for lean in (False, True):
        with torch.device("meta"):
            model = with_factors(AutoModelForCausalLM.from_config(config, dtype=BF16))
        if lean:
            loss.put_on(model)
        inputs = {"input_ids": empty(8, 128), "labels": empty(8, 128), "num_items_in_batch": empty()}
        with MemoryTracker("meta", 1, stand_ins) as tracker:
            model(**inputs).loss.backward()
        peaks.append(overall_peak(tracker.events).n_bytes)
    stock_bytes, lean_bytes = peaks
    logits = 8 * 128 * 50_000
    assert stock_bytes > 10 * logits  # bf16, fp32, and their gradients
    assert lean_bytes < stock_bytes - 10 * logits + 2 * 4 * 256 * 50_000


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_on_a_gpu_the_gradient_and_the_peak_are_the_same(dtype):
    generator = torch.Generator().manual_seed(0)
    M, D, V = 1000, 256, 50257
    hidden_MD = torch.randn(M, D, generator=generator).to("cuda", dtype)
    head = Head(weight=(torch.randn(V, D, generator=generator) * 0.05).to("cuda", dtype))
    targets_M = torch.randint(0, V, (M,), generator=generator).cuda()
    stock_MD, lean_MD, exact_MD = (t.clone().requires_grad_() for t in (hidden_MD, hidden_MD, hidden_MD.float()))
    functional.cross_entropy(functional.linear(stock_MD, head.weight).float(), targets_M).backward()
    functional.cross_entropy(functional.linear(exact_MD, head.weight.float()), targets_M).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    loss.linear_cross_entropy(lean_MD, targets_M, head, M).backward()
    error = (stock_MD.grad.float() - exact_MD.grad).norm()
    assert (lean_MD.grad - stock_MD.grad).float().norm() <= 2 * error
    peak = torch.cuda.max_memory_allocated() - before_bytes
    assert peak <= 2 * 4 * 256 * V + 3 * M * D * 2 + 2**20 + 33 * 2**20  # cuBLAS takes a workspace once


# ---- on a model


def test_it_says_what_it_did_and_what_it_left():
    assert loss.put_on(tiny_peft_model("llama")).done == "logits of 256 supervised tokens at a time"

    twice = tiny_peft_model("llama")
    loss.put_on(twice)
    assert loss.put_on(twice).left == "the stock loss: the model's loss is not its class's own"

    adapted = with_factors(tiny_model("llama"), targets=("q_proj",))
    adapted.get_base_model().lm_head.weight.requires_grad_(True)
    assert "the head trains" in loss.put_on(adapted).left

    hooked = tiny_peft_model("llama")
    hooked.get_base_model().lm_head.register_forward_hook(lambda *_: None)
    assert "something else" in loss.put_on(hooked).left


def test_a_head_with_an_adapter_of_its_own_is_left():
    base = tiny_model("llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    assert "not a plain linear layer" in loss.put_on(model).left
    assert model(**batch()).logits is not None


def test_an_architecture_that_is_not_in_the_table_is_left():
    config = AutoConfig.for_model("mixtral", **SIZES, vocab_size=VOCAB, intermediate_size=128, num_local_experts=2)
    model = with_factors(AutoModelForCausalLM.from_config(config, dtype=FP32), targets=("q_proj",))
    assert loss.put_on(model) == loss.Outcome(left="the stock loss: the head of 'mixtral' is not known")
    assert "forward" not in vars(model.get_base_model())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_without_labels_nothing_changes(family):
    model = tiny_peft_model(family).eval()
    lean, inputs = lean_copy(model), batch()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    assert torch.equal(lean(**asked).logits, model(**asked).logits)
    prompts = [[1, 2, 3], [9] * 8]
    assert answer(lean, tokenizer, prompts, 5) == answer(model, tokenizer, prompts, 5)
    assert inspect.signature(lean.get_base_model().forward) == inspect.signature(model.get_base_model().forward)
    assert lean.state_dict().keys() == model.state_dict().keys()


def test_who_asks_for_logits_gets_them():
    model, inputs = tiny_peft_model("llama"), batch()
    lean = lean_copy(model)
    assert torch.equal(lean(**inputs, return_dict=False)[1], model(**inputs).logits)
    ids_BT = inputs["input_ids"]
    assert torch.equal(lean.get_base_model()(ids_BT, labels=ids_BT).logits, model(ids_BT, labels=ids_BT).logits)
    assert lean(**inputs, logits_to_keep=17).logits.shape == (3, 17, VOCAB)


def test_labels_of_another_length_are_refused():
    lean, inputs = lean_copy(tiny_peft_model("llama")), batch()
    with pytest.raises(ValueError, match="labels"):
        lean(**{**inputs, "labels": inputs["labels"][:, :-1]})


def test_a_copy_computes_with_its_own_weights():
    lean = lean_copy(tiny_peft_model("llama"))
    other = copy.deepcopy(lean)
    with torch.no_grad():
        other.get_base_model().lm_head.weight.zero_()
    assert other(**batch()).loss.item() == pytest.approx(math.log(VOCAB))
    assert lean(**batch()).loss.item() != pytest.approx(math.log(VOCAB))


def test_held_out_loss(seven_rows):
    model, batches = tiny_peft_model("gemma"), [batch(), batch(2, 30, 0.2), batch(supervised=0.0)]
    stock, lean = mean_loss(model, batches), mean_loss(lean_copy(model), batches)
    assert lean.tokens == stock.tokens
    assert lean.mean == pytest.approx(stock.mean, rel=4 * torch.finfo(FP32).eps)


def test_a_run_is_the_stock_run(tmp_path, monkeypatch):
    """Three steps of accumulated batches and an evaluation, in bf16."""
    piece = apply.Piece(name="loss", put_on=loss.put_on, setting="chunked_loss")
    monkeypatch.setattr(apply, "PIECES", (piece,))
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": f"add {i} and {i + 1}", "completion": f"{2 * i + 1}"}) for i in range(12)]
    data.write_text("\n".join(lines))
    config = RunConfig(
        base=BaseConfig(model=str(save_tiny(tmp_path / "base", "llama")), bits=16, device="cpu"),
        adapter=AdapterConfig(r=4),
        data=DataConfig(data=str(data), eval_data=str(data), seq_len=64),
        optim=OptimConfig(lr=5e-3, max_steps=3, batch_size=2, grad_accum=2),
        evaluation=EvalConfig(eval_steps=3, keep_best=False),
        preflight=False,
    )
    lines = {}
    for name in ("on", "off"):
        run = dataclasses.replace(config, lean=LeanConfig(lean=name), out=str(tmp_path / name))
        train(run)
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines[name] = [line[key] for line in metrics for key in ("loss", "eval_loss") if key in line]
    assert len(lines["on"]) == 4
    assert lines["on"] == pytest.approx(lines["off"], rel=1e-5)
