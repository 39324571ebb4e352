"""Well-known architectures by name, so that planning and benchmarks need no download.

The true shapes of the published checkpoints are declared as data: what a table does not say is the default of the
transformers configuration class. Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import UserError
from qlora_kit.tasks.registry import serves_any_task

# what a configuration class may raise for a field that it cannot use
BAD_CONFIG = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Fields = dict[str, Any]

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _rope(theta: float, **more: object) -> Fields:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def _gpt2(layers: int, hidden: int, heads: int) -> Fields:
    return {"model_type": "gpt2", "n_layer": layers, "n_embd": hidden, "n_head": heads}


def _pythia(layers: int, hidden: int, heads: int, vocab: int = 50304) -> Fields:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **_rope(10_000.0, partial_rotary_factor=0.25),
    }


def _opt(layers: int, hidden: int, heads: int) -> Fields:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
    }


def _gated(model_type: str, layers: int, hidden: int, inner: int, heads: int, kv_heads: int) -> Fields:
    """Size a decoder of the Llama line: gated feed-forward, grouped-query attention, RMS norms, rotary positions."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
    }


_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, **_rope(10_000.0)}
_LLAMA_3 = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    **_rope(500_000.0),
}
_LONG_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_31 = {**_LLAMA_3, "max_position_embeddings": 131072, **_rope(500_000.0, **_LONG_ROPE, factor=8.0)}
_LLAMA_32 = {**_LLAMA_31, "tie_word_embeddings": True, **_rope(500_000.0, **_LONG_ROPE, factor=32.0)}
_MISTRAL = {
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
    **_rope(10_000.0),
}
_QWEN25 = {  # the base models; query, key and value have biases in every qwen2
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    **_rope(1_000_000.0),
}
_QWEN25_LARGE = {**_QWEN25, "vocab_size": 152064, "max_position_embeddings": 131072, "tie_word_embeddings": False}
_QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    **_rope(1_000_000.0),
}
_GEMMA = {"vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192, **_rope(10_000.0)}
_GEMMA_2 = {
    **_GEMMA,
    "sliding_window": 4096,  # in every other layer
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def _phi(layers: int, hidden: int, rotary: float, dropout: float) -> Fields:
    return {
        "model_type": "phi",
        "vocab_size": 51200,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "resid_pdrop": dropout,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        **_rope(10_000.0, partial_rotary_factor=rotary),
    }


_TABLE: dict[str, Fields] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "pythia-6.9b": _pythia(32, 4096, 32, vocab=50432),
    "pythia-12b": _pythia(36, 5120, 40, vocab=50688),
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": {**_opt(24, 1024, 16), "word_embed_proj_dim": 512, "do_layer_norm_before": False},
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "llama-2-7b": _gated("llama", 32, 4096, 11008, 32, 32) | _LLAMA_2,
    "llama-2-13b": _gated("llama", 40, 5120, 13824, 40, 40) | _LLAMA_2,
    "llama-2-70b": _gated("llama", 80, 8192, 28672, 64, 8) | _LLAMA_2,
    "llama-3-8b": _gated("llama", 32, 4096, 14336, 32, 8) | _LLAMA_3,
    "llama-3.1-8b": _gated("llama", 32, 4096, 14336, 32, 8) | _LLAMA_31,
    "llama-3-70b": _gated("llama", 80, 8192, 28672, 64, 8) | _LLAMA_3,
    "llama-3.2-1b": _gated("llama", 16, 2048, 8192, 32, 8) | _LLAMA_32,
    "llama-3.2-3b": _gated("llama", 28, 3072, 8192, 24, 8) | _LLAMA_32,
    "tinyllama-1.1b": _gated("llama", 22, 2048, 5632, 32, 4) | _LLAMA_2 | {"max_position_embeddings": 2048},
    "mistral-7b": _gated("mistral", 32, 4096, 14336, 32, 8) | _MISTRAL,  # v0.1
    "qwen2.5-0.5b": _gated("qwen2", 24, 896, 4864, 14, 2) | _QWEN25,
    "qwen2.5-1.5b": _gated("qwen2", 28, 1536, 8960, 12, 2) | _QWEN25 | {"max_position_embeddings": 131072},
    "qwen2.5-3b": _gated("qwen2", 36, 2048, 11008, 16, 2) | _QWEN25,
    "qwen2.5-7b": _gated("qwen2", 28, 3584, 18944, 28, 4) | _QWEN25_LARGE,
    "qwen2.5-14b": _gated("qwen2", 48, 5120, 13824, 40, 8) | _QWEN25_LARGE | {"rms_norm_eps": 1e-5},
    "qwen2.5-32b": _gated("qwen2", 64, 5120, 27648, 40, 8) | _QWEN25_LARGE | {"rms_norm_eps": 1e-5},
    "qwen2.5-72b": _gated("qwen2", 80, 8192, 29568, 64, 8) | _QWEN25_LARGE | {"rms_norm_eps": 1e-5},
    "qwen3-0.6b": _gated("qwen3", 28, 1024, 3072, 16, 8) | _QWEN3 | {"tie_word_embeddings": True},
    "qwen3-1.7b": _gated("qwen3", 28, 2048, 6144, 16, 8) | _QWEN3 | {"tie_word_embeddings": True},
    "qwen3-4b": _gated("qwen3", 36, 2560, 9728, 32, 8) | _QWEN3 | {"tie_word_embeddings": True},
    "qwen3-8b": _gated("qwen3", 36, 4096, 12288, 32, 8) | _QWEN3,
    "qwen3-14b": _gated("qwen3", 40, 5120, 17408, 40, 8) | _QWEN3,
    "qwen3-32b": _gated("qwen3", 64, 5120, 25600, 64, 8) | _QWEN3,
    "gemma-2b": _gated("gemma", 18, 2048, 16384, 8, 1) | _GEMMA,
    "gemma-7b": _gated("gemma", 28, 3072, 24576, 16, 16) | _GEMMA,
    "gemma-2-2b": _gated("gemma2", 26, 2304, 9216, 8, 4) | _GEMMA_2,
    "gemma-2-9b": _gated("gemma2", 42, 3584, 14336, 16, 8) | _GEMMA_2,
    "gemma-2-27b": _gated("gemma2", 46, 4608, 36864, 32, 16)
    | {**_GEMMA_2, "head_dim": 128, "query_pre_attn_scalar": 144},
    "phi-1.5": _phi(24, 2048, rotary=0.5, dropout=0.0),
    "phi-2": _phi(32, 2560, rotary=0.4, dropout=0.1),
}

ALIASES = {"pythia": "pythia-160m", "opt": "opt-125m"}  # the size of gpt2

ARCHITECTURES: tuple[str, ...] = (*_TABLE, *ALIASES)


def named_config(name: str) -> PretrainedConfig:
    """The configuration of the architecture `name`, in any case; raises `UserError` with the nearest names."""
    key = name.lower()
    if key not in ARCHITECTURES:
        raise UserError.of("model", name, "is not a known architecture", _nearest(name))
    return _built(_TABLE[ALIASES.get(key, key)])


def config_from(model: str) -> PretrainedConfig:
    """The configuration that `model` stands for: a known name, else a `config.json` or a folder holding one.

    Only this machine is read, no code that comes with the model runs, and a special token outside the vocabulary is
    dropped. Raises `UserError` where there is no such file, or it describes no language model.
    """
    if model.lower() in ARCHITECTURES:
        return named_config(model)
    path = Path(model)
    try:
        path = path / "config.json" if path.is_dir() else path
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        rule = "is neither a known architecture, nor a config.json, nor a folder with one"
        raise UserError.of("model", model, rule, _nearest(model)) from None
    except OSError as error:
        raise UserError.of("model", model, f"cannot be read ({error.strerror})", f"Check {path}.") from None
    except UnicodeDecodeError as error:
        raise UserError.of("model", model, f"is not text ({error})", "Give a config.json.") from None
    return _parsed(model, path, text)


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(Path(name).name.lower(), ARCHITECTURES, n=3)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}Known: {', '.join(ARCHITECTURES)}."


def _parsed(model: str, path: Path, text: str) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError.of("model", model, f"is not JSON ({error})", f"Fix {path}.") from None
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or not serves_any_task(kind):
        rule = f"has model_type {kind!r}, for which the installed transformers has no language model"
        raise UserError.of("model", model, rule, "Give one with another model_type, such as llama or gpt2.")
    try:
        return _built(fields)
    except (*BAD_CONFIG, StrictDataclassError) as error:
        what = " ".join(str(error).split())
        raise UserError.of("model", model, f"is not a valid configuration ({what})", f"Fix {path}.") from None


def _built(fields: Fields) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[fields["model_type"]]
    vocab = fields.get("vocab_size", getattr(kind, "vocab_size", None))
    special = {key: fields.get(key, getattr(kind, key, None)) for key in TOKEN_IDS}
    outside = {key: None for key, ids in special.items() if not _within(ids, vocab)}
    return kind.from_dict(copy.deepcopy({**fields, **outside}))  # a config writes into its nested fields


def _within(ids: Any, vocab: Any) -> bool:
    if not isinstance(vocab, int) or ids is None:
        return True  # nothing to compare
    each: Iterable[Any] = ids if isinstance(ids, list) else [ids]
    return all(isinstance(i, int) and 0 <= i < vocab for i in each)
