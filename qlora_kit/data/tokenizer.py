"""What a tokenizer must be able to do, and how a text becomes tokens that continue another text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.data.template import PLAIN_TEMPLATE
from qlora_kit.errors import Fault, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TEXT = "The answer is 42."


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, generates: bool = True) -> PreTrainedTokenizerBase:
    """Make `tokenizer` fit for training, in place, and return it.

    A missing pad token becomes the end-of-text token: the vocabulary never grows, and padding is masked by its
    position. A missing chat template becomes the plain one, which `save_pretrained` then writes with the adapter;
    for a model that only reads (not `generates`) there is none, and the end of a text needs no token.

    Raises `UserError` for `tokenizer` if it encodes a probe text to nothing, to unknown tokens, or to tokens that do
    not decode back, and if it has no end-of-text token to learn or to pad with.
    """
    faults = []
    broken = _broken_rule(tokenizer)
    if broken:
        remedy = "Give a folder with the model's tokenizer.json."
        faults.append(Fault("tokenizer", _name(tokenizer), broken, remedy))
    if tokenizer.eos_token_id is None and (generates or tokenizer.pad_token_id is None):
        why = "so the model cannot learn to stop" if generates else "and no padding token"
        rule = f"has no end-of-text token, {why}"
        faults.append(Fault("tokenizer", _name(tokenizer), rule, "Set eos_token in its tokenizer_config.json."))
    if faults:
        raise UserError(faults)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if generates and not tokenizer.chat_template:
        begins_with_bos = tokenizer.bos_token_id is not None and leading_ids(tokenizer)[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins_with_bos else "") + PLAIN_TEMPLATE
    return tokenizer


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or type(tokenizer).__name__


def _broken_rule(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The rule that the tokenizer breaks, or None; some silently load with an empty vocabulary."""
    # as transformers asks itself; such a one (Marian's) decodes targets, which may have none of the probe's letters
    apart = hasattr(tokenizer, "_switch_to_target_mode")
    ids = _probe_ids(tokenizer, apart)
    if not ids:
        return f"encodes {PROBE_TEXT!r} to no tokens: its vocabulary is empty"
    if apart and tokenizer.unk_token_id in ids:
        return None
    if all(token == tokenizer.unk_token_id for token in ids):
        return f"encodes {PROBE_TEXT!r} to unknown tokens only"
    decoded = tokenizer.decode(ids)
    if _bare(decoded) != _bare(PROBE_TEXT):
        return f"decodes {PROBE_TEXT!r} back to {decoded!r}"
    return None


def _probe_ids(tokenizer: PreTrainedTokenizerBase, as_target: bool) -> list[int]:
    if not as_target:
        return token_ids(tokenizer, [PROBE_TEXT])[0]
    ids: list[int] = tokenizer(text_target=PROBE_TEXT, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _bare(text: str) -> str:
    """Without spaces and case, which some tokenizers do not keep."""
    return "".join(text.split()).lower()


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text as it stands at the start of a sequence, without tokens that a tokenizer adds itself."""
    if not texts:
        return []
    batch = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = batch["input_ids"]
    return ids


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before every text by itself: the begin-of-text token, or nothing."""
    bare = token_ids(tokenizer, ["a"])[0]
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    return whole[: starts[0]] if bare and starts else []


def continuation_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text as it goes on after other text.

    Tokenizers of the SentencePiece family put a space before every text they are given, which would come between
    a prompt and its answer. Such a text is tokenized behind an anchor whose tokens are then taken off.
    """
    anchor = _anchor(tokenizer)
    if not anchor:
        return token_ids(tokenizer, texts)
    return _ids_behind(tokenizer, anchor, texts)


def _ids_behind(tokenizer: PreTrainedTokenizerBase, anchor: str, texts: Sequence[str]) -> list[list[int]]:
    anchor_ids = token_ids(tokenizer, [anchor])[0]
    together = token_ids(tokenizer, [anchor + text for text in texts])
    alone = token_ids(tokenizer, texts)  # for a text whose first characters merge with the anchor
    return [
        joined[len(anchor_ids) :] if joined[: len(anchor_ids)] == anchor_ids else single
        for joined, single in zip(together, alone, strict=True)
    ]


def _anchor(tokenizer: PreTrainedTokenizerBase) -> str:
    """The first anchor behind which a text keeps its beginning, with and without a space; none if none is needed."""
    start = token_ids(tokenizer, ["a:"])[0]
    for anchor in ("", "\n", tokenizer.eos_token or ""):
        tails = _ids_behind(tokenizer, anchor, ["b", " b"])
        if [tokenizer.decode(start + tail) for tail in tails] == ["a:b", "a: b"]:
            return anchor
    return ""
