"""Tiny random bases and data of classifiers: `from classifiers import save_base`.

Each base has 2 layers, hidden size 64, 320 tokens and no dropout; its files hold no head, as those of a pretrained one.
Token ids 0-255 are bytes; 256 begins and ends a text (encoders have it on both ends), 257 separates, 258 pads.
"""

from __future__ import annotations

import functools
import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedTokenizerFast

WEIGHT_STD = 0.15
CLS, SEP, PAD = "<cls>", "<sep>", "<pad>"
CLS_ID, SEP_ID, PAD_ID = 256, 257, 258
_NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "seq_classif_dropout"), 0.0
)
_BERT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "pad_token_id": PAD_ID,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": {**_BERT, "max_position_embeddings": 128 + PAD_ID + 1, "type_vocab_size": 1},
    "electra": {**_BERT, "embedding_size": 64},
    "distilbert": {
        "vocab_size": 320,
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 128,
        "max_position_embeddings": 128,
        "pad_token_id": PAD_ID,
    },
}
BOTH: dict[str, dict[str, Any]] = {  # an encoder and a decoder
    "t5": {
        "vocab_size": 320,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "pad_token_id": PAD_ID,
        "eos_token_id": SEP_ID,
        "decoder_start_token_id": PAD_ID,
        "dropout_rate": 0.0,
        "classifier_dropout": 0.0,
    },
    "bart": {
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
        "bos_token_id": CLS_ID,
        "eos_token_id": SEP_ID,
        "decoder_start_token_id": SEP_ID,
        "forced_eos_token_id": None,
    },
}
DECODERS = ("gpt2", "llama", "qwen3")
KINDS = (*ENCODERS, *BOTH, *DECODERS)


def architecture(kind: str) -> PretrainedConfig:
    if kind in FAMILIES:
        return FAMILIES[kind]()
    return AutoConfig.for_model(kind, **{**_NO_DROPOUT, **(ENCODERS | BOTH)[kind]})


@functools.cache
def encoder_tokenizer(types: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, <cls> before and <sep> behind each text; with token types, as BERT's, or without."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([CLS, SEP, PAD])
    raw.post_processor = processors.TemplateProcessing(
        single=f"{CLS}:0 $A:0 {SEP}:0",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1" if types else f"{CLS}:0 $A:0 {SEP}:0 $B:0 {SEP}:0",
        special_tokens=[(CLS, CLS_ID), (SEP, SEP_ID)],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        cls_token=CLS,
        sep_token=SEP,
        pad_token=PAD,
        model_max_length=128,
        model_input_names=inputs,
    )


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return tiny_tokenizer() if kind in DECODERS else encoder_tokenizer(types=kind in ("bert", "electra"))


def save_base(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a model folder without a head for labels; gives the folder."""
    if kind in DECODERS:
        tiny_model(kind, seed).save_pretrained(folder)
    else:
        with torch.random.fork_rng(devices=[]):
            model = AutoModel.from_config(architecture(kind))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=draw)
                weight.copy_(noise * WEIGHT_STD if weight.ndim > 1 else weight + noise * 0.1)
        model.save_pretrained(folder)
    tokenizer_of(kind).save_pretrained(folder)
    return Path(folder)


ROWS = [
    {"text": f"{'good fine' if i % 3 else 'bad awful'} {i}", "label": "yes" if i % 3 else "no"} for i in range(24)
]  # twice as many with the one label
PAIRS = [{"sentence1": f"a{i}", "sentence2": f"a{i}" if i % 2 else "b", "label": i % 2} for i in range(12)]
SEVERAL = [{"text": f"{i}", "label": [name for name, n in (("two", 2), ("three", 3)) if i % n == 0]} for i in range(12)]

_NAMES = (("Ann", "B-person"), ("Bo", "B-person"), ("Oslo", "B-place"), ("Rome", "B-place"))
SENTENCES = [  # every entity of a person has a second word
    {
        "tokens": ["hi", name, *(["Lee"] if tag == "B-person" else []), "!"][: 4 - i % 2],
        "tags": ["O", tag, *(["I-person"] if tag == "B-person" else []), "O"][: 4 - i % 2],
    }
    for i, (name, tag) in enumerate(_NAMES * 6)
]


def save_conll(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write sentences as a CoNLL file; those without tags as a word a line."""
    sentences = [
        "".join(
            f"{word}\t{tag}\n" if tag else f"{word}\n" for word, tag in zip_longest(row["tokens"], row.get("tags", ()))
        )
        for row in rows
    ]
    file.write_text("\n".join(sentences), encoding="utf-8")
    return file


def save_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
