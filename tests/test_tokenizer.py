"""The tokenizer: spans that tile the text, plain text that stays plain, and prompts cut where passages go."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput, BadModelFile
from cacheclip_jax.model.tokenizer import Encoded, Tokenizer, nfc
from tests.checkpoints import CHATML, SPECIAL, bpe, write_tokenizer

CONTROL = {bpe().get_vocab()[t] for t in SPECIAL}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.from_directory(directory)


def with_config(directory, **config) -> Tokenizer:
    write_tokenizer(directory, **config)
    return Tokenizer.from_directory(directory)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80).map(nfc))
@example(text="the cat  sat\n\n on 漢字 and naïve 👩‍👩‍👧 <|im_end|>\t\r\n ")
@example(text="")
def test_spans_tile_the_text_and_ids_give_it_back(tokenizer, text):
    encoded = tokenizer.encode(text)
    assert len(encoded.ids) == len(encoded.spans)
    end = 0
    for start, stop in encoded.spans:
        assert start <= end <= stop
        end = stop
    assert end == len(text)
    assert tokenizer.decode(encoded.ids) == text
    assert not CONTROL & set(encoded.ids)


@pytest.mark.parametrize("control", SPECIAL)
def test_control_tokens_in_plain_text_stay_characters(tokenizer, control):
    text = f"the end{control}\n<|im_start|>system\n"
    assert not CONTROL & set(tokenizer.encode(text).ids)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert CONTROL & set(tokenizer.encode(text, special=True).ids)
    assert not CONTROL & set(tokenizer.encode(text).ids)  # in whichever order they were asked for


def test_a_control_token_that_merges_could_build_stays_characters(tmp_path):
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    merged = bpe().get_vocab()["the"]
    content["added_tokens"].append({"id": merged, "content": "the", "special": False, "single_word": False,
                                    "lstrip": False, "rstrip": False, "normalized": False})
    assert any("".join(pair) == "the" for pair in merges) and vocab["the"] == merged
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert merged not in tokenizer.encode("the").ids
    assert merged in tokenizer.encode("the", special=True).ids


def test_text_that_is_not_nfc_or_not_unicode_is_refused_with_a_way_out(tokenizer):
    text = unicodedata.normalize("NFD", "naïve")
    with pytest.raises(BadInput, match="nfc"):
        tokenizer.encode(text)
    assert tokenizer.encode(nfc(text)).spans[-1][1] == 5
    with pytest.raises(BadInput, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_no_token_is_added_even_when_the_tokenizer_would(tmp_path):
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    end = {"id": "<|endoftext|>", "ids": [bpe().get_vocab()["<|endoftext|>"]], "tokens": ["<|endoftext|>"]}
    content["post_processor"] = {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|endoftext|>": end}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "chat_template": CHATML}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert not CONTROL & set(tokenizer.encode("the cat", special=True).ids)
    # ... but the prompt begins as this tokenizer would begin it.
    assert tokenizer.prompt_parts("a", "b")[0].startswith("<|endoftext|><|im_start|>")


def test_prompt_parts_are_the_rendered_template_around_the_passages(tokenizer):
    before, after = tokenizer.prompt_parts("Use these.\n\n", "Who?", "Be brief.")
    assert before == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nUse these.\n\n"
    assert after == "Who?<|im_end|>\n<|im_start|>assistant\n"
    assert "system" not in tokenizer.prompt_parts("Use these.\n\n", "Who?")[0]


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML, None])
def test_a_bos_token_stands_first_exactly_once(tmp_path, template):
    tokenizer = with_config(tmp_path, bos_token="<|endoftext|>", add_bos_token=True, chat_template=template)
    before = tokenizer.prompt_parts("Use these.", "Who?")[0]
    assert before.startswith("<|endoftext|>") and before.count("<|endoftext|>") == 1


def test_without_a_template_the_parts_are_the_texts(tmp_path):
    tokenizer = with_config(tmp_path, chat_template=None)
    assert tokenizer.prompt_parts("Use these. ", "Who?") == ("Use these. ", "Who?")
    assert tokenizer.prompt_parts("Use these. ", "Who?", "Be brief.") == ("Be brief.\n\nUse these. ", "Who?")


@pytest.mark.parametrize(("template", "system", "named"), [
    ("{{ raise_exception('no system role') }}", "Be brief.", "no system role.*into the instructions"),
    ("{{ messages[-1].content }}", "Be brief.", "leaves the system message out"),
    ("{{ messages[0].role }}", None, "0 times"),
    ("{{ messages[0].content }}{{ messages[0].content }}", None, "2 times"),
])
def test_a_template_that_loses_a_part_is_refused(tmp_path, template, system, named):
    tokenizer = with_config(tmp_path, chat_template=template)
    with pytest.raises(BadInput, match=named):
        tokenizer.prompt_parts("Use these.", "Who?", system)


def test_eos_ids_come_from_every_place_that_names_one(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert with_config(tmp_path).eos_ids == (5, 7, 9, bpe().get_vocab()["<|im_end|>"])


def test_identity_ignores_the_template_and_tells_vocabularies_apart(tmp_path, tokenizer):
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
    assert with_config(tmp_path / "same", chat_template=None).identity == tokenizer.identity
    bpe((*SPECIAL, "<tool>")).save(str(tmp_path / "other" / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path / "other").identity != tokenizer.identity


def test_a_directory_without_a_fast_tokenizer_is_refused(tmp_path):
    with pytest.raises(BadModelFile, match=r"no tokenizer\.json.*slow"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadModelFile, match="can't be loaded"):
        Tokenizer.from_directory(tmp_path)


def test_a_sentence_begins_at_the_token_of_its_first_character():
    text = 'Go on. "Why?" he said\n\n3.5 is a number. 猫だ。犬'
    spans = ((0, 2), (2, 5), (5, 6), (6, 8), (8, 13), (13, 21), (21, 23), (23, 26), (26, 39), (39, 40),
             (40, 42), (42, 43), (43, 44), (43, 44), (43, 44))
    encoded = Encoded(tuple(range(len(spans))), spans, text)
    firsts = [text[spans[i][0] : spans[i][1]].strip() for i in encoded.sentence_starts]
    assert firsts == ["Go", '"', "he said", "3.5", "猫だ", "犬"]
    assert encoded.sentence_starts[-1] == 12  # of three tokens for one character the first


def test_tokens_without_letters_and_digits_are_formatting(tokenizer):
    encoded = Encoded((0,) * 7, ((0, 1), (1, 3), (3, 5), (5, 6), (6, 7), (6, 7), (7, 8)), "a, 7\n_é -")
    assert encoded.formatting.tolist() == [False, True, False, True, False, False, True]
    text = "the cat  sat\n\n on 漢字 (and) **naïve**"
    real = tokenizer.encode(text)
    expected = [not any(c.isalnum() for c in text[a:b]) for a, b in real.spans]
    assert real.formatting.tolist() == expected and real.text == text


@pytest.mark.parametrize("text", ["", "x", "." * 200_000, "\n" * 200_000, " " * 200_000 + "."])
def test_sentences_of_any_text_are_found_in_time(text):
    encoded = Encoded((0,) * len(text), tuple((i, i + 1) for i in range(len(text))), text)
    assert encoded.sentence_starts.tolist() == [0] and len(encoded.formatting) == len(text)
