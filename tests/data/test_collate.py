"""Padding is masked by position, and packed examples neither see nor teach one another."""

from dataclasses import fields

import pytest
import torch
from data_tokenizers import byte_level
from families import FAMILIES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data import Collator, Example, encode_set, pack, packed_mask_dtype, prepare_tokenizer
from qlora_kit.data.audit import AuditReport
from qlora_kit.data.encode import Encoded, EncodedSet
from qlora_kit.errors import UserError

PAD = 7
NO_REPORT = AuditReport(**{field.name: 0 for field in fields(AuditReport)})
lengths_lists = st.lists(st.integers(2, 16), min_size=1, max_size=12)


def encoded_set(lengths, seed=0, vocabulary=300):
    """Examples of random tokens, the pad token among them; the second half of each is supervised."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (length,), generator=draw).tolist()
        supervised = [place >= (length + 1) // 2 for place in range(length)]
        rows.append(
            Encoded(
                input_ids=[*ids[:-1], PAD],
                supervised=supervised,
                truncated=False,
                origin=f"f:{number}",
                full_tokens=length,
            )
        )
    return EncodedSet(rows, NO_REPORT)


# ------------------------------------------------------------------------------------------------------- padding


@given(lengths=lengths_lists, multiple=st.sampled_from([None, 8]))
def test_padding_is_masked_by_position(lengths, multiple):
    encoded = encoded_set(lengths)
    batch = Collator(PAD, multiple)([encoded[index] for index in range(len(encoded))])
    length = batch["input_ids"].shape[1]
    assert length == (max(lengths) if multiple is None else -(-max(lengths) // 8) * 8)
    for row, example in enumerate(encoded.rows):
        tokens = len(example.input_ids)
        assert batch["input_ids"][row].tolist() == example.input_ids + [PAD] * (length - tokens)
        assert batch["labels"][row].tolist() == example.labels + [-100] * (length - tokens)
        assert batch["attention_mask"][row].tolist() == [1] * tokens + [0] * (length - tokens)
        assert batch["labels"][row, tokens - 1] == PAD  # its own last token is learned, pad or not
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_end_of_text_is_learned_once_though_padding_is_made_of_it():
    tokenizer = prepare_tokenizer(byte_level())
    examples = [
        Example(prompt="q", completion="a", messages=None, origin="f:1"),
        Example(prompt="q", completion="a longer answer", messages=None, origin="f:2"),
    ]
    encoded = encode_set(examples, tokenizer, seq_len=64, train_on="all")
    labels = Collator(tokenizer.pad_token_id)([encoded[0], encoded[1]])["labels"]
    assert (labels == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1]


def test_rounding_up_stops_at_the_positions_of_the_model():
    features = [encoded_set([11])[0]]
    assert Collator(PAD, 8, max_tokens=13)(features)["input_ids"].shape == (1, 13)
    assert Collator(PAD, 8, max_tokens=40)(features)["input_ids"].shape == (1, 16)


# ------------------------------------------------------------------------------------------------------- packing


@given(lengths=lengths_lists, seq_len=st.integers(16, 40))
def test_packing_keeps_every_example_whole(lengths, seq_len):
    encoded = encoded_set(lengths)
    packed = pack(encoded, seq_len)
    in_rows = [example for row in packed.rows for example in row]
    assert sorted(in_rows, key=encoded.rows.index) == encoded.rows
    assert pack(encoded, seq_len).rows == packed.rows
    assert packed.longest_tokens == max(lengths)
    assert packed.fill == pytest.approx(sum(lengths) / (seq_len * len(packed)))
    for index, row in enumerate(packed.rows):
        item = packed[index]
        assert item["input_ids"] == [token for example in row for token in example.input_ids]
        assert sum(item["segment_lengths"]) == len(item["input_ids"]) == len(item["labels"]) <= seq_len
        starts = [sum(item["segment_lengths"][:number]) for number in range(len(row))]
        assert all(item["labels"][start] == -100 for start in starts)


@given(lengths=lengths_lists)
def test_packing_wastes_less_than_half(lengths):
    packed = pack(encoded_set(lengths), 16)
    assert len(packed) <= 1 or packed.fill > 0.5


@given(lengths=lengths_lists)
@settings(max_examples=30)
def test_packed_mask_is_open_exactly_within_an_example(lengths):
    packed = pack(encoded_set(lengths), 24)
    features = [packed[index] for index in range(len(packed))]
    batch = Collator(PAD, packed=True)(features)
    rows, length = batch["input_ids"].shape
    assert batch["attention_mask"].shape == (rows, 1, length, length)
    for row, feature in enumerate(features):
        sizes = feature["segment_lengths"] + [length - sum(feature["segment_lengths"])]
        blocks = [torch.ones(size, size, dtype=torch.bool).tril() for size in sizes if size]
        assert torch.equal(batch["attention_mask"][row, 0], torch.block_diag(*blocks).bool())
        assert batch["position_ids"][row].tolist() == [place for size in sizes for place in range(size)]
        assert (batch["labels"][row, sum(feature["segment_lengths"]) :] == -100).all()


def packed_and_alone(family, lengths):
    """The logits of every example, packed with others and on its own."""
    model = tiny_model(family)
    encoded = encoded_set(lengths)
    packed = pack(encoded, 40)
    dtype = packed_mask_dtype(model.config, packed.longest_tokens)
    batch = Collator(PAD, packed=True, mask_dtype=dtype)([packed[index] for index in range(len(packed))])
    del batch["labels"]
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.isfinite(logits).all()  # in the padding too
        for row, examples in enumerate(packed.rows):
            start = 0
            for example in examples:
                end = start + len(example.input_ids)
                yield logits[row, start:end], model(torch.tensor([example.input_ids])).logits[0]
                start = end


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_those_of_each_example_alone(family):
    for together, alone in packed_and_alone(family, [16, 13, 9, 8, 5, 2, 2]):
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradients_are_those_of_the_padded_batch(family):
    model, encoded = tiny_model(family), encoded_set([16, 9, 8, 5, 2])
    packed = pack(encoded, 40)
    dtype = packed_mask_dtype(model.config, packed.longest_tokens)
    batches = [
        Collator(PAD)([encoded[index] for index in range(len(encoded))]),
        Collator(PAD, packed=True, mask_dtype=dtype)([packed[index] for index in range(len(packed))]),
    ]
    gradients, losses = [], []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss  # the mean over the supervised tokens
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 1e-4


def test_packing_that_the_attention_cannot_take_is_refused():
    mistral = tiny_model("mistral").config  # it sees 32 tokens
    assert packed_mask_dtype(mistral, 32) == torch.bool
    with pytest.raises(UserError, match="pack = True") as caught:
        packed_mask_dtype(mistral, 33)
    assert "seq_len=32" in str(caught.value)
    mistral._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_2"):
        packed_mask_dtype(mistral, 8)
