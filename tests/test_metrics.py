"""Metrics against cases computed by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput
from eval import metrics


@pytest.mark.parametrize(("metric", "prediction", "references", "expected"), [
    ("string_match_all", "They are 12, and 34.", ["12", "34"], 1.0),
    ("string_match_all", "They are 12.", ["12", "34"], 0.5),
    ("string_match_all", "the ALPHA one", ["Alpha"], 1.0),
    ("string_match_all", "", ["12"], 0.0),
    ("string_match_all", "12", [], 0.0),
    ("string_match_all", "two\x00lines", ["two\nlines"], 1.0),
    ("string_match_part", "in Paris, of course", ["London", "paris"], 1.0),
    ("string_match_part", "in Rome", ["London", "Paris"], 0.0),
    ("string_match_part", "", ["Paris"], 0.0),
    ("string_match_part", "Paris", [], 0.0),
    ("exact_match", "The  Eiffel-Tower!", ["eiffeltower"], 1.0),
    ("exact_match", "Eiffel", ["eiffel tower"], 0.0),
    ("exact_match", "the", [""], 1.0),
    ("f1", "the cat sat", ["a cat sat down"], 2 * 1.0 * (2 / 3) / (1 + 2 / 3)),
    ("f1", "cat cat", ["cat"], 2 * 0.5 * 1 / 1.5),
    ("f1", "Łódź", ["łódź."], 1.0),
    ("f1", "no", ["yes", "no"], 1.0),
    ("f1", "", ["cat"], 0.0),
    ("f1", "cat", [""], 0.0),
    ("f1", "the", ["a"], 0.0),
    ("f1", "cat", [], 0.0),
    ("f1_zh", "北京。", ["北京"], 1.0),
    ("f1_zh", "", ["北京"], 0.0),
    ("count", "There are 7 or 12", ["12"], 0.5),
    ("count", "twelve", ["12"], 0.0),
    ("count", "12", ["12"], 1.0),
    ("retrieval", "Paragraph 7", ["Paragraph 7"], 1.0),
    ("retrieval", "Paragraph 7 or Paragraph 8", ["Paragraph 7"], 0.5),
    ("retrieval", "", ["Paragraph 7"], 0.0),
    ("retrieval", "段落3", ["段落3"], 1.0),
    ("code_similarity", "\n# first a comment\nx = 1\ny = 2", ["x = 1"], 1.0),
    ("code_similarity", "abcd", ["abxd"], 0.75),
    ("code_similarity", "// nothing else", ["x"], 0.0),
    ("code_similarity", "", ["x"], 0.0),
])
def test_a_metric_gives_what_the_hand_gives(metric, prediction, references, expected):
    assert metrics.score(metric, prediction, references) == pytest.approx(expected)


def test_rouge_l_is_the_f_of_the_longest_common_subsequence():
    # LCS of "the cat sat here" and "the cat was here" is "the cat here": 3 of 4 words each way.
    assert metrics.rouge_l("the cat sat here", "the cat was here") == pytest.approx(0.75, abs=1e-6)
    assert metrics.rouge_l("same words", "same words") == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("prediction", "reference"), [("", "words"), ("words", ""), (".", "words"), ("", "")])
def test_rouge_l_of_nothing_is_zero(prediction, reference):
    assert metrics.rouge_l(prediction, reference) == 0


def test_rouge_l_of_a_sentence_too_long_for_the_librarys_recursion_is_still_computed():
    words = " ".join(f"w{i}" for i in range(1200))
    assert metrics.rouge_l(words, words) == pytest.approx(1, abs=1e-6)


def test_rouge_l_of_chinese_counts_words_not_spaces():
    assert metrics.rouge_l_zh("我们在北京开会", "我们在北京开会") == pytest.approx(1, abs=1e-6)
    assert metrics.rouge_l_zh("我们在北京开会", "他们在上海开会") < 1


def test_classification_shares_a_point_among_the_classes_named():
    classes = ["Food", "Food and drink", "Person"]
    assert metrics.score("classification", "Person", ["Person"], classes=classes) == 1
    assert metrics.score("classification", "Food or Person", ["Person"], classes=classes) == 0.5
    # "Food" is part of the right class's name, so naming that class doesn't name "Food" too.
    assert metrics.score("classification", "Food and drink", ["Food and drink"], classes=classes) == 1
    assert metrics.score("classification", "", ["Person"], classes=classes) == 0


def test_first_line_keeps_what_the_model_went_on_with_out_of_the_score():
    assert metrics.score("f1", "\nParis\nQuestion: next one", ["Paris"], first_line=True) == 1
    assert metrics.score("f1", "\nParis\nQuestion: next one", ["Paris"]) < 1


def test_unknown_metrics_and_classification_without_classes_are_refused():
    with pytest.raises(BadInput, match="f1"):
        metrics.score("bleu", "a", ["a"])
    with pytest.raises(BadInput, match="classes"):
        metrics.score("classification", "a", ["a"])
    with pytest.raises(BadInput, match="paragraph"):
        metrics.score("retrieval", "a", ["seven"])


@settings(deadline=None)  # the first example imports the libraries
@given(st.text(max_size=40), st.lists(st.text(max_size=40), max_size=3))
def test_every_score_lies_between_0_and_1(prediction, references):
    for metric in ("string_match_all", "string_match_part", "exact_match", "f1", "code_similarity", "count"):
        assert 0 <= metrics.score(metric, prediction, references) <= 1
