from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from families import FAMILIES, save_tiny, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config

from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.memory.track import MemoryTracker
from qlora_kit.model import source, synthetic
from qlora_kit.model.device import compute_dtype, resolve_device
from qlora_kit.model.host_embedding import HostEmbedding, host_weight
from qlora_kit.model.load import _load_pretrained, _structure, load_base, placement
from qlora_kit.model.quantize import count_parameters, dense_weight, true_numel
from qlora_kit.model.source import hash_base, max_positions
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.tasks.generation.task import TASK as GENERATION

CPU, META = torch.device("cpu"), torch.device("meta")
HAS_AVX512BF16 = bnb.functional.has_avx512bf16() if hasattr(bnb.functional, "has_avx512bf16") else False


def load(folder, bits, **kwargs):
    return load_base(BaseConfig(model=str(folder), bits=bits, **kwargs), CPU)


def quantized_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt))}


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits_quantizes_the_blocks_and_keeps_the_rest_in_bf16(tmp_path, family):
    model = load(save_tiny(tmp_path, family), 4)
    layers = quantized_layers(model)
    assert layers
    assert all(".layers." in name or ".h." in name for name in layers)
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    packed = {m.weight for m in layers.values()}
    assert {p.dtype for p in model.parameters() if p not in packed} == {torch.bfloat16}  # no fp32 copies (trap 4)
    assert {m.weight.quant_state.dtype for m in layers.values()} == {torch.bfloat16}  # trap 5
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_of_parameters_is_the_true_one_at_any_bits(tmp_path, family):
    folder = save_tiny(tmp_path, family)
    counts = {bits: count_parameters(load(folder, bits)) for bits in (4, 8, 16, 32)}
    assert len({c.total for c in counts.values()}) == 1
    assert counts[32].total == sum(p.numel() for p in tiny_model(family).parameters())


def test_four_bit_packing_hides_parameters_from_numel(tmp_path):
    model = load(save_tiny(tmp_path, "llama"), 4)
    assert sum(p.numel() for p in model.parameters()) < count_parameters(model).total  # trap 7
    weight = next(iter(quantized_layers(model).values())).weight
    assert true_numel(weight) == 2 * weight.numel()


def relative_error(weight, original):
    return float((weight.float() - original.float()).norm() / original.float().norm())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_dequantized_weights_are_near_the_original_also_after_an_evaluation(tmp_path, family):
    """Trap 1: without the guard bitsandbytes repacks a weight at the first evaluation on CPUs with AVX512-BF16."""
    model = load(save_tiny(tmp_path, family), 4)
    original = dict(load(tmp_path, 32).named_parameters())
    with torch.no_grad():
        model.eval()(torch.arange(20)[None])
    for name, layer in quantized_layers(model).items():
        dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        wanted = original[f"{name}.weight"]
        if family == "gpt2":  # trap 2: Conv1D stores in × out
            wanted = wanted.T
        assert relative_error(dense, wanted) < 0.15


@pytest.mark.skipif(not HAS_AVX512BF16, reason="only CPUs with AVX512-BF16 repack")
def test_the_guard_against_repacking_is_needed(tmp_path):
    model = load(save_tiny(tmp_path, "llama"), 4)
    layer = next(iter(quantized_layers(model).values()))
    before = layer.weight.data.clone()
    layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model.eval()(torch.arange(20)[None])
    assert layer.weight.data.shape != before.shape or not torch.equal(layer.weight.data, before)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_random_weights_equal_the_saved_and_reloaded_ones(tmp_path, family, bits):
    """A random base is built by other code than a pretrained one; both must give the same model."""
    config = FAMILIES[family]()
    config.save_pretrained(tmp_path / "shape")
    random = lambda b: load_base(  # noqa: E731
        BaseConfig(model=str(tmp_path / "shape" / "config.json"), weights="random", bits=b), CPU, seed=3
    )
    random(32).save_pretrained(tmp_path / "saved")
    shutil.copy(save_tiny(tmp_path / "tok", family) / "tokenizer.json", tmp_path / "saved")
    reloaded, built = load(tmp_path / "saved", bits).eval(), random(bits)
    ids = torch.arange(24)[None] % 250
    with torch.no_grad():
        ours, theirs = built(ids).logits, reloaded(ids).logits
    assert torch.equal(ours, theirs)
    assert float(ours.float().std()) > 0.01
    assert {n: (p.dtype, p.shape) for n, p in built.named_parameters()} == {
        n: (p.dtype, p.shape) for n, p in reloaded.named_parameters()
    }


def test_random_weights_depend_on_the_seed_only():
    def build(seed):
        model = load_base(BaseConfig(model="pythia-70m", weights="random", bits=16), CPU, seed)
        return model.gpt_neox.layers[0].attention.dense.weight

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident bytes are read from /proc")
def test_building_random_weights_returns_the_sixteen_bit_layers(tmp_path):
    """Freed layers must not stay with the process: at 4 bits it may grow by little more than the 4-bit model."""
    GPT2Config(n_embd=1024, n_head=16, n_layer=12, vocab_size=512, n_positions=64).to_json_file(
        tmp_path / "config.json"
    )
    before_bytes = resident_bytes()
    model = load_base(BaseConfig(model=str(tmp_path / "config.json"), weights="random"), CPU)
    grown_bytes = resident_bytes() - before_bytes
    held_bytes = sum(p.nbytes for p in model.parameters())
    assert count_parameters(model).total > 150e6  # 300 MB in 16 bits
    assert grown_bytes < 1.3 * held_bytes + 40e6


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_fp4_and_single_quantization_are_honoured(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    state = next(iter(quantized_layers(load(folder, 4)).values())).weight.quant_state
    other = next(
        iter(quantized_layers(load(folder, 4, quant_type="fp4", double_quant=False)).values())
    ).weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert (other.quant_type, other.nested) == ("fp4", False)


def test_full_fine_tuning_trains_everything(tmp_path):
    count = count_parameters(load(save_tiny(tmp_path, "gpt2"), 32, full=True))
    assert count.trainable == count.total


def test_positions_and_dtype(tmp_path):
    assert max_positions(FAMILIES["gpt2"]()) == 128
    assert compute_dtype(BaseConfig(bits=32), CPU) == torch.float32
    assert compute_dtype(BaseConfig(bits=4), CPU) == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_asked_for_and_absent_is_an_error_and_auto_is_the_cpu():
    with pytest.raises(UserError, match="device = 'cuda'"):
        resolve_device("cuda")
    assert resolve_device("auto") == CPU


def test_a_hub_name_without_a_hub_is_answered_within_ten_seconds(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    start_s = time.monotonic()
    with pytest.raises(UserError, match="weights=random"):
        load_base(BaseConfig(model="nobody/nothing"), CPU)
    assert time.monotonic() - start_s < 10


def test_a_model_that_is_no_possible_name_is_an_error():
    with pytest.raises(UserError, match="model = "):
        load_base(BaseConfig(model="no/such/folder/here"), CPU)


def test_a_folder_without_anything_reports_all_faults(tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, 4)
    assert len(caught.value.faults) == 3


def test_pickled_weights_are_refused(tmp_path):
    folder = save_tiny(tmp_path, "gpt2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load(folder, 4)


@pytest.mark.parametrize(
    "damage", ["truncated", "not safetensors", "bad config", "unknown type", "a list", "wrong type", "wrong heads"]
)
def test_damaged_folders_are_one_clear_error(tmp_path, damage):
    folder = save_tiny(tmp_path, "llama")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "not safetensors":
        weights.write_text("hello")
    elif damage == "bad config":
        config.write_text("{")
    elif damage == "unknown type":
        config.write_text(json.dumps({"model_type": "nonesuch"}))
    elif damage == "a list":
        config.write_text("[]")
    elif damage == "wrong type":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": "many"}))
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_attention_heads": 0}))
    with pytest.raises(UserError, match="model = "):
        load(folder, 4)


def test_a_model_that_generates_no_text_is_refused(tmp_path):
    folder = save_tiny(tmp_path, "llama")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match="generates no text"):
        load(folder, 4)


def test_the_tokenizer_is_the_models_or_the_one_named(tmp_path):
    folder = save_tiny(tmp_path / "a", "gpt2")
    assert len(load_tokenizer(BaseConfig(model=str(folder)))) == 257
    assert len(load_tokenizer(BaseConfig(model="gpt2", weights="random", tokenizer=str(folder)))) == 257
    assert load_tokenizer(BaseConfig(model="gpt2", weights="random")).get_vocab()  # the demo's
    with pytest.raises(UserError, match="tokenizer = "):
        load_tokenizer(BaseConfig(model=str(folder), tokenizer=str(tmp_path)))


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="it is installed")
def test_a_tokenizer_that_needs_a_package_says_which(tmp_path):
    folder = save_tiny(tmp_path, "gpt2")
    (folder / "tokenizer.json").unlink()
    for name in ("vocab.json", "source.spm", "target.spm"):
        (folder / name).write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    with pytest.raises(UserError, match="pip install sentencepiece"):
        load_tokenizer(BaseConfig(model=str(folder)))


def test_the_hash_follows_the_content_and_not_the_place(tmp_path):
    first, second = save_tiny(tmp_path / "a", "gpt2"), save_tiny(tmp_path / "b", "gpt2")
    digest = lambda folder: hash_base(BaseConfig(model=str(folder)), 0)  # noqa: E731
    assert digest(first) == digest(second)
    content = bytearray((second / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (second / "model.safetensors").write_bytes(content)
    assert digest(first) != digest(second)


def test_the_hash_of_random_weights_follows_the_seed():
    config = BaseConfig(model="gpt2", weights="random")
    assert hash_base(config, 0) == hash_base(config, 0) != hash_base(config, 1)


def old_hash(folder):
    """As it was: of every safetensors file in the folder."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return f"sha256:{digest.hexdigest()}"


@pytest.mark.parametrize("limit", ["1GB", "50KB"])
def test_the_hash_is_of_the_files_that_loading_reads(tmp_path, limit):
    """In one file and in several: weights in another form beside them change nothing, as none were there before."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size=limit)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (limit == "50KB")
    config = BaseConfig(model=str(tmp_path))
    before = hash_base(config, 0)
    assert before == old_hash(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same again")
    assert hash_base(config, 0) == before != old_hash(tmp_path)


def random_base(device, bits):
    config = BaseConfig(model="gpt2", weights="random", bits=bits)
    with synthetic._code_tables_kept():
        return synthetic.build_random(FAMILIES["llama"](), config, device, 0, torch.bfloat16)


def assert_quantized(model, device):
    layers = quantized_layers(model)
    assert layers
    for layer in layers.values():
        assert (layer.weight.device.type, layer.weight.requires_grad) == (device.type, False)
        if isinstance(layer, Linear4bit):
            assert layer.weight.dtype == torch.uint8
            assert layer.weight.quant_state.absmax.device.type == device.type
        else:
            assert layer.weight.dtype == layer.weight.CB.dtype == torch.int8
            assert layer.weight.SCB.device.type == device.type
            assert layer.weight.SCB.shape == (layer.out_features,)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_random_weights_are_quantized_on_whatever_device(device, bits):
    """`meta` goes the way of every device that is not a CPU: from there bitsandbytes' `to` left 8-bit weights in 16."""
    assert_quantized(random_base(torch.device(device), bits), torch.device(device))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_random_weights_on_a_gpu_are_those_of_16_bits_rounded(bits):
    """Only a GPU's kernels quantize there."""
    device = torch.device("cuda", 0)
    quantized, plain = random_base(device, bits), random_base(device, 16)
    assert_quantized(quantized, device)
    for name, layer in quantized_layers(quantized).items():
        weight_NK = plain.get_submodule(name).weight.float()
        error = (dense_weight(layer).float() - weight_NK).norm() / weight_NK.norm()
        assert error < {4: 0.15, 8: 0.02}[bits]


class Arrivals(TorchDispatchMode):
    """Notes the shape of all that is copied from the host to `meta`, which stands for a GPU."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu"
        if copied and found.device.type == "meta":
            self.shapes.append(tuple(found.shape))
        return found


def untied(family="llama"):
    config = FAMILIES[family]()
    config.tie_word_embeddings = False
    return config


@pytest.mark.parametrize("bits", [4, 16])
def test_an_embedding_that_lives_on_the_host_never_comes_to_the_device(tmp_path, bits, monkeypatch):
    """It was loaded with all the rest, and moved away once everything was there: loading took more than the step."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads would not be seen
    model = GENERATION.model.transformers_class.from_config(untied())
    model.save_pretrained(tmp_path)
    shutil.copy(save_tiny(tmp_path / "tok", "llama") / "tokenizer.json", tmp_path)
    config = BaseConfig(model=str(tmp_path), bits=bits)
    architecture = source.load_model_config(config)
    with Arrivals() as arrivals:
        loaded = _load_pretrained(architecture, config, META, torch.bfloat16, 0, "model.embed_tokens.weight")
    table, shape = loaded.get_input_embeddings(), tuple(model.get_input_embeddings().weight.shape)
    assert arrivals.shapes.count(shape) == 1  # the head
    assert len(arrivals.shapes) >= 20
    assert torch.equal(table.on_host, model.get_input_embeddings().weight.to(torch.bfloat16))
    assert table.on_host.device == CPU
    assert {p.device.type for p in loaded.parameters()} == {"meta"}
    assert not hasattr(loaded, "_hf_hook")  # which would bring it over for each lookup
    assert "forward" not in vars(table)


def test_random_weights_on_the_host_leave_the_device_before_anything_else_comes():
    """They are drawn on the device, so that they are the same wherever they live."""
    model = _structure(untied(), GENERATION.model).to(torch.bfloat16)
    originals = {name: m for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    n_bytes = model.get_input_embeddings().weight.nbytes
    tracker = MemoryTracker("meta", block_bytes=1)
    with tracker:
        synthetic._materialize_all(model, originals, torch.bfloat16, META, 0, "model.embed_tokens.weight")
    live, beside = 0, []
    for event in tracker.events:
        live += event.change_bytes
        if event.change_bytes == n_bytes:
            beside.append(live - n_bytes)
    assert len(beside) == 2  # the embedding, the head
    assert beside[0] == 0
    assert live == sum(p.nbytes for p in model.parameters()) - n_bytes + 2  # a stand-in of one number
    assert isinstance(model.get_input_embeddings(), HostEmbedding)


def test_random_weights_are_the_same_wherever_the_embedding_lives():
    config = BaseConfig(model="none", weights="random", bits=16)
    here, there = (
        synthetic.build_random(untied(), config, CPU, 7, torch.bfloat16, on_host)
        for on_host in (None, "model.embed_tokens.weight")
    )
    assert torch.equal(here.get_input_embeddings().weight, there.get_input_embeddings().on_host)
    assert torch.equal(here.lm_head.weight, there.lm_head.weight)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(here(ids).logits, there(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_may_live_on_the_host_where_the_head_has_another_weight(family):
    own, apart = FAMILIES[family](), untied(family)
    weight = host_weight(_structure(own, GENERATION.model))
    assert (weight is None) == own.tie_word_embeddings
    weight = host_weight(_structure(apart, GENERATION.model))
    assert _structure(apart, GENERATION.model).get_parameter(weight).shape[0] == own.vocab_size


def test_everything_is_placed_on_the_device_but_the_embedding():
    cuda = torch.device("cuda", 0)
    assert placement(cuda) == {"": "cuda:0"}
    assert placement(cuda, "model.embed_tokens.weight") == {"": "cuda:0", "model.embed_tokens.weight": CPU}


@pytest.mark.parametrize("full", [False, True])
def test_a_model_is_loaded_with_the_embedding_on_the_host_where_it_is_asked_and_can_be(full):
    config = BaseConfig(model="none", weights="random", bits=16, full=full)
    for architecture, expected in ((untied(), not full), (FAMILIES["gpt2"](), False)):
        model = load_base(config, META, architecture=architecture, embedding_on_host=True)
        assert isinstance(model.get_input_embeddings(), HostEmbedding) is expected
    on_cpu = load_base(config, CPU, architecture=untied(), embedding_on_host=True)
    assert not isinstance(on_cpu.get_input_embeddings(), HostEmbedding)
