"""What is supervised, where the boundary lies, and what is cut off."""

import pytest
from data_tokenizers import CHATML, CHATML_WITH_THOUGHTS, EOS, SHARED_DATA, byte_level, real_gpt2, sentence_piece
from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.data import (
    Example,
    Message,
    encode_example,
    encode_prompt,
    encode_set,
    prepare_tokenizer,
    read_examples,
    resolve_seq_len,
)
from qlora_kit.data.tokenizer import token_ids
from qlora_kit.errors import UserError

PLAIN = prepare_tokenizer(byte_level())
WITH_BOS = prepare_tokenizer(byte_level(bos="<s>"))
CHAT = prepare_tokenizer(byte_level(chat_template=CHATML))
TOKENIZERS = (PLAIN, WITH_BOS, CHAT, prepare_tokenizer(sentence_piece("first")))
LONG = 10_000
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def pair(prompt, completion):
    return Example(prompt=prompt, completion=completion, messages=None, origin="f:1")


def chat(*turns):
    return Example(
        prompt="", completion="", messages=tuple(Message(role, content) for role, content in turns), origin="f:1"
    )


def learned(encoded, tokenizer):
    """The supervised text, with a bar wherever unsupervised tokens lie between."""
    runs, previous = [[]], True
    for token, supervised in zip(encoded.input_ids, encoded.supervised, strict=True):
        if supervised and not previous:
            runs.append([])
        if supervised:
            runs[-1].append(token)
        previous = supervised
    return [tokenizer.decode(run) for run in runs if run]


# ------------------------------------------------------------------------------------------------- plain layout


@given(prompt=any_text, completion=any_text)
def test_plain_layout_is_prompt_completion_end(prompt, completion):
    encoded = encode_example(pair(prompt, completion), PLAIN, LONG, "answer")
    separator = "" if prompt[-1:] in (" ", "\n", "\t") and prompt else "\n"
    prompt_ids, completion_ids = token_ids(PLAIN, [prompt + separator, completion])
    assert encoded.input_ids == [*prompt_ids, *completion_ids, PLAIN.eos_token_id]
    assert encoded.supervised == [False] * len(prompt_ids) + [True] * (len(completion_ids) + 1)
    assert encoded.labels == [-100] * len(prompt_ids) + [*completion_ids, PLAIN.eos_token_id]
    assert not encoded.truncated


def test_begin_of_text_comes_once():
    encoded = encode_example(pair("a", "b"), WITH_BOS, LONG, "answer")
    assert WITH_BOS.decode(encoded.input_ids) == f"<s>a\nb{EOS}"
    text = encode_example(Example(prompt=None, completion="a b", messages=None, origin="f:1"), WITH_BOS, LONG, "answer")
    assert WITH_BOS.decode(text.input_ids) == f"<s>a b{EOS}"
    assert text.supervised == [False] + [True] * (len(text.input_ids) - 1)


@given(text=any_text)
def test_plain_text_is_supervised_but_for_its_first_token(text):
    encoded = encode_example(Example(prompt=None, completion=text, messages=None, origin="f:1"), PLAIN, LONG, "answer")
    assert encoded.input_ids == [*token_ids(PLAIN, [text])[0], PLAIN.eos_token_id]
    assert encoded.supervised == [False] + [True] * (len(encoded.input_ids) - 1)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_train_on_all_supervises_all_but_the_first_token(tokenizer):
    encoded = encode_example(pair("1 + 1 =", "2"), tokenizer, LONG, "all")
    assert encoded.supervised == [False] + [True] * (len(encoded.input_ids) - 1)


def test_a_space_marking_tokenizer_puts_no_space_before_the_answer():
    tokenizer = TOKENIZERS[-1]
    encoded = encode_example(pair("The answer is", "42."), tokenizer, LONG, "answer")
    assert tokenizer.decode(encoded.input_ids) == f"<s> The answer is\n42.{EOS}".replace("<s> ", "<s>")


# ------------------------------------------------------------------------------------------------ chat templates


def test_chat_template_of_the_tokenizer_is_used():
    encoded = encode_example(pair("q", "a"), CHAT, LONG, "answer")
    text = f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>{EOS}"
    assert CHAT.decode(encoded.input_ids) == text
    assert learned(encoded, CHAT) == [f"a<|im_end|>{EOS}"]


def test_every_answer_is_supervised_with_its_end_of_turn():
    example = chat(("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"))
    assert learned(encode_example(example, CHAT, LONG, "answer"), CHAT) == ["a<|im_end|>", f"b<|im_end|>{EOS}"]
    assert learned(encode_example(example, PLAIN, LONG, "answer"), PLAIN) == [f"a{EOS}", f"b{EOS}"]


def test_end_of_turn_that_is_the_end_of_text_is_not_doubled():
    tokenizer = byte_level(chat_template=CHATML)
    tokenizer.eos_token = "<|im_end|>"
    encoded = encode_example(pair("q", "a"), prepare_tokenizer(tokenizer), LONG, "answer")
    assert learned(encoded, tokenizer) == ["a<|im_end|>"]


def test_conversation_that_ends_with_the_user_keeps_its_last_question_unsupervised():
    example = chat(("user", "u"), ("assistant", "a"), ("user", "v"))
    encoded = encode_example(example, CHAT, LONG, "answer")
    assert learned(encoded, CHAT) == ["a<|im_end|>"]
    assert CHAT.decode(encoded.input_ids).endswith("<|im_start|>user\nv<|im_end|>\n")


def test_template_that_drops_thoughts_of_earlier_answers():
    tokenizer = prepare_tokenizer(byte_level(chat_template=CHATML_WITH_THOUGHTS))
    example = chat(("user", "u"), ("assistant", "aa"), ("user", "v"), ("assistant", "b"))
    encoded = encode_example(example, tokenizer, LONG, "answer")
    assert learned(encoded, tokenizer) == ["aa<|im_end|>", f"<think></think>b<|im_end|>{EOS}"]


ONLY_TWO = CHATML.replace("for m in messages", "for m in messages if m['role'] in ['user', 'assistant']")
NO_ANSWERS = CHATML.replace("for m in messages", "for m in messages if m['role'] != 'assistant'")


@pytest.mark.parametrize(
    ("template", "turns", "said"),
    [
        (ONLY_TWO, [("system", "Be brief."), ("user", "u"), ("assistant", "a")], "its system turn"),
        (ONLY_TWO, [("system", "user"), ("user", "u"), ("assistant", "a")], "its system turn"),  # "user" is in the text
        (ONLY_TWO, [("user", "u"), ("assistant", "a"), ("tool", "t"), ("assistant", "b")], "its tool turn"),
        (ONLY_TWO, [("system", "s"), ("user", "u"), ("assistant", "a"), ("tool", "t")], "its system turn and its tool"),
        (NO_ANSWERS, [("user", "u"), ("assistant", "a")], "its assistant turn"),
    ],
)
def test_a_turn_that_the_template_leaves_out_is_refused(template, turns, said):
    tokenizer = prepare_tokenizer(byte_level(chat_template=template))
    with pytest.raises(UserError) as caught:
        encode_set([chat(*turns)] * 3, tokenizer, seq_len=LONG, train_on="answer", setting="eval_data")
    (fault,) = caught.value.faults
    assert fault.setting == "eval_data"
    assert fault.rule.startswith(f"the chat template leaves out {said}")
    assert fault.rule.endswith("(the first of 3 such places)")
    assert "tokenizer" in fault.remedy


def test_a_prompt_of_which_the_template_leaves_out_a_turn_is_refused():
    tokenizer = prepare_tokenizer(byte_level(chat_template=ONLY_TWO))
    with pytest.raises(UserError, match="leaves out its system turn") as caught:
        encode_prompt(chat(("system", "s"), ("user", "u")), tokenizer)
    assert "remove it" in caught.value.faults[0].remedy


def test_what_the_template_leaves_out_of_some_conversations_only_is_refused_there():
    """The proof for the first one, of the same roles, does not cover the second."""
    choosy = CHATML.replace("for m in messages", "for m in messages if not m['content'].startswith('secret')")
    tokenizer = prepare_tokenizer(byte_level(chat_template=choosy))
    examples = [chat(("system", text), ("user", "u"), ("assistant", "a")) for text in ("open", "secret one")]
    with pytest.raises(UserError, match="leaves out its system turn"):
        encode_set(examples, tokenizer, seq_len=LONG, train_on="answer")


@pytest.mark.parametrize(
    "shown",
    ["m['content'] | trim", "m['content'] | tojson", "m['content'].split('</think>')[-1]", "m['content'] | upper"],
)
def test_a_content_that_the_template_lays_out_its_own_way_is_not_missed(shown):
    tokenizer = prepare_tokenizer(byte_level(chat_template=CHATML.replace("m['content']", f"({shown})")))
    thoughtful = "<think>a\n</think>\n b  "
    turns = [("system", ' say "a"\n'), ("user", ""), ("assistant", thoughtful), ("user", thoughtful)]
    encoded = encode_example(chat(*turns), tokenizer, LONG, "answer")
    assert any(encoded.supervised)


def test_the_proof_is_made_once_for_an_order_of_roles(monkeypatch):
    tokenizer = prepare_tokenizer(byte_level(chat_template=CHATML))
    rendered = []
    plain = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *args, **kw: rendered.append(1) or plain(*args, **kw)
    )
    examples = [chat(("system", f"s{n}"), ("user", f"u{n}"), ("assistant", f"a{n}")) for n in range(40)]
    encode_set(examples, tokenizer, seq_len=LONG, train_on="answer")
    assert len(rendered) == 2 * 40 + 1


def test_template_that_is_not_stable_is_refused():
    shifting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = prepare_tokenizer(byte_level(chat_template=shifting))
    with pytest.raises(UserError, match="differently once the answer is known") as caught:
        encode_example(pair("q", "a"), tokenizer, LONG, "answer")
    assert caught.value.faults[0].value == "f:1"


def test_template_that_refuses_a_conversation_is_named_with_the_place():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = prepare_tokenizer(byte_level(chat_template=refusing))
    examples = [chat(("system", "s"), ("user", "u"), ("assistant", "a"))] * 7
    with pytest.raises(UserError, match="no system") as caught:
        encode_set(examples, tokenizer, seq_len=LONG, train_on="answer", setting="eval_data")
    assert [fault.value for fault in caught.value.faults] == ["f:1"] * 5 + ["chat template"]
    with pytest.raises(UserError, match="no system"):
        encode_prompt(chat(("system", "s"), ("user", "u")), tokenizer)


# ------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(prompt=any_text, completion=any_text)
def test_encode_prompt_is_what_training_saw_before_the_answer(tokenizer, prompt, completion):
    encoded = encode_example(pair(prompt, completion), tokenizer, LONG, "answer")
    start = encode_prompt(pair(prompt, completion), tokenizer)
    assert start == encoded.input_ids[: encoded.supervised.index(True)]
    assert start == encode_prompt(pair(prompt, ""), tokenizer)  # whatever the answer is


def test_encode_prompt_of_conversations():
    question = chat(("system", "s"), ("user", "u"))
    answered = Example(prompt="", completion="", messages=(*question.messages, Message("assistant", "a")), origin="f:1")
    start = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    assert CHAT.decode(encode_prompt(question, CHAT)) == CHAT.decode(encode_prompt(answered, CHAT)) == start


def test_encode_prompt_of_text():
    assert encode_prompt(Example(prompt=None, completion="abc", messages=None, origin="f:1"), WITH_BOS) == [
        WITH_BOS.bos_token_id
    ]
    assert len(encode_prompt(Example(prompt=None, completion="abc", messages=None, origin="f:1"), PLAIN)) == 1


# ---------------------------------------------------------------------------------------------------- truncation


@given(prompt=any_text, completion=any_text, seq_len=st.integers(2, 60))
def test_truncation_cuts_the_end(prompt, completion, seq_len):
    full = encode_example(pair(prompt, completion), PLAIN, LONG, "answer")
    cut = encode_example(pair(prompt, completion), PLAIN, seq_len, "answer")
    assert cut.input_ids == full.input_ids[:seq_len]
    assert cut.supervised == full.supervised[:seq_len]
    assert cut.truncated == (len(full.input_ids) > seq_len)
    assert cut.full_tokens == len(full.input_ids)


def test_encode_set_drops_and_counts():
    examples = [
        pair("q", "a"),
        pair("q", "a"),
        pair("q" * 50, "a"),
        pair("q", "a" * 50),
        pair("q", " "),
        Example(prompt=None, completion="", messages=None, origin="f:6"),
    ]
    encoded = encode_set(examples, PLAIN, seq_len=20, train_on="answer")
    report = encoded.report
    assert (report.examples, report.kept, report.unsupervised) == (6, 4, 2)
    assert (report.truncated, report.empty, report.duplicates) == (2, 2, 1)
    assert (report.length_min, report.length_median, report.length_p95) == (1, 4, report.length_max)
    assert report.input_tokens == sum(len(row.input_ids) for row in encoded.rows)
    assert report.supervised_tokens == sum(label != -100 for item in encoded for label in item["labels"])
    assert len(encoded) == 4


def test_encode_set_equals_encode_example_across_batches(monkeypatch):
    monkeypatch.setattr("qlora_kit.data.encode.BATCH_SIZE", 3)
    examples = [pair("q" * n, "a" * n) for n in range(1, 8)]
    encoded = encode_set(examples, CHAT, seq_len=30, train_on="answer")
    assert encoded.rows == [encode_example(example, CHAT, 30, "answer") for example in examples]


@pytest.mark.parametrize(
    ("examples", "remedy"),
    [
        ([pair("q" * 50, "a")], "seq_len"),
        ([chat(("user", "u"))], "train_on=all"),
        ([Example(prompt=None, completion="", messages=None, origin="f:1")], "not empty"),
        ([], "at least one"),
    ],
)
def test_nothing_supervised_is_refused(examples, remedy):
    with pytest.raises(UserError, match="eval_data = ") as caught:
        encode_set(examples, PLAIN, seq_len=10, train_on="answer", setting="eval_data")
    assert remedy in str(caught.value)


def test_resolve_seq_len():
    tokenizer = byte_level()
    tokenizer.model_max_length = 512
    assert resolve_seq_len(None, tokenizer) == 512
    assert resolve_seq_len(None, tokenizer, positions=2048) == 1024
    assert resolve_seq_len(300, tokenizer, positions=400) == 300
    with pytest.raises(UserError, match="seq_len = "):
        resolve_seq_len(401, tokenizer, positions=400)


@pytest.mark.data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"needs the data sets in {SHARED_DATA}")
def test_real_data_and_tokenizer():
    tokenizer = prepare_tokenizer(real_gpt2())
    examples = read_examples(str(SHARED_DATA / "gsm8k"), {})[:200]
    encoded = encode_set(examples, tokenizer, seq_len=1024, train_on="answer")
    for example, row in zip(examples, encoded.rows, strict=True):
        assert learned(row, tokenizer) == [example.completion + "<|endoftext|>"]
        assert tokenizer.decode(encode_prompt(example, tokenizer)) == example.prompt + "\n"
