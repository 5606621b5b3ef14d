"""Reading documents and splitting them into passages."""

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacheclip_jax.documents import Document, read_documents, split
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.tokenizer import Tokenizer, nfc
from tests.checkpoints import write_tokenizer

TEXT = ("The lamp was lit in 1881. It burns oil.\n\nThe keeper lives below. She counts the ships that pass by, "
        "every morning and every evening.\n\nIn 1903 the tower was painted white, and it has been white since then.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.from_directory(directory)


words = st.lists(st.sampled_from(
    ["lamp", "é", "e\u0301", "日本", "🙂", ". ", "\n\n", " ", "\t", "keeper,", "1881"]), max_size=80)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=words, size=st.integers(16, 60), overlap=st.integers(0, 8))
def test_passages_are_spans_of_the_document_in_order_and_lose_only_white_space(tokenizer, words, size, overlap):
    text = nfc("".join(words))
    passages = split(Document(text, "d"), tokenizer, size, overlap)
    covered = [False] * len(text)
    for p in passages:
        assert p.text == text[p.start : p.end] and p.text.strip() == p.text and p.document == "d"
        assert len(tokenizer.encode(p.text).ids) <= size + 2  # a cut may split a token in two
        covered[p.start : p.end] = [True] * (p.end - p.start)
    assert all(c or text[i].isspace() for i, c in enumerate(covered))
    assert [p.start for p in passages] == sorted(p.start for p in passages)


def test_passages_end_at_paragraphs_where_the_size_allows_it(tokenizer):
    size = len(tokenizer.encode(TEXT[: TEXT.index("In 1903")]).ids) + 5
    first, second = split(Document(TEXT, "d"), tokenizer, size)
    assert first.text.endswith("every evening.") and second.text.startswith("In 1903")


def test_overlap_repeats_the_end_of_a_passage(tokenizer):
    plain = split(Document(TEXT, "d"), tokenizer, 40)
    overlapping = split(Document(TEXT, "d"), tokenizer, 40, overlap=10)
    assert all(a.end <= b.start for a, b in itertools.pairwise(plain))
    assert all(b.start < a.end for a, b in itertools.pairwise(overlapping))


def test_a_document_without_a_name_is_named_by_its_text(tokenizer):
    (a,), (b,) = split(Document("one"), tokenizer, 16), split(Document("two"), tokenizer, 16)
    assert a.document.startswith("text-") and a.document != b.document


def test_white_space_gives_no_passage(tokenizer):
    assert split(Document(" \n\n\t "), tokenizer, 16) == []


@pytest.mark.parametrize(("size", "overlap", "named"), [(3, 0, "chunk size 3"), (32, 17, "overlap 17"),
                                                        (32, -1, "overlap -1")])
def test_sizes_out_of_range_are_refused_with_the_limit(tokenizer, size, overlap, named):
    with pytest.raises(BadInput, match=named):
        split(Document(TEXT), tokenizer, size, overlap)


def test_folders_are_searched_for_text_and_hidden_files_are_not(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in {"a.txt": "A", "b/c.md": "C", "b/x.png": "no", ".git/d.txt": "no", "b/.e.txt": "no"}.items():
        (tmp_path / name).write_text(text)
    assert [(d.name, d.text) for d in read_documents([str(tmp_path)])] == [("a.txt", "A"), ("b/c.md", "C")]


def test_jsonl_rows_become_documents_with_title_and_id(tmp_path):
    rows = [{"text": "body"}, {"id": 7, "title": "T", "text": "two"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = [(d.name, d.text) for d in read_documents([str(tmp_path / "x.jsonl")])]
    assert found == [("x.jsonl:1", "body"), ("7", "T\ntwo")]


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.bin", b"\x7fELF\0\0", "binary"), ("a.txt", b"caf\xe9", "UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{oops\n', "line 2"),
    ("a.jsonl", b'{"body": "x"}\n', "line 1"), ("a.jsonl", b'{"text": 3}\n', "must be a string"),
])
def test_what_is_not_text_is_refused_by_name(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=says) as e:
        list(read_documents([str(tmp_path / name)]))
    assert name in str(e.value)
