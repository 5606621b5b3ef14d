"""A flat prompt's parts: nothing is lost, and each is where its rule says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput
from eval.flat import Rule, cut, paragraphs
from tests.samples import spans

FACTS = ["Ada keeps house one.", "Bob keeps house two. He is tall.", "Eve keeps no house at all."]
QUESTION = "Question: Who keeps house two?\nAnswer:"
pieces = st.lists(st.sampled_from(["\n", "\n\n", " ", "Document 1:", "[2]", "Question:", "cat", "mat.", "  \n \n"]))


@given(pieces.map("".join), st.integers(1, 9), st.integers(0, 2), st.sampled_from([None, 1, 2]))
def test_parts_are_the_whole_prompt_or_it_is_refused(text, tokens, instructions, question):
    try:
        parts = cut(text, Rule(tokens, instructions, question), spans)
    except BadInput:
        return
    assert parts.instructions + "".join(parts.chunks) + parts.question == text
    assert parts.chunks and all(0 < len(spans(c)) <= tokens for c in parts.chunks)


@pytest.mark.parametrize("mark", ["Document {}:", "Passage {}:\n", "Document [{}](Title: x)", "[{}]", "Source #{}:"])
@pytest.mark.parametrize("between", ["\n", "\n\n"])
def test_numbered_passages_are_chunks(mark, between):
    chunks = [f"{mark.format(i)} {fact}{between}" for i, fact in enumerate(FACTS, 1)]
    parts = cut("Read this.\n\nThen answer.\n" + "".join(chunks) + QUESTION, Rule(), spans)
    assert (parts.instructions, parts.chunks, parts.question) == ("Read this.\n\nThen answer.\n", (*chunks,), QUESTION)


def test_paragraphs_are_put_together_up_to_the_limit():
    texts = [f"{fact}\n\n" for fact in FACTS]
    whole = "Read this.\n\n" + "".join(texts) + QUESTION
    assert [len(spans(t)) for t in texts] == [7, 11, 9]
    assert cut(whole, Rule(17), spans).chunks == (*texts,)
    assert cut(whole, Rule(18), spans).chunks == (texts[0] + texts[1], texts[2])
    assert cut(whole, Rule(512), spans).chunks == ("".join(texts),)
    assert cut(whole, Rule(4), spans).chunks[0] == "Ada keeps house one"  # longer ones are cut


def test_the_last_question_is_meant_and_without_one_the_last_paragraph():
    shots = "Q: What?\nA: That.\n\n" * 2
    assert cut(f"Do it.\n\n{shots}Q 3: And now?\nA:", Rule(), spans).question == "Q 3: And now?\nA:"
    whole = "Read this.\n\nAda keeps it.\n\nNow say who keeps it.\n\nAnswer:"
    assert cut(whole, Rule(), spans).question == "Answer:"
    assert cut(whole, Rule(question=2), spans).question == "Now say who keeps it.\n\nAnswer:"
    assert cut(f"A.\n\nB.\n\n{QUESTION}\n\nYes?", Rule(question=1), spans).question == "Yes?"


def test_a_prompt_may_begin_with_its_context():
    whole = f"{FACTS[1]}\n\n{QUESTION}"
    parts = cut(whole, Rule(instructions=0), spans)
    assert (parts.instructions, parts.chunks) == ("", (f"{FACTS[1]}\n\n",))
    with pytest.raises(BadInput, match="nothing in this prompt can be reused.*'Bob keeps.*instructions=0"):
        cut(whole, Rule(), spans)


@pytest.mark.parametrize("text", ["", "  \n\n ", "Who is it?", QUESTION])
def test_where_there_is_nothing_to_reuse_the_prompt_is_refused(text):
    with pytest.raises(BadInput, match="nothing in this prompt can be reused"):
        cut(text, Rule(), spans)


def test_paragraphs_end_at_blank_lines_and_keep_them():
    assert paragraphs("\n\na\nb \n \n\n c\n\n") == ["\n\na\nb \n \n\n ", "c\n\n"]


@pytest.mark.parametrize(("settings", "named"), [
    ({"chunk_tokens": 0}, "chunk_tokens=0"), ({"instructions": -1}, "instructions=-1"),
    ({"question": 0}, "question=0")])
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(BadInput, match=named):
        Rule(**settings)
