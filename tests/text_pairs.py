"""Tiny random encoder-decoders with their tokenizers, and pairs of texts: `from text_pairs import save_base`.

Each has 2 layers in either stack, hidden size 64, 320 tokens and no dropout. Token ids 0-255 are bytes; 256 is `<s>`,
257 `</s>`, 258 `<pad>`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedTokenizerFast

WEIGHT_STD = 0.15
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
_T5: dict[str, Any] = {
    "vocab_size": 320,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "decoder_start_token_id": PAD_ID,
    "dropout_rate": 0.0,
}
_BART: dict[str, Any] = {
    "vocab_size": 320,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_position_embeddings": 128,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # by name: the model type and its fields
    "t5": ("t5", _T5),
    "t5-gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),  # as T5 1.1
    "bart": ("bart", {**_BART, "decoder_start_token_id": EOS_ID, "forced_eos_token_id": EOS_ID}),
    "marian": (
        "marian",
        {**_BART, "decoder_start_token_id": PAD_ID, "decoder_vocab_size": 320, "forced_eos_token_id": EOS_ID},
    ),
}


def architecture(kind: str) -> PretrainedConfig:
    model_type, fields = KINDS[kind]
    return AutoConfig.for_model(model_type, **fields)


@functools.cache
def pair_tokenizer(kind: str = "t5") -> PreTrainedTokenizerFast:
    """One token a byte and `</s>` behind each text, for BART `<s>` before it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>", "<pad>"])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if kind == "bart" else "$A </s>", special_tokens=[("<s>", BOS_ID), ("</s>", EOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


def tiny_model(kind: str, seed: int = 0) -> Any:
    """A fresh model in eval mode; biases, norms and the bias of its logits are off their neutral values."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForSeq2SeqLM.from_config(architecture(kind))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_positions" in name and kind == "marian":  # sines, which its files do not hold
                continue
            noise = torch.randn(weight.shape, generator=draw)
            weight.copy_(noise * WEIGHT_STD if weight.ndim > 1 else weight + noise * 0.1)
        if "final_logits_bias" in dict(model.named_buffers()):
            model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=draw) * 0.1)
    return model.eval()


def save_base(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a model folder; gives the folder."""
    tiny_model(kind, seed).save_pretrained(folder)
    pair_tokenizer(kind).save_pretrained(folder)
    return Path(folder)


ROWS = [{"source": f"say {i}", "target": "ab" if i % 3 else "cd"} for i in range(24)]


def save_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
