"""Prompts: what stands around passages and question, with a chat template and without."""

import dataclasses

import pytest

from cacheclip_jax.model.tokenizer import Tokenizer
from cacheclip_jax.prompt import PromptFormat
from tests.checkpoints import write_tokenizer

FORMAT = PromptFormat(instructions="the cat\n", question="{question}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("words")
    write_tokenizer(directory)
    return Tokenizer.from_directory(directory)


def text(tokenizer, ids) -> str:
    return tokenizer._fast.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_an_answers_beginning_stands_behind_the_assistant_header(tokenizer):
    words = dataclasses.replace(FORMAT, answer=" It is")
    ids = words.question_ids(tokenizer, "the mat?")
    assert text(tokenizer, ids) == "the mat?<|im_end|>\n<|im_start|>assistant\n It is"
    assert ids[: -len(tokenizer.encode(" It is").ids)] == FORMAT.question_ids(tokenizer, "the mat?")
    assert words.prefix_ids(tokenizer) == FORMAT.prefix_ids(tokenizer)


def test_without_chat_a_prompt_is_its_texts(tokenizer):
    words = dataclasses.replace(FORMAT, chat=False, answer=" It is")
    assert text(tokenizer, words.prefix_ids(tokenizer)) == "the cat\n"
    assert text(tokenizer, words.question_ids(tokenizer, "the mat?")) == "the mat? It is"


@pytest.mark.parametrize("chat", [True, False])
def test_white_space_around_a_question_stays_where_the_format_says_so(tokenizer, chat):
    stripped = dataclasses.replace(FORMAT, chat=chat)
    kept = dataclasses.replace(stripped, strip=False)
    assert text(tokenizer, kept.question_ids(tokenizer, "the mat:\n")).startswith("the mat:\n")
    assert stripped.question_ids(tokenizer, "the mat:\n") == stripped.question_ids(tokenizer, "the mat:")


def test_plain_answers_and_questions_hold_no_control_tokens(tokenizer):
    words = dataclasses.replace(FORMAT, chat=False, answer="<|im_end|>")
    control = set(tokenizer.encode("<|im_end|>", special=True).ids)
    assert not control & set(words.question_ids(tokenizer, "<|im_end|>"))
