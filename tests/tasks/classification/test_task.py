"""Rows with labels: encoded as the tokenizer does it, padded on the right, scored, answered, audited."""

from __future__ import annotations

import pytest
import torch
from classifiers import CLS_ID, PAD_ID, SEP_ID, encoder_tokenizer
from families import tiny_tokenizer

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data import prepare_tokenizer
from qlora_kit.errors import UserError
from qlora_kit.tasks.classification.read import LabelledText
from qlora_kit.tasks.classification.task import TASK
from qlora_kit.tasks.rows import RowCollator, separates_pairs
from qlora_kit.tasks.task import Asked

DECODER = prepare_tokenizer(tiny_tokenizer(), generates=False)


def example(text, *labels, pair=None, listed=False):
    return LabelledText(text=text, pair=pair, labels=labels, listed=listed, origin="a.jsonl:1")


def settings(labels=("no", "yes"), several=False):
    return RunConfig(base=BaseConfig(task="text-classification", labels=labels, multi_label=several))


def rows(examples, tokenizer=None, seq_len=128, **options):
    return TASK.encode(settings(**options), examples, tokenizer or encoder_tokenizer(), seq_len, "data").rows


def test_tokens_are_the_tokenizers_own():
    tokenizer = encoder_tokenizer()
    single, pair = rows([example("ab", "no"), example("ab", "yes", pair="c")])
    assert (
        single.input_ids
        == tokenizer("ab")["input_ids"]
        == [CLS_ID, *tokenizer("ab", add_special_tokens=False)["input_ids"], SEP_ID]
    )
    assert pair.input_ids == tokenizer("ab", "c")["input_ids"]
    assert pair.token_type_ids == [0, 0, 0, 0, 1, 1]
    assert (single.label, pair.label) == (0, 1)


def test_long_rows_are_cut_and_keep_their_marks():
    (row,) = rows([example("a" * 50, "no", pair="b" * 9)], seq_len=20)
    assert (len(row.input_ids), row.truncated, row.full_tokens) == (20, True, 62)
    assert (row.input_ids[0], row.input_ids[-1]) == (CLS_ID, SEP_ID)


def test_a_pair_without_a_separator_is_joined_by_a_line():
    assert separates_pairs(encoder_tokenizer())
    assert not separates_pairs(DECODER)
    (row,) = rows([example("a", "no", pair="b")], DECODER)
    assert row.input_ids == DECODER("a\nb")["input_ids"]
    assert row.token_type_ids is None


def test_several_labels_are_zeros_and_ones():
    found = rows([example("a", "no", "yes"), example("b"), example("c", "yes")], several=True)
    assert [row.label for row in found] == [[1, 1], [0, 0], [0, 1]]


def test_a_label_that_is_not_in_the_map_is_refused():
    with pytest.raises(UserError, match="has the label 'never', which is not among no, yes"):
        rows([example("a", "never")])


def test_batches_are_padded_on_the_right():
    collate = RowCollator.of(encoder_tokenizer())
    batch = collate(rows([example("abcdefgh", "no"), example("a", "yes", pair="b")]))
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "input_ids": (2, 10),
        "attention_mask": (2, 10),
        "token_type_ids": (2, 10),
        "labels": (2,),
    }
    assert batch["input_ids"][1, 5:].eq(PAD_ID).all()
    assert batch["attention_mask"].sum(1).tolist() == [10, 5]
    assert batch["labels"].dtype == torch.int64
    several = collate(rows([example("a", "no"), example("b")], several=True))
    assert several["labels"].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert several["labels"].dtype == torch.float32
    assert "labels" not in collate(TASK.encode_unanswered([example("a")], encoder_tokenizer(), 9, settings().base).rows)
    assert collate(rows([example("a" * 50, "no")], seq_len=13))["input_ids"].shape == (1, 13)


class Scripted(torch.nn.Module):
    """Answers with the logits it was given, row by row of `input_ids`."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = type("Config", (), {"id2label": {0: "no", 1: "yes"}, "problem_type": None, "num_labels": 2})()

    def forward(self, input_ids, **kwargs):
        return type("Output", (), {"logits": self.table[input_ids[:, 0]]})()


def batches(labels):
    ids = torch.arange(len(labels))[:, None]
    return [{"input_ids": ids[:3], "labels": labels[:3]}, {"input_ids": ids[3:], "labels": labels[3:]}]


def asked(batches):
    return Asked(rows=(), batches=batches, tokenizer=None)


def test_scores_do_not_depend_on_the_batches():
    table = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]])
    labels = torch.tensor([0, 1, 1, 1])
    scores = TASK.score(Scripted(table), asked(batches(labels)), settings().base)
    expected = -table.double().log_softmax(1)[torch.arange(4), labels].mean()
    assert scores.metrics["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert scores.metrics["accuracy"] == 0.75
    assert scores.metrics["examples"] == 4
    assert scores.report["confusion"] == [[1, 0], [1, 2]]


def test_answers_name_labels_with_their_scores():
    model = Scripted(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    batch = {"input_ids": torch.arange(2)[:, None]}
    answer = TASK.answers
    first, second = answer(model, asked([batch]))
    assert (first["label"], second["label"]) == ("no", "yes")
    assert first["score"] == pytest.approx(float(torch.tensor([2.0, 0.0]).softmax(0)[0]))
    assert sum(first["scores"].values()) == pytest.approx(1.0)
    model.config.problem_type = "multi_label_classification"
    (several, _) = answer(model, asked([batch]))
    assert several["labels"] == ["no"]
    assert several["scores"]["yes"] == pytest.approx(0.5)


def test_the_audit_tells_of_balance_and_of_labels_that_are_never_shown():
    training = [example("a", "no"), example("b", "no"), example("a", "yes")]
    lines = dict(TASK.audit(training, training))
    assert lines["label no"] == "2 (66.7%)"
    assert lines["texts with different labels in different examples"] == "1"
    assert "labels that training never shows" not in lines
    held_out = dict(TASK.audit([example("c", "maybe"), example("d", "no")], training))
    assert held_out["labels that training never shows"] == "maybe (1)"
