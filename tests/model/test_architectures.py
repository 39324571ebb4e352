import json
import subprocess
import sys
from functools import reduce

import pytest
import torch
from families import EOS, EOS_ID, FAMILIES, VOCAB, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kit.errors import UserError
from qlora_kit.model import architectures
from qlora_kit.model.architectures import ALIASES, ARCHITECTURES, config_from, named_config

# What the publishers' checkpoints hold, tied weights once. opt-66b: no published exact figure at hand.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
}

# What the count cannot see: the shape of attention, norms and positions, as the publishers' config.json say.
SPOT_CHECKS = {
    "gpt2-xl": {"n_head": 25, "n_positions": 1024, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    "pythia-1b": {"num_attention_heads": 8, "use_parallel_residual": True, "layer_norm_eps": 1e-5, "eos_token_id": 0,
                  "rope_parameters.partial_rotary_factor": 0.25, "hidden_act": "gelu"},
    "pythia-12b": {"vocab_size": 50688, "num_attention_heads": 40},
    "opt-350m": {"num_attention_heads": 16, "do_layer_norm_before": False, "activation_function": "relu"},
    "opt-66b": {"num_attention_heads": 72, "do_layer_norm_before": True, "pad_token_id": 1},
    "llama-2-7b": {"num_attention_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    "llama-3-70b": {"num_attention_heads": 64, "head_dim": 128, "rope_parameters.rope_theta": 500_000.0},
    "llama-3.1-8b": {"rope_parameters.rope_type": "llama3", "rope_parameters.factor": 8.0,
                     "max_position_embeddings": 131_072, "tie_word_embeddings": False},
    "llama-3.2-1b": {"head_dim": 64, "rope_parameters.rope_type": "llama3", "rope_parameters.factor": 32.0,
                     "rope_parameters.original_max_position_embeddings": 8192, "max_position_embeddings": 131072},
    "tinyllama-1.1b": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    "mistral-7b": {"sliding_window": 4096, "max_position_embeddings": 32768, "rope_parameters.rope_theta": 10_000.0},
    "qwen2.5-0.5b": {"num_attention_heads": 14, "rms_norm_eps": 1e-6, "rope_parameters.rope_theta": 1_000_000.0},
    "qwen2.5-72b": {"rms_norm_eps": 1e-5, "vocab_size": 152064, "sliding_window": None, "eos_token_id": 151643},
    "qwen3-4b": {"head_dim": 128, "num_attention_heads": 32, "max_position_embeddings": 40960, "eos_token_id": 151645},
    "gemma-2b": {"num_attention_heads": 8, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6},
    "gemma-2-27b": {"head_dim": 128, "query_pre_attn_scalar": 144, "sliding_window": 4096,
                    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "phi-2": {"rope_parameters.partial_rotary_factor": 0.4, "resid_pdrop": 0.1, "hidden_act": "gelu_new"},
    "phi-1.5": {"rope_parameters.partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "num_attention_heads": 32},
}  # fmt: skip


def parameters(config, layers):
    """How many parameters the model has with so many layers."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(weight.numel() for weight in model.parameters())


def extrapolated(name):
    """The count of the whole model from its first two layers: all its layers are alike."""
    config = named_config(name)
    layers = config.num_hidden_layers
    two, one = parameters(config, 2), parameters(config, 1)
    return one + (layers - 1) * (two - one)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    assert extrapolated(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "gemma-2-2b"])
def test_extrapolating_from_two_layers_is_exact(name):
    config = named_config(name)
    assert parameters(config, config.num_hidden_layers) == extrapolated(name)


def test_every_architecture_is_counted():
    assert set(ARCHITECTURES) - set(PUBLISHED) - set(ALIASES) == {"opt-66b"}
    assert extrapolated("opt-66b") == pytest.approx(66e9, rel=0.01)


@pytest.mark.parametrize("name", SPOT_CHECKS)
def test_fields_beyond_the_count(name):
    config = named_config(name).to_dict()
    found = {key: reduce(lambda node, part: node[part], key.split("."), config) for key in SPOT_CHECKS[name]}
    assert found == SPOT_CHECKS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_special_tokens_are_in_the_vocabulary(name):
    config = named_config(name)
    ids = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    assert all(i is None or 0 <= i < config.vocab_size for i in ids)
    assert config.use_cache
    assert config.hidden_size % config.num_attention_heads == 0


def test_names_in_any_case_and_aliases():
    assert named_config("Llama-2-7B").to_dict() == named_config("llama-2-7b").to_dict()
    assert config_from("GPT2").model_type == "gpt2"
    assert named_config("pythia").to_dict() == named_config("pythia-160m").to_dict()
    assert named_config("opt").to_dict() == named_config("opt-125m").to_dict()


def test_configs_are_not_shared():
    first = named_config("llama-3.2-1b")
    first.rope_parameters["factor"] = 1.0
    first.num_hidden_layers = 1
    again = named_config("llama-3.2-1b")
    assert again.rope_parameters["factor"] == 32.0
    assert again.num_hidden_layers == 16


@pytest.mark.parametrize("find", [named_config, config_from])
def test_unknown_name_says_the_nearest(find):
    with pytest.raises(UserError) as caught:
        find("meta-llama/Llama-3-8B-hf")
    (fault,) = caught.value.faults
    assert fault.setting == "model"
    assert fault.value == "meta-llama/Llama-3-8B-hf"
    assert "Did you mean llama-3-8b" in fault.remedy
    assert all(name in fault.remedy for name in ARCHITECTURES)


def test_unlike_any_name_lists_them_without_a_guess():
    with pytest.raises(UserError, match="Known: gpt2, gpt2-medium") as caught:
        named_config("zzzz")
    assert "Did you mean" not in str(caught.value)


def test_config_from_a_file_and_a_folder(tmp_path):
    named_config("qwen3-0.6b").save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "mine.json")
    from_file = config_from(str(tmp_path / "mine.json"))
    (tmp_path / "mine.json").rename(tmp_path / "config.json")
    from_folder = config_from(str(tmp_path))
    assert from_file.model_type == "qwen3"
    assert from_file.to_dict() == from_folder.to_dict()
    assert parameters(from_folder, 2) == parameters(named_config("qwen3-0.6b"), 2)


def test_config_written_before_transformers_5(tmp_path):
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    rope = config_from(str(tmp_path)).rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (5e5, "linear", 2.0)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"model_type": "opt", "vocab_size": 100, "pad_token_id": 300}, (2, 2, None)),
        ({"model_type": "gpt2", "vocab_size": 300}, (None, None, None)),
        ({"model_type": "llama", "pad_token_id": -1, "eos_token_id": [2, 3]}, (1, [2, 3], None)),
        ({"model_type": "llama", "vocab_size": 10, "eos_token_id": [2, 30]}, (1, None, None)),
    ],
)
def test_special_tokens_outside_a_small_vocabulary_are_dropped(fields, kept, tmp_path, caplog):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = config_from(str(tmp_path))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == kept
    assert not caplog.records
    parameters(config, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        (b"\xff\xfe\x00", "is not text"),
        ("[1]", "has model_type None"),
        ("{}", "has model_type None"),
        ('{"model_type": ["llama"]}', r"has model_type \['llama'\]"),
        ('{"model_type": "nope"}', "has model_type 'nope'"),
        ('{"model_type": "nope", "auto_map": {"AutoConfig": "some--repo.Class"}}', "has model_type 'nope'"),
        ('{"model_type": "vit"}', "no language model"),
        ('{"model_type": "gpt2", "n_embd": "wide"}', "n_embd.*expected int"),
        ('{"model_type": "llama", "hidden_size": 65, "num_attention_heads": 4}', "not a multiple"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "is not a valid configuration"),
        ('{"model_type": "llama", "rope_scaling": {"type": "linear"}}', "is not a valid configuration"),
    ],
)
def test_bad_files_are_the_users_to_mend(text, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as caught:
        config_from(str(tmp_path))
    (fault,) = caught.value.faults
    assert (fault.setting, fault.value) == ("model", str(tmp_path))
    assert fault.remedy


@pytest.mark.parametrize("where", ["nowhere.json", "nowhere", "."])
def test_missing_file(where, tmp_path):
    with pytest.raises(UserError, match="nor a folder with one"):
        config_from(str(tmp_path / where))


def test_unreadable_file():
    with pytest.raises(UserError, match="cannot be read"):
        config_from("x" * 5000)


def test_importing_is_light():
    code = f"import {architectures.__name__}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The tiny models that every test module uses


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model_is_seeded_and_varied(family):
    state = torch.get_rng_state()
    model, again, other = tiny_model(family), tiny_model(family), tiny_model(family, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    ids = torch.arange(2 * 40).view(2, 40)
    with torch.no_grad():
        logits, same, differing = (m(ids).logits for m in (model, again, other))
    assert logits.shape == (2, 40, VOCAB)
    assert torch.equal(logits, same)
    assert (logits - differing).abs().mean() > 0.3
    assert logits.std(dim=-1).min() > 0.3
    assert logits.std(dim=1).min() > 0.05  # every token's logit depends on what came before
    tied = model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_linears_fit_nf4_blocks(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head:
            assert all(size % 64 == 0 for size in module.weight.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_tiny_model_loads(family, tmp_path):
    folder = save_tiny(tmp_path / family, family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Ünïcode, tabs\tand\nlines 123"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == (EOS, EOS_ID, 257)
    assert tokenizer(text + EOS).input_ids == [*ids, EOS_ID]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(torch.tensor([ids])).logits, tiny_model(family)(torch.tensor([ids])).logits)
    assert config_from(str(folder)).to_dict() == loaded.config.to_dict() | {"_name_or_path": ""}
