"""What the model is fed: read any common file, lay it out, mark what is learned, cut, pack and batch it."""

from qlora_kit.data.audit import AuditReport
from qlora_kit.data.collate import Collator, packed_mask_dtype, segment_tensors
from qlora_kit.data.columns import Example, Message, prompt_of, prompts_from
from qlora_kit.data.encode import (
    Encoded,
    EncodedSet,
    encode_conversation,
    encode_example,
    encode_prompt,
    encode_set,
    encode_text,
    resolve_seq_len,
)
from qlora_kit.data.load import read_examples, read_prompts, read_rows, split_examples, unread_fields
from qlora_kit.data.pack import PackedSet, pack
from qlora_kit.data.read import Record, files_left_out
from qlora_kit.data.tokenizer import prepare_tokenizer

__all__ = [
    "AuditReport",
    "Collator",
    "Encoded",
    "EncodedSet",
    "Example",
    "Message",
    "PackedSet",
    "Record",
    "encode_conversation",
    "encode_example",
    "encode_prompt",
    "encode_set",
    "encode_text",
    "files_left_out",
    "pack",
    "packed_mask_dtype",
    "prepare_tokenizer",
    "prompt_of",
    "prompts_from",
    "read_examples",
    "read_prompts",
    "read_rows",
    "resolve_seq_len",
    "segment_tensors",
    "split_examples",
    "unread_fields",
]
