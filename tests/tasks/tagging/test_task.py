"""Tagged rows: encoded, padded, weighed, scored, answered, audited."""

from __future__ import annotations

import math

import pytest
import torch
from classifiers import CLS_ID, SEP_ID, encoder_tokenizer
from families import tiny_tokenizer
from tokenizers import normalizers

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.tasks.tagging.read import TaggedWords
from qlora_kit.tasks.tagging.task import TASK, tagging_loss
from qlora_kit.tasks.task import Asked

LABELS = ("O", "B-x", "I-x")


def sentence(text, *tags):
    return TaggedWords(tuple(text.split()), tags or None, "a.conll:1")


def dropping_tokenizer():
    """A tokenizer of bytes that drops the space without width."""
    tokenizer = encoder_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    return tokenizer


DROPPING = dropping_tokenizer()


def settings(labels=LABELS):
    return RunConfig(base=BaseConfig(task="token-classification", labels=labels))


def rows(*examples, tokenizer=None, seq_len=128):
    return TASK.encode(settings(), examples, tokenizer or encoder_tokenizer(), seq_len, "data").rows


def test_only_first_pieces_are_supervised():
    (row,) = rows(sentence("ab c", "B-x", "O"))
    assert row.input_ids == encoder_tokenizer()("ab c")["input_ids"]
    assert row.labels == [-100, 1, -100, -100, 0, -100]
    assert (row.input_ids[0], row.input_ids[-1], row.firsts) == (CLS_ID, SEP_ID, [1, 4])


def test_rows_that_are_cut_say_how_many_words_they_lost():
    (row,) = rows(sentence("ab cd ef", "B-x", "O", "I-x"), seq_len=6)
    assert (row.labels, row.lost, row.truncated) == ([-100, 1, -100, -100, 0, -100], 1, True)


def test_what_a_row_learns_in_words_is_of_the_words_that_are_seen():
    example = sentence("ab \u200b cd ef", "B-x", "O", "O", "I-x")
    (row,) = TASK.encode_unanswered([example], DROPPING, 8, settings().base).rows
    assert row.lost == 1
    assert TASK.learned(example, row, str) == "«ab/B-x cd/O»"


def test_sentences_without_anything_to_learn_are_left_out():
    encoded = TASK.encode(settings(), [sentence(""), sentence("a", "O")], encoder_tokenizer(), 9, "data")
    assert (len(encoded), encoded.report.examples, encoded.report.kept, encoded.report.empty) == (1, 2, 1, 1)
    assert len(TASK.encode_unanswered([sentence(""), sentence("a")], encoder_tokenizer(), 9, settings().base)) == 2
    with pytest.raises(UserError, match="has no word within 9 tokens"):
        TASK.encode(settings(), [sentence("")], encoder_tokenizer(), 9, "data")


def test_a_sentence_of_which_nothing_is_seen_counts_where_models_are_scored():
    unseen = sentence("\u200b \u200b", "B-x", "O")  # a tokenizer drops such characters
    empty = TaggedWords((), (), "a.conll:9")
    encoded = TASK.encode_held_out(settings(), [sentence("a", "O"), unseen, empty], DROPPING, 9, "eval_data")
    assert [row.words for row in encoded.rows] == [("a",), unseen.words, ()]
    scores = TASK.score(Scripted(TABLE), asked(2, encoded.rows, TASK.collator(DROPPING, 128)), settings().base)
    assert scores.metrics["examples"] == 3
    assert (scores.report["words"], scores.report["words_without_pieces"]) == (3, 2)
    assert math.isfinite(scores.metrics["loss"])
    assert len(TASK.encode(settings(), [sentence("a", "O"), unseen], DROPPING, 9, "data")) == 1
    with pytest.raises(UserError, match=r"eval_data.*has no word within 9 tokens"):
        TASK.encode_held_out(settings(), [unseen], DROPPING, 9, "eval_data")


def test_a_tag_that_is_not_in_the_map_is_refused():
    with pytest.raises(UserError, match="has the tag 'B-y'"):
        rows(sentence("a", "B-y"))


def test_batches_are_padded_on_the_right():
    collate = TASK.collator(encoder_tokenizer(), 128)
    found = rows(sentence("abcdefgh", "B-x"), sentence("a b", "O", "I-x"))
    batch = collate(found)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "labels"), (2, 10)
    )
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"][1].tolist() == [-100, 0, -100, 2, *[-100] * 6]
    untagged = TASK.encode_unanswered([sentence("a", "O")], encoder_tokenizer(), 9, settings().base).rows
    assert "labels" not in collate(untagged)


def test_the_loss_is_the_mean_over_supervised_tokens():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, -100, 3], [-100, 2, -100]])
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0])
    places = [(0, 0, 0), (0, 2, 3), (1, 1, 2)]
    expected = -sum(float(weights[k]) * float(logits[b, t].double().log_softmax(0)[k]) for b, t, k in places) / 3
    assert float(tagging_loss(logits, labels, 3, weights)) == pytest.approx(expected, rel=1e-6)


def test_balanced_weights_have_the_mean_one_over_words():
    found = TASK.encode(
        settings(), [sentence("a b c", "O", "O", "B-x"), sentence("d", "O")], tiny_tokenizer(), 9, "data"
    )
    weights = TASK.label_weights(found, settings().base)
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 4 / 2, 1.0])


class Scripted(torch.nn.Module):
    """Answers with a table's logits by token; those of padding are far off."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = type("Config", (), {"id2label": dict(enumerate(LABELS)), "num_labels": len(LABELS)})()

    def forward(self, input_ids, attention_mask, **kwargs):
        return type("Output", (), {"logits": self.table[input_ids] + 1e3 * (1 - attention_mask)[..., None]})()


TABLE = torch.randn(320, 3, generator=torch.Generator().manual_seed(2))
SENTENCES = [
    sentence("a bb c", "B-x", "I-x", "O"),
    sentence("d", "O"),
    sentence("e f g h i j k l m", *["B-x", "I-x", "O"] * 3),
    sentence("n o", "O", "B-x"),
]


def asked(size, found, collate):
    return Asked(found, (collate(found[i : i + size]) for i in range(0, len(found), size)), encoder_tokenizer())


@pytest.mark.parametrize("size", [1, 3, 4])
def test_scores_are_plain_counts_whatever_the_batch(size):
    found = rows(*SENTENCES, seq_len=12)  # the third one is cut
    scores = TASK.score(Scripted(TABLE), asked(size, found, TASK.collator(encoder_tokenizer(), 128)), settings().base)
    losses, right, words = [], 0, 0
    for example, row in zip(SENTENCES, found, strict=True):
        for number, tag in enumerate(example.tags):
            words += 1
            if row.firsts[number] is None:
                right += tag == "O"
                continue
            logits = TABLE[row.input_ids[row.firsts[number]]].double()
            losses.append(-float(logits.log_softmax(0)[LABELS.index(tag)]))
            right += LABELS[int(logits.argmax())] == tag
    assert scores.metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert scores.metrics["accuracy"] == pytest.approx(right / words)
    assert scores.report["words"] == words == len(losses) + scores.report["words_cut_off"]
    assert scores.report["words_cut_off"] == 4
    assert scores.metrics["examples"] == 4


def test_words_that_are_not_seen_count_as_outside_whatever_label_is_the_first():
    config, sees_o = settings(("B-x", "O")), torch.tensor([[0.0, 1.0]]).expand(320, 2)
    found = TASK.encode(config, [sentence("a b c", "O", "O", "O")], encoder_tokenizer(), 3, "data").rows
    scores = TASK.score(Scripted(sees_o), asked(1, found, TASK.collator(encoder_tokenizer(), 128)), config.base)
    assert scores.report["words_cut_off"] == 2
    assert scores.metrics["accuracy"] == 1.0


@pytest.mark.parametrize("size", [1, 4])
def test_answers_have_a_tag_for_each_word_and_none_for_what_is_cut_off(size):
    found = TASK.encode_unanswered(SENTENCES, encoder_tokenizer(), 12, settings().base).rows
    answers = list(TASK.answers(Scripted(TABLE), asked(size, found, TASK.collator(encoder_tokenizer(), 128))))
    assert [len(own["tags"]) for own in answers] == [3, 1, 9, 2]
    assert answers[2]["tags"][5:] == answers[2]["scores"][5:] == [None] * 4
    for row, own in zip(found, answers, strict=True):
        seen = [TABLE[row.input_ids[place]].softmax(0) for place in row.firsts if place is not None]
        assert own["tags"][: len(seen)] == [LABELS[int(p.argmax())] for p in seen]
        assert own["scores"][: len(seen)] == pytest.approx([float(p.max()) for p in seen])
        for entity in own["entities"]:
            assert entity["text"] == " ".join(row.words[entity["start"] : entity["end"]])
            inside = own["scores"][entity["start"] : entity["end"]]
            assert entity["score"] == pytest.approx(sum(inside) / len(inside))
    assert any(own["entities"] for own in answers)


def test_what_a_release_is_asked():
    (row,) = rows(sentence("ab c", "B-x", "O"))
    asked = TASK.proof_row(row)
    assert asked.inputs == {"input_ids": row.input_ids, "token_type_ids": [0] * 6}
    assert asked.labels == [-100, *row.labels]
    (unlabelled,) = TASK.built_in_rows(["a b"], encoder_tokenizer(), 9, settings().base, 100)
    assert unlabelled.labels == [-100] * (len(unlabelled.inputs["input_ids"]) + 1)


def test_the_audit_tells_of_types_and_of_what_is_never_seen():
    training = [sentence("a b", "B-x", "I-x"), sentence("c", "O"), sentence("c", "B-x")]
    lines = dict(TASK.audit(training, training))
    assert lines["entities x"] == "2 (100.0%)"
    assert lines["words outside entities"] == "1 of 4 (25.0%)"
    assert lines["sentences without entities"] == "1"
    assert lines["sentences with different tags in different examples"] == "1"
    assert "tags that training never shows" not in lines
    assert dict(TASK.audit([sentence("a", "B-y")], training))["tags that training never shows"] == "B-y (1)"
    encoded = TASK.encode_unanswered([sentence("ab cd ef", "B-x", "O", "B-x")], encoder_tokenizer(), 6, settings().base)
    lost = dict(TASK.audit_rows(encoded))
    assert lost == {"words cut off": "1 of 3", "words that give no token": "0", "entities cut off or cut short": "1"}
