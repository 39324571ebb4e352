from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from families import EOS_ID, FAMILIES, tiny_model, tiny_tokenizer

from qlora_kit.data import Collator, prepare_tokenizer
from qlora_kit.tasks.decoding import AnswerLengths, Sampling, answer, answer_all, exact_match, mean_loss, undisturbed

TEXTS = ["abc", "the quick brown fox", "x" * 40, "hello"]


def rows():
    """Rows of different lengths, the first third of each unsupervised."""
    ids = [[*text.encode(), EOS_ID] for text in TEXTS]
    return [{"input_ids": i, "labels": [-100] * (len(i) // 3) + i[len(i) // 3 :]} for i in ids]


def test_the_loss_weighs_every_token_the_same_whatever_the_batch():
    model = tiny_model("llama")
    collate = Collator(EOS_ID)
    one_by_one = mean_loss(model, [collate([row]) for row in rows()])
    together = mean_loss(model, [collate(rows())])
    in_pairs = mean_loss(model, [collate(rows()[:3]), collate(rows()[3:])])
    total = 0.0
    for row in rows():  # the oracle: token by token
        with torch.no_grad():
            logp = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        total -= sum(float(logp[i - 1, t]) for i, t in enumerate(row["labels"]) if i and t != -100)
    assert (
        one_by_one.tokens == together.tokens == in_pairs.tokens == sum(t != -100 for r in rows() for t in r["labels"])
    )
    for loss in (one_by_one, together, in_pairs):
        assert loss.mean == pytest.approx(total / loss.tokens, rel=1e-5)


def test_rows_with_nothing_supervised_count_for_nothing():
    model = tiny_model("gpt2")
    empty = Collator(EOS_ID)([{"input_ids": [1, 2, 3], "labels": [-100] * 3}])
    assert mean_loss(model, [empty]).tokens == 0
    assert mean_loss(model, [empty, Collator(EOS_ID)(rows())]) == mean_loss(model, [Collator(EOS_ID)(rows())])


def test_scoring_leaves_mode_and_random_states_alone():
    model = tiny_model("gpt2").train()
    draws = lambda: (torch.rand(1).item(), random.random(), np.random.rand())  # noqa: E731
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(7)
    expected = draws()
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(7)
    with undisturbed(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        draws()
    assert model.training
    assert draws() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_batch_equal_those_alone(family):
    model, tokenizer = tiny_model(family), prepare_tokenizer(tiny_tokenizer())
    prompts = [list(text.encode()) for text in TEXTS]
    together = answer(model, tokenizer, prompts, 6)
    assert together == [answer(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    ids = torch.tensor([prompts[1]])
    with torch.no_grad():  # the oracle: one token at a time, no cache
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == EOS_ID:
                break
    assert together[1] == tokenizer.decode(ids[0, len(prompts[1]) :], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_however_many_prompts_are_answered_at_once(family):
    """In fp32; in 16 bits a likeliest token that leads by less than its rounding may be another in another batch."""
    model, tokenizer = tiny_model(family), prepare_tokenizer(tiny_tokenizer())
    prompts = [list(range(start, start + 3 + 7 * start % 41)) for start in range(1, 8)]
    with undisturbed(model):
        one, three, all_at_once = (
            answer_all(model, tokenizer, prompts, Sampling(6), batch_size) for batch_size in (1, 3, 32)
        )
    assert one == three == all_at_once
    assert len({found.text for found in one}) > 1


def test_answers_at_different_times_need_the_larger_of_each():
    assert AnswerLengths(1, 40, 64).also(AnswerLengths(32, 20, 100)) == AnswerLengths(32, 40, 100)


def test_an_answer_ends_where_the_positions_do():
    """GPT-2 has 128 positions here: a prompt of 126 leaves two tokens, one of 128 or more none at all."""
    model, tokenizer = tiny_model("gpt2"), prepare_tokenizer(tiny_tokenizer())
    almost, full, over = ([97] * n for n in (126, 128, 140))
    assert len(answer(model, tokenizer, [almost], 50)[0]) <= 2  # a token is a byte here
    assert answer(model, tokenizer, [full], 50) == answer(model, tokenizer, [over], 50) == [""]
    short = [104, 105]
    assert answer(model, tokenizer, [short, almost, full], 6)[0] == answer(model, tokenizer, [short], 6)[0]


def test_exact_match_ignores_white_space_at_the_ends_only():
    assert exact_match(["a b ", "ab", "c"], ["a b", "a b", "\nc"]) == pytest.approx(2 / 3)
    assert exact_match([], []) == 0
