"""Answers out of log-probabilities over windows, their figures, and the audit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from classifiers import encoder_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.tasks.questions.read import AnswerSpan, AskedContext
from qlora_kit.tasks.questions.task import MAX_ANSWER_TOKENS, TASK, best_span, found_answers
from qlora_kit.tasks.task import Asked

settings.register_profile("steady", derandomize=True, deadline=None)  # the same cases on a slow, shared machine
settings.load_profile("steady")

TOKENIZER = encoder_tokenizer()
BASE = BaseConfig(task="question-answering")


def asked(context, answer=None, question="q", origin="a.jsonl:1"):
    answers = () if answer is None else (AnswerSpan(answer, context.index(answer)),)
    return AskedContext(question=question, context=context, answers=answers, id=None, origin=origin)


def encoded(examples, seq_len=24):
    return TASK.encode(RunConfig(base=BASE), examples, TOKENIZER, seq_len, "data")


@given(
    tokens=st.integers(1, 2 * MAX_ANSWER_TOKENS),
    begin=st.integers(1, 3),
    seed=st.integers(0, 9),
    share=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_the_best_span_is_the_best_of_all(tokens, begin, seed, share):
    blanks = (torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < share).tolist()
    blanks[seed % tokens] = False
    log_probs = torch.randn(2, begin + tokens + 1, generator=torch.Generator().manual_seed(seed)).log_softmax(1)
    every = {
        (s, e): float(log_probs[0, s] + log_probs[1, e])
        for s in range(begin, begin + tokens)
        for e in range(s, min(s + MAX_ANSWER_TOKENS, begin + tokens))
        if not all(blanks[s - begin : e + 1 - begin])
    }
    score, first, last = best_span(log_probs, begin, blanks)
    assert every[first, last] == max(every.values()) == score


def test_there_is_no_span_without_tokens():
    assert best_span(torch.zeros(2, 3), 3, [])[0] == -math.inf
    assert best_span(torch.zeros(2, 3), 1, [True, True])[0] == -math.inf


def pointing(row, first, last, sure=4.0):
    """Log-probabilities (2, T) that point at two tokens of a row."""
    logits = torch.zeros(2, len(row.input_ids))
    logits[0, first], logits[1, last] = sure, sure
    return logits.log_softmax(1)


def test_the_answer_comes_from_the_surest_window_and_maps_to_its_characters():
    rows = encoded([asked("abcdefghijklmnopqrstuvwxyz0123", "yz"), asked("abc")]).rows
    assert [row.number for row in rows] == [0, 0, 1]
    at = rows[1].context_at
    lists = [pointing(rows[0], at, at, 2.0), pointing(rows[1], at + 2, at + 3), pointing(rows[2], 0, 0)]
    first, second = found_answers(rows, lists)
    step = len(rows[0].offsets) - 6
    assert (first.start, first.end) == (step + 2, step + 4)
    assert first.text == "abcdefghijklmnopqrstuvwxyz0123"[step + 2 : step + 4]
    assert first.score == pytest.approx(float(lists[1][0, at + 2].exp() * lists[1][1, at + 3].exp()))
    assert (second.text, second.start, second.end) == ("", None, None)
    assert second.score == pytest.approx(float(lists[2][:, 0].exp().prod()))


def test_there_is_no_answer_only_where_every_window_says_so():
    rows = encoded([asked("abcdefghijklmnopqrstuvwxyz0123")]).rows
    at = rows[0].context_at
    (found,) = found_answers(rows, [pointing(rows[0], 0, 0, 9.0), pointing(rows[1], at, at, 3.0)])
    assert found.text
    (none,) = found_answers(rows, [pointing(rows[0], 0, 0, 9.0), pointing(rows[1], 0, 0, 3.0)])
    assert none.text == ""
    assert none.score == pytest.approx(float(pointing(rows[1], 0, 0, 3.0)[:, 0].exp().prod()))


def test_white_space_is_no_answer_and_the_next_best_span_is():
    (row,) = encoded([asked("a  bc")]).rows
    at = row.context_at
    log_probs = torch.zeros(2, len(row.input_ids))
    log_probs[0, at + 1], log_probs[1, at + 2], log_probs[1, at + 3] = 4.0, 4.0, 3.0
    log_probs = log_probs.log_softmax(1)
    (found,) = found_answers([row], [log_probs])
    assert (found.text, found.start, found.end) == ("b", 3, 4)
    assert found.score == pytest.approx(float(log_probs[0, at + 1].exp() * log_probs[1, at + 3].exp()))


def test_white_space_alone_and_contexts_without_tokens_have_no_answers():
    (row,) = encoded([asked("   ")]).rows
    (found,) = found_answers([row], [pointing(row, row.context_at + 1, row.context_at + 2)])
    assert (found.text, found.start) == ("", None)
    (empty,) = encoded([asked("")]).rows
    (found,) = found_answers([empty], [pointing(empty, 1, 1)])
    assert (found.text, found.start) == ("", None)


class Scripted(torch.nn.Module):
    """Points in each row at the first and the last # (token 2), or at its first token."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, attention_mask, token_type_ids):
        marks = input_ids == TOKENIZER("#", add_special_tokens=False)["input_ids"][0]
        found = [own.nonzero()[[0, -1], 0].tolist() if own.any() else [0, 0] for own in marks]
        logits = torch.full((2, *input_ids.shape), 7.0) * (attention_mask == 0)  # padding would be the likeliest
        for number, (first, last) in enumerate(found):
            logits[0, number, first] = logits[1, number, last] = 5.0
        return type("Output", (), {"start_logits": logits[0], "end_logits": logits[1]})()


def batches(rows, size):
    collate = TASK.collator(TOKENIZER, 24)
    return [
        {name: t for name, t in collate(rows[at : at + size]).items() if name != "x"}
        for at in range(0, len(rows), size)
    ]


EXAMPLES = [
    asked("ab #c# d", "#c#"),
    asked("abc"),
    asked("a #" + "b" * 9, "b"),
    asked("x" * 40 + "##", "##"),
    asked("#"),
]


@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_figures_and_answers_do_not_depend_on_the_batches(size):
    rows = encoded(EXAMPLES).rows
    assert len(rows) > len(EXAMPLES)
    scores = TASK.score(Scripted(), Asked(rows, batches(rows, size), TOKENIZER), BASE)
    assert scores.metrics["examples"] == 5
    # "#c#" and "##" lose their marks when normalized, and "#" is "" then: what is left is "c", "", ""
    assert scores.metrics["exact_match"] == pytest.approx(4 / 5)
    assert scores.metrics["exact_match_answerable"] == pytest.approx(2 / 3)
    terms = []
    for row in rows:  # one by one, so without padding
        outputs = Scripted()(*(torch.tensor([own]) for own in (row.input_ids, [1] * len(row.input_ids), [])))
        for logits, place in zip((outputs.start_logits, outputs.end_logits), row.label, strict=True):
            terms.append(-float(logits[0].double().log_softmax(0)[place]))
    # each term is a sum of at most 24 exponentials in fp32
    assert scores.metrics["loss"] == pytest.approx(sum(terms) / len(terms), rel=24 * torch.finfo(torch.float32).eps)
    answers = list(TASK.answers(Scripted(), Asked(rows, batches(rows, size), TOKENIZER)))
    assert [own["answer"] for own in answers] == ["#c#", "", "#", "##", "#"]
    assert (answers[0]["start"], answers[0]["end"]) == (3, 6)
    assert (answers[3]["start"], answers[3]["end"]) == (40, 42)


def test_batches_have_two_places_a_row():
    rows = encoded(EXAMPLES).rows
    (batch,) = batches(rows, 20)
    assert batch["labels"].shape == (len(rows), 2)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [list(row.label) for row in rows]
    unlabelled = TASK.encode_unanswered([asked("abc")], TOKENIZER, 24, BASE).rows
    assert "labels" not in TASK.collator(TOKENIZER, 24)(unlabelled)


def test_what_the_data_decides():
    assert TASK.resolve(BaseConfig(), EXAMPLES, "data").task == "question-answering"
    with pytest.raises(UserError, match="has no answer in any example"):
        TASK.resolve(BaseConfig(), [asked("a")], "data")


def test_the_audit():
    twice = [*EXAMPLES, asked("ab #c# d", "d")]
    lines = dict(TASK.audit(twice, twice))
    assert lines["with an answer"] == "4 (66.7%)"
    assert lines["different contexts"] == "5"
    assert lines["questions with different answers in different examples"] == "1"
    long = asked("x" * 50, "x" * 30)  # longer than any window
    lines = dict(TASK.audit_rows(encoded([asked("abc", "b"), long])))
    assert lines["answers that no window shows whole"] == "1"
    name = f"answers longer than the {MAX_ANSWER_TOKENS} tokens that one may have"
    assert lines[name] == "0"
    just, over = (asked("x" * 150, "x" * tokens) for tokens in (MAX_ANSWER_TOKENS, MAX_ANSWER_TOKENS + 1))
    assert dict(TASK.audit_rows(encoded([just, over, asked("a"), over], 128)))[name] == "2"
    windows = len(encoded([long]).rows)
    assert lines["windows"] == str(1 + windows)
    assert lines["windows to an example: mean / max"] == f"{(1 + windows) / 2:.2f} / {windows}"
    report = encoded([asked("abc"), asked("abc"), asked(" ")]).report
    assert (report.duplicates, report.empty, report.truncated, report.kept) == (1, 1, 0, 3)


def test_what_each_window_learns_in_words():
    example = asked("x" * 30 + "yz" + "x" * 30, "yz")
    found = encoded([example]).rows
    assert sorted({TASK.learned(example, row, str) for row in found}) == ["«no answer»", "«yz»"]
    assert [TASK.learned(example, row, str) == "«yz»" for row in found] == [row.label != (0, 0) for row in found]
    unanswered = asked("abc")
    (row,) = TASK.encode_unanswered([unanswered], TOKENIZER, 24, BASE).rows
    assert TASK.learned(unanswered, row, str) == "«no answer»"


def test_what_is_said_and_written(tmp_path):
    metrics = {"loss": 0.5, "exact_match": 0.25, "f1": 0.5, "exact_match_answerable": 0.1, "f1_answerable": 0.2}
    assert TASK.said(metrics) == "held-out loss 0.5000, exact match 25.0%, F1 50.0%"
    text = TASK.said({**metrics, "exact_match_unanswerable": 0.75})
    assert text.endswith("F1 50.0% (answerable 10.0% and 20.0%, unanswerable 75.0%)")
    rows = encoded(EXAMPLES).rows
    scores = TASK.score(Scripted(), Asked(rows, batches(rows, 2), TOKENIZER), BASE)
    TASK.write_report(scores, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"] == scores.metrics
