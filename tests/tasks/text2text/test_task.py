"""Rows of sources and targets: encoded as the tokenizer does it, padded, scored and answered whatever the batches."""

from __future__ import annotations

import math

import pytest
import torch
from data_tokenizers import byte_level
from families import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from text_pairs import BOS_ID, EOS_ID, KINDS, PAD_ID, pair_tokenizer, tiny_model

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.tasks.decoding import undisturbed
from qlora_kit.tasks.task import Asked
from qlora_kit.tasks.text2text.metrics import text_metrics
from qlora_kit.tasks.text2text.read import SourceTarget
from qlora_kit.tasks.text2text.task import (
    TASK,
    PairCollator,
    generate,
    greedy_settings,
    target_ids,
)

SEQ_LEN = 32


def example(source, target="b"):
    return SourceTarget(source, target, "a.jsonl:1")


def rows(examples, tokenizer=None, seq_len=SEQ_LEN, prefix=None):
    config = RunConfig(base=BaseConfig(source_prefix=prefix))
    return TASK.encode(config, examples, tokenizer or pair_tokenizer(), seq_len, "data").rows


def test_tokens_are_the_tokenizers_own():
    (row,) = rows([example("ab", "cd")])
    assert row.input_ids == pair_tokenizer()("ab")["input_ids"] == [*b"ab"[:0], *row.input_ids[:2], EOS_ID]
    assert row.labels == pair_tokenizer()(text_target="cd")["input_ids"]
    (row,) = rows([example("ab", "cd")], pair_tokenizer("bart"))
    assert (row.labels[0], row.labels[-1]) == (BOS_ID, EOS_ID)


def test_sources_stand_behind_the_prefix_and_targets_do_not():
    (plain,), (prefixed,) = rows([example("go: a", "b")]), rows([example("a", "b")], prefix="go: ")
    assert prefixed.input_ids == plain.input_ids
    assert prefixed.labels == plain.labels


def test_a_tokenizer_that_ends_nothing_gets_its_targets_ended():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("ab")["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert target_ids("ab", tokenizer, 9) == ([*ids, tokenizer.eos_token_id], 3)


def test_targets_are_encoded_in_the_mode_for_targets():
    """Marian's tokenizer has another vocabulary for targets, which `text_target` switches to."""

    class TwoModes(type(pair_tokenizer())):
        def _switch_to_target_mode(self):
            self.mode = "target"

        def _switch_to_input_mode(self):
            self.mode = "source"

        def _encode_plus(self, text, **kwargs):
            return super()._encode_plus(text.upper() if self.mode == "target" else text, **kwargs)

    tokenizer = TwoModes(tokenizer_object=pair_tokenizer().backend_tokenizer, eos_token="</s>", pad_token="<pad>")
    (row,) = rows([example("ab", "cd")], tokenizer)
    assert tokenizer.decode(row.input_ids) == "ab</s>"
    assert tokenizer.decode(row.labels) == "CD</s>"


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=12), st.integers(2, 10))
def test_both_are_cut_and_stay_ended(source, target, seq_len):
    for kind in ("t5", "bart"):
        tokenizer = pair_tokenizer(kind)
        (row,) = rows([example(source, target)], tokenizer, max(seq_len, 3))
        most = max(seq_len, 3)
        for ids, text, full, cut in (
            (row.input_ids, source, row.full_tokens, row.truncated),
            (row.labels, target, row.full_target_tokens, row.target_truncated),
        ):
            whole = tokenizer(text)["input_ids"]
            assert full == len(whole)
            assert cut == (len(whole) > most)
            assert ids == ([*whole[: most - 1], EOS_ID] if cut else whole)


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no end-of-text token"):
        rows([example("a")], tokenizer)


def test_batches_are_padded_on_the_right():
    collate = PairCollator(PAD_ID, SEQ_LEN)
    batch = collate(rows([example("abcdefghij", "k"), example("a", "bcd")]))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 16),
        "attention_mask": (2, 16),
        "labels": (2, 8),
    }
    assert batch["attention_mask"].sum(1).tolist() == [11, 2]
    assert batch["input_ids"][1, 2:].eq(PAD_ID).all()
    assert batch["labels"].ne(-100).sum(1).tolist() == [2, 4]
    asked = TASK.encode_unanswered([SourceTarget("a", None, "")], pair_tokenizer(), SEQ_LEN, BaseConfig())
    assert "labels" not in collate(asked.rows)
    assert PairCollator(PAD_ID, 5)(rows([example("a" * 9, "b" * 9)], seq_len=5))["labels"].shape == (1, 5)


EXAMPLES = [example("a" * (1 + 5 * i), "bc" * (1 + i)) for i in range(5)]


def asked(sizes, examples=EXAMPLES, kind="t5"):
    encoded = rows(examples, pair_tokenizer(kind))
    collate, batches, start = PairCollator(PAD_ID, SEQ_LEN), [], 0
    for size in sizes:
        batches.append(collate(encoded[start : start + size]))
        start += size
    return Asked(encoded, batches, pair_tokenizer(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_do_not_depend_on_the_batches(kind):
    model = tiny_model(kind)
    one, other = (TASK.score(model, asked(sizes, kind=kind), BaseConfig()) for sizes in ((5,), (1, 3, 1)))
    assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
    assert one.report == other.report
    total, tokens = 0.0, 0
    for row in asked((), kind=kind).rows:  # transformers' own loss, row by row and without any padding
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        total, tokens = total + float(loss) * len(row.labels), tokens + len(row.labels)
    assert one.metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert one.metrics["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert one.metrics["tokens"] == tokens


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_padded_batch_are_those_of_single_rows(kind):
    model = tiny_model(kind)
    together = [answer["text"] for answer in TASK.answers(model, asked((5,), kind=kind))]
    found = asked((), kind=kind)
    for row, text in zip(found.rows, together, strict=True):
        with torch.no_grad():
            out = model.generate(input_ids=torch.tensor([row.input_ids]), max_new_tokens=SEQ_LEN, do_sample=False)
        assert pair_tokenizer(kind).decode(out[0], skip_special_tokens=True) == text


def test_answers_are_scored_against_targets_as_they_were_given():
    """Not what the tokenizer makes of them: here they are cut, and one has the name of a token that is not said."""
    targets = ["b" * 50, "a</s>b\r\n", "c"]
    examples = [example("a", target) for target in targets]
    model = tiny_model("t5-gated")
    scores = TASK.score(model, asked((3,), examples, "t5-gated"), BaseConfig())
    assert [text["expected"] for text in scores.report["texts"]] == targets
    answers = [text["answer"] for text in scores.report["texts"]]
    assert {name: scores.metrics[name] for name in ("chrf", "rougeL")} == {
        name: value for name, value in text_metrics(answers, targets).items() if name in ("chrf", "rougeL")
    }


OF_ANOTHER_ANSWER = [
    {"do_sample": True, "temperature": 9.0, "top_k": 0},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 2.0},
    {"min_length": 11},
    {"no_repeat_ngram_size": 1},
    {"repetition_penalty": 3.0},
    {"encoder_repetition_penalty": 3.0},
    {"exponential_decay_length_penalty": [1, 9.0]},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"stop_strings": ["a"]},
    {"return_dict_in_generate": True, "output_scores": True},
    {"max_length": 2},
]


@pytest.mark.parametrize("own", OF_ANOTHER_ANSWER, ids=lambda own: next(iter(own)))
def test_answers_are_greedy_whatever_the_model_came_with(own):
    model = tiny_model("t5-gated")
    batch = asked((5,), kind="t5-gated").batches[0]
    with undisturbed(model):
        plain = generate(model, pair_tokenizer(), batch, 12)
        model.generation_config.update(**own)
        assert generate(model, pair_tokenizer(), batch, 12) == plain
    assert all(getattr(model.generation_config, name) == value for name, value in own.items())


def test_tokens_that_end_an_answer_or_are_kept_out_stay_the_models():
    model, tokenizer = tiny_model("t5-gated"), pair_tokenizer()
    batch = asked((1,), kind="t5-gated").batches[0]
    with undisturbed(model):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ids = model.generate(**inputs, max_new_tokens=8)[0].tolist()
        model.generation_config.eos_token_id = [EOS_ID, ids[1]]
        assert generate(model, tokenizer, batch, 8) == [tokenizer.decode(ids[1:2])]
        model.generation_config.update(eos_token_id=EOS_ID, suppress_tokens=[ids[1]])
        assert generate(model, tokenizer, batch, 1) != [tokenizer.decode(ids[1:2])]


def test_settings_for_greedy_answers_are_said():
    model = tiny_model("bart")
    model.generation_config.update(num_beams=4, do_sample=True, eos_token_id=[7], decoder_start_token_id=None)
    assert greedy_settings(model.generation_config, model.config, pair_tokenizer("bart")) == {
        "do_sample": False,
        "num_beams": 1,
        "bos_token_id": BOS_ID,
        "eos_token_id": [7, EOS_ID],
        "pad_token_id": PAD_ID,
        "decoder_start_token_id": EOS_ID,
        "forced_eos_token_id": EOS_ID,
    }


def test_answers_end_where_the_positions_do():
    model = tiny_model("bart")
    with undisturbed(model):
        (text,) = generate(model, pair_tokenizer("bart"), asked((1,), [example("a")], "bart").batches[0], 500)
    assert len(text) < 128


def test_the_audit_tells_of_sources_with_different_targets():
    training = [example("a", "b"), example("a", "c"), example("d", "d")]
    lines = dict(TASK.audit(training, training))
    assert lines == {"sources with different targets": "1", "targets that repeat their source": "1"}
    held_out = dict(TASK.audit([example("a"), example("x")], training))
    assert held_out["sources that training shows too"] == "1"
    encoded = TASK.encode(
        RunConfig(), [example("a" * 40, "b"), example("a", "b" * 50)], pair_tokenizer(), SEQ_LEN, "data"
    )
    assert dict(TASK.length_lines(encoded, SEQ_LEN)) == {
        "tokens of a source: min / median / p95 / max": "2 / 21.5 / 41 / 41",
        "tokens of a target: min / median / p95 / max": "2 / 26.5 / 51 / 51",
        "sources truncated to 32 tokens": "1",
        "targets truncated to 32 tokens": "1",
    }
    assert encoded.report.length_max == 51
