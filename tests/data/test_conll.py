"""CoNLL files: recognised by name or content, read sentence by sentence, every bad line named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data import read_rows
from qlora_kit.data.conll import looks_like_conll, read_sentences
from qlora_kit.data.problems import Problems
from qlora_kit.errors import UserError

TWO = "Ann\tB-person\nsings\tO\n\nin\tO\nOslo\tB-place\n"


def sentences(text):
    problems = Problems("data", "a.conll", "Mend it.")
    found = [(s.line, s.words, s.tags) for s in read_sentences(text, "a.conll", problems)]
    problems.raise_if_any()
    return found


def test_words_tags_and_the_line_on_which_a_sentence_begins():
    assert sentences(TWO) == [(1, ["Ann", "sings"], ["B-person", "O"]), (4, ["in", "Oslo"], ["O", "B-place"])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tO\r\n\r\nb\tO\r\n", [["a"], ["b"]]),  # lines as Windows ends them
        ("a\tO\n\t\nb\tO\n \n\n", [["a"], ["b"]]),  # a line with a tab alone, as in WNUT-17
        ("-DOCSTART- -X- O O\n\na NN I-NP O\nb VB I-VP O\n", [["a", "b"]]),
        ("a\tO\n-DOCSTART-\tO\nb\tO\n", [["a"], ["b"]]),
        ("#\tO\n#tag\tO\n\u00a0\tO\nnew york\tO\n", [["#", "#tag", "\u00a0", "new york"]]),
        ("a  O\nb O", [["a", "b"]]),
        ("a\nb\n\nc\n", [["a", "b"], ["c"]]),
        ("\n\n", []),
        ("", []),
        ("a\tO\r\rb\tO\rc\tO\r", [["a"], ["b", "c"]]),  # lines as old Macs end them
        ("a\tO\r\r\nb\tO\r\r\n", [["a", "b"]]),  # and converted twice
        ("a\u2028b\tO\nc\x0b\tO\n", [["a\u2028b", "c\x0b"]]),
        ("# id 1\n# text = a b\na O\nb O\n\n# id 2\nc O\n", [["a", "b"], ["c"]]),  # comments
        ("# id 1\na\tO\n\n# id 2\n# 7\tO\n", [["a"], ["# 7"]]),
        ("# id\na O\n\n# id\n# O\nb O\n", [["a"], ["#", "b"]]),
        ("# O\na O\n# B-x\n\n# I-x\nb O\n", [["#", "a", "#"], ["#", "b"]]),  # the token itself
        ("# SYM\n1 NUM\n", [["#", "1"]]),
        ("# O\n", [["#"]]),
        ("# id 1\na\n#\n\n# id 2\n# \nb\n", [["a", "#"], ["#", "b"]]),
    ],
)
def test_odd_files(text, expected):
    assert [words for _, words, _ in sentences(text)] == expected


def test_the_tag_stands_in_the_last_column():
    assert sentences("a NN I-NP B-x\n")[0][2] == ["B-x"]
    assert sentences("a\nb\n")[0][2] == []


word = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\n\t\r"), min_size=1, max_size=8
).filter(lambda found: found.strip(" ") == found and not found.startswith("-DOCSTART-"))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.lists(st.tuples(word, st.sampled_from(["O", "B-a", "I-a"])), min_size=1), max_size=5), st.booleans())
def test_what_was_written_is_read(content, has_returns):
    end = "\r\n" if has_returns else "\n"
    text = end.join("".join(f"{own}\t{tag}{end}" for own, tag in sentence) for sentence in content)
    assert [list(zip(words, tags, strict=True)) for _, words, tags in sentences(text)] == content
    if content:
        assert looks_like_conll(text)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("word", "a.conll:2.*has 1 columns, but the first line with a word, line 1, has 2"),
        ("a\tb\tO", "has 3 columns, but the first line with a word, line 1, has 2"),
        ("\tO", "has no word in its first column"),
        ("word\t", "has no tag after 'word'"),
    ],
)
def test_a_line_that_is_none_is_named(line, rule):
    with pytest.raises(UserError, match=rule):
        sentences(f"a\tO\n{line}\nb\tO\n")


def test_a_comment_does_not_say_how_many_columns_there_are():
    with pytest.raises(UserError, match=r"a.conll:4.*has 3 columns, but the first line with a word, line 3, has 2"):
        sentences("# id 1\n\na O\n# id 2\n")


def test_every_bad_line_is_told_at_once():
    with pytest.raises(UserError) as caught:
        sentences("a\tO\nb\n\nc\tO\n\tO\n")
    assert [fault.value for fault in caught.value.faults] == ["a.conll:2", "a.conll:5"]


@pytest.mark.parametrize(
    "text", ["", "a b c\n", "text\tlabel\nfine\t1\n", "one\tO\ntwo\n", "Ann B-person\nsings well\n"]
)
def test_what_does_not_look_like_it(text):
    assert not looks_like_conll(text)


def test_comments_and_old_line_ends_do_not_hide_what_it_is():
    assert looks_like_conll("# id 1\n# text = Ann\nAnn B-person\n")
    assert looks_like_conll(TWO.replace("\n", "\r"))


@pytest.mark.parametrize("name", ["a.conll", "a.bio", "a.test.annotated", "a.txt", "a.tsv", "a"])
def test_a_file_is_recognised_by_its_name_or_its_content(tmp_path, name):
    (tmp_path / name).write_text(TWO)
    first, second = read_rows(str(tmp_path / name), {})
    assert first.values == {"tokens": ["Ann", "sings"], "tags": ["B-person", "O"]}
    assert second.origin == f"{tmp_path / name}:4"


def test_a_bad_line_in_a_file_of_another_name_is_named(tmp_path):
    (tmp_path / "a.annotated").write_text(TWO * 10 + "\nword\n")
    with pytest.raises(UserError, match=r"a.annotated:52.*has 1 columns"):
        read_rows(str(tmp_path / "a.annotated"), {})


def test_other_files_are_what_they_were(tmp_path):
    (tmp_path / "a.txt").write_text("one line\nanother\n")
    assert [record.values for record in read_rows(str(tmp_path / "a.txt"), {})] == [
        {"text": "one line"},
        {"text": "another"},
    ]
    for name, content in (("a.bin", b"\0\1a\tO\n"), ("a.log", b"Ann sings\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="is not a kind of file that can be read"):
            read_rows(str(tmp_path / name), {})


def test_a_folder_of_them(tmp_path):
    (tmp_path / "train.conll").write_text(TWO)
    (tmp_path / "dev.conll").write_text("a\tO\n")
    assert len(read_rows(str(tmp_path), {})) == 2
    assert len(read_rows(str(tmp_path), {}, "eval_data")) == 1


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "count", "words"),  # as published: Derczynski et al., W-NUT 2017, table 2
    [("wnut17train.conll", 3394, 62730), ("emerging.dev.conll", 1009, 15733), ("emerging.test.annotated", 1287, 23394)],
)
def test_wnut17(shared_data, name, count, words):
    records = read_rows(str(shared_data / "wnut17" / name), {})
    assert len(records) == count
    assert sum(len(record.values["tokens"]) for record in records) == words
    tags = {tag for record in records for tag in record.values["tags"]}
    kinds = ("corporation", "creative-work", "group", "location", "person", "product")
    assert tags == {"O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in kinds)}
