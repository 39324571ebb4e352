"""A shape for rehearsals: a Llama of two small layers, as a config.json that `--model` takes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}


def tiny_model() -> str:
    """The file of the shape, in the folder of this phase."""
    file = Path(tempfile.mkdtemp()) / "config.json"
    file.write_text(json.dumps(CONFIG), encoding="utf-8")
    return str(file)
