"""Tiny random models of every supported family, for all test modules: `from families import tiny_model`.

Each has 2 layers, hidden size 64, 320 tokens, 128 positions and no dropout; the features of every linear layer are
multiples of 64. Token ids 0-255 are bytes, 256 is `<|endoftext|>`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)  # waking a second thread costs a tiny model 50 times what it saves where cores are shared

VOCAB, POSITIONS, HIDDEN, LAYERS = 320, 128, 64, 2
EOS, EOS_ID = "<|endoftext|>", 256
WEIGHT_STD, VECTOR_STD = 0.15, 0.1

_ANY = {"vocab_size": VOCAB, "bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "pad_token_id": None}
_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "max_position_embeddings": POSITIONS}
_WHOLE = {"num_attention_heads": 4, "intermediate_size": 256}  # heads of 16
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 128}
_MULTI_QUERY = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 128}


def _rope(theta: float = 10_000.0, partial: float | None = None) -> dict[str, Any]:
    part = {} if partial is None else {"partial_rotary_factor": partial}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **part}}


_FIELDS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": POSITIONS,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"), 0.0),
    },
    "llama": {**_SIZES, **_GROUPED, **_rope()},
    "mistral": {**_SIZES, **_GROUPED, **_rope(), "sliding_window": 32},
    "qwen2": {**_SIZES, **_GROUPED, **_rope(1e6), "tie_word_embeddings": True},
    "qwen3": {**_SIZES, **_GROUPED, **_rope(1e6), "tie_word_embeddings": True},
    "gemma": {**_SIZES, **_MULTI_QUERY, **_rope()},
    "gemma2": {**_SIZES, **_GROUPED, **_rope(), "query_pre_attn_scalar": 32, "sliding_window": 16},
    "opt": {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "ffn_dim": 256,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "dropout": 0.0,
    },
    "gpt_neox": {**_SIZES, **_WHOLE, **_rope(partial=0.25), "classifier_dropout": 0.0},
    "phi": {**_SIZES, **_WHOLE, **_rope(partial=0.5)},
}


def _config(family: str) -> PretrainedConfig:
    return AutoConfig.for_model(family, **_ANY, **_FIELDS[family])


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {f: functools.partial(_config, f) for f in _FIELDS}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh model in eval mode; one seed draws the same weights in every dtype, and leaves the global state alone.

    Matrices are drawn wide enough that logits differ, and biases and norms are off their neutral values.
    """
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():  # a tied one comes once
            noise = torch.randn(weight.shape, generator=draw)
            weight.copy_(noise * WEIGHT_STD if weight.ndim > 1 else weight + noise * VECTOR_STD)
    return model.eval()


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of one token a byte, and `<|endoftext|>` as bos and eos; it has no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=EOS, eos_token=EOS, model_max_length=POSITIONS)


def save_tiny(folder: Path | str, family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model folder: config.json, safetensors and tokenizer; gives the folder."""
    tiny_model(family, seed, dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
