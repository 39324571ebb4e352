"""A tokenizer is checked and completed before it is used, and texts go on where others ended."""

import json

import pytest
from data_tokenizers import CHATML, EOS, SHARED_DATA, TwoVocabularies, byte_level, of_words, real_gpt2, sentence_piece
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from qlora_kit.data import prepare_tokenizer
from qlora_kit.data.tokenizer import continuation_ids, leading_ids, token_ids
from qlora_kit.errors import UserError


def test_pad_token_is_the_end_of_text_and_the_vocabulary_does_not_grow():
    tokenizer = byte_level()
    size = len(tokenizer)
    assert prepare_tokenizer(tokenizer) is tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == size


def test_a_pad_token_and_a_template_that_are_there_stay():
    tokenizer = byte_level(chat_template=CHATML)
    tokenizer.pad_token = "<|im_end|>"
    prepare_tokenizer(tokenizer)
    assert (tokenizer.pad_token, tokenizer.chat_template) == ("<|im_end|>", CHATML)


def test_plain_template_is_saved_with_the_tokenizer(tmp_path):
    tokenizer = prepare_tokenizer(byte_level(bos="<s>"))
    tokenizer.save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert reopened.apply_chat_template(turns, tokenize=False) == f"<s>1 + 1?\n2{EOS}"
    assert reopened.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == "<s>1 + 1?\n"


def test_preparing_twice_changes_nothing():
    tokenizer = prepare_tokenizer(byte_level(bos="<s>"))
    template = tokenizer.chat_template
    assert prepare_tokenizer(tokenizer).chat_template == template


def test_empty_vocabulary_is_refused(tmp_path):
    """Trap 6: built from the old two files, a GPT-2 tokenizer is silently empty."""
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 1}), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = GPT2TokenizerFast(vocab_file=str(tmp_path / "vocab.json"), merges_file=str(tmp_path / "merges.txt"))
    with pytest.raises(UserError, match="tokenizer = ") as caught:
        prepare_tokenizer(tokenizer)
    assert "vocabulary is empty" in caught.value.faults[0].rule


@pytest.mark.parametrize("words", [("The", "answer", "is", "42", "."), ("ответ", "42", "."), ("ответ",)])
def test_a_tokenizer_that_decodes_targets_only_is_probed_as_one(words):
    """With one vocabulary for sources and another for targets, of which either may have no Latin letters."""
    names = {"unk_token": "<unk>", "eos_token": "</s>"}
    tokenizer = TwoVocabularies(tokenizer_object=of_words(*words), **names)
    assert prepare_tokenizer(tokenizer, generates=False) is tokenizer
    one_mode = PreTrainedTokenizerFast(tokenizer_object=of_words("ответ"), **names)
    with pytest.raises(UserError, match="unknown tokens only"):
        prepare_tokenizer(one_mode, generates=False)


def test_all_faults_of_a_tokenizer_come_at_once():
    tokenizer = byte_level()
    tokenizer.eos_token = None
    tokenizer.backend_tokenizer.decoder = None
    with pytest.raises(UserError) as caught:
        prepare_tokenizer(tokenizer)
    rules = [fault.rule for fault in caught.value.faults]
    assert len(rules) == 2
    assert "back to" in rules[0]
    assert "end-of-text" in rules[1]


def test_leading_ids():
    assert leading_ids(byte_level()) == []
    with_bos = byte_level(bos="<s>")
    assert leading_ids(with_bos) == [with_bos.bos_token_id]


@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_piece("first"), sentence_piece("always")])
@pytest.mark.parametrize("text", ["b", " b", "answer is 3", "\nb", ""])
def test_a_continuation_keeps_its_beginning(tokenizer, text):
    start = token_ids(tokenizer, ["The sum:"])[0]
    (rest,) = continuation_ids(tokenizer, [text])
    assert tokenizer.decode(start + rest) == "The sum:" + text


@pytest.mark.data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"needs the GPT-2 tokenizer in {SHARED_DATA}")
def test_real_gpt2_passes():
    tokenizer = prepare_tokenizer(real_gpt2())
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 50256
    assert len(tokenizer) == 50257
