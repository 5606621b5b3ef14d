"""Splits, chunks and fits: what every task is made with."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheclip_jax.errors import BadInput
from eval.tasks.chunk import middle, packed, pieces, windows
from eval.tasks.fit import largest_fit
from eval.tasks.split import SEEDS, choose, half, seed_numbers
from tests.samples import spans

QUESTIONS = [f"Who built house number {i}?" for i in range(400)]


def test_questions_fall_about_half_into_each_split():
    assert 160 < sum(half(q) == "tune" for q in QUESTIONS) < 240


def test_the_half_of_a_question_never_changes():
    # Pinned: what was tuned on must stay out of reports, whatever becomes of the code.
    pinned = {"Who wrote Hamlet?": "report", "who  wrote hamlet?": "report", "Where was Łukasz born?": "report",
              "Who keeps the north light?": "report", "0": "report", "1": "report", "2": "tune", "3": "report",
              "4": "tune", "5": "tune"}
    assert {q: half(q) for q in pinned} == pinned and set(pinned.values()) == {"tune", "report"}


def test_the_halves_share_no_question_and_make_up_all():
    tune, report = (choose(QUESTIONS, str, split, 0, None) for split in ("tune", "report"))
    assert not set(tune) & set(report)
    assert sorted(tune + report) == sorted(choose(QUESTIONS, str, "all", 0, None)) == sorted(QUESTIONS)


def test_the_choice_depends_on_the_seed_and_not_on_the_files_order():
    shuffled = random.Random(0).sample(QUESTIONS, len(QUESTIONS))
    assert choose(QUESTIONS, str, "report", 3, 20) == choose(shuffled, str, "report", 3, 20)
    assert choose(QUESTIONS, str, "report", 3, 20) != choose(QUESTIONS, str, "report", 4, 20)
    assert choose(QUESTIONS, str, "report", 3, 40)[:20] == choose(QUESTIONS, str, "report", 3, 20)


def test_asking_for_more_questions_than_there_are_says_how_many_there_are():
    with pytest.raises(BadInput, match="count=9 is too many: the data has 3"):
        choose(["a", "b", "c"], str, "all", 0, 9)


def test_seed_numbers_of_splits_and_seeds_never_meet():
    assert not set(SEEDS["tune"]) & set(SEEDS["report"])
    seen = set()
    for split in ("tune", "report"):
        for seed in (0, 1, 99):
            numbers = set(seed_numbers(split, seed, 10_000))
            assert not numbers & seen and numbers <= set(SEEDS[split])
            seen |= numbers


@pytest.mark.parametrize(("split", "seed", "count"), [("all", 0, 1), ("tune", 100, 1), ("tune", -1, 1),
                                                      ("tune", 0, None), ("tune", 0, 10_001)])
def test_seeds_out_of_range_are_refused(split, seed, count):
    with pytest.raises(BadInput):
        seed_numbers(split, seed, count)


@settings(deadline=None)
@given(st.text(max_size=200), st.integers(1, 20), st.lists(st.integers(0, 200), max_size=4))
def test_windows_tile_the_text_and_hold_at_most_their_size(text, size, cuts):
    cuts = [c for c in cuts if c <= len(text)]
    chunks = windows(text, spans, size, cuts)
    assert "".join(chunks) == text
    assert all(0 < len(spans(chunk)) <= size for chunk in chunks)
    edges = {sum(map(len, chunks[:i])) for i in range(len(chunks) + 1)}
    assert set(cuts) <= edges


def test_a_character_of_several_tokens_is_never_cut():
    three = lambda text: [(i, i + 1) for i in range(len(text)) for _ in range(3)]  # noqa: E731
    assert windows("abcdef", three, 4) == ("ab", "cd", "ef")


def test_the_middle_of_a_fact_is_a_token_boundary_inside_it():
    text = "noise noise the magic number is 1234567. noise"
    fact = (text.index("the"), text.index(".") + 1)
    at = middle(text, spans, fact)
    assert fact[0] < at < fact[1] and at in {a for a, _ in spans(text)}
    with pytest.raises(BadInput, match="too short"):
        middle(text, spans, (0, 1))


def test_pieces_begin_at_headings_and_lose_nothing():
    text = "Intro. Passage 1:\nA\n\nPassage 2:\nB"
    assert pieces(text, r"Passage \d+:") == ("Intro. Passage 1:\nA\n\n", "Passage 2:\nB")


@settings(deadline=None)
@given(st.lists(st.text("ab ", min_size=1, max_size=30), max_size=12), st.integers(1, 30))
def test_packing_keeps_the_text_and_the_limit(parts, size):
    chunks = packed(parts, spans, size)
    assert "".join(chunks) == "".join(parts)
    assert all(c in parts or len(spans(c)) <= size + len(parts) for c in chunks)


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(0, 400), st.integers(1, 60))
def test_the_largest_fit_is_the_one_that_trying_them_all_finds(limit, base, slope):
    def tokens(n: int) -> int:
        return base + slope * n + (n * 7919) % slope  # uneven steps, never falling

    expected = [n for n in range(1, limit + 2) if tokens(n) <= limit]
    if not expected:
        with pytest.raises(BadInput, match="shortest"):
            largest_fit(lambda n: n, tokens, limit)
    else:
        assert largest_fit(lambda n: n, tokens, limit) == max(expected)
        assert largest_fit(lambda n: n, tokens, limit, high=3) == min(3, max(expected))


def test_the_largest_fit_is_found_in_few_tries():
    tried = []
    largest_fit(lambda n: tried.append(n) or n, lambda n: 300 + 13 * n, 131072)
    assert len(tried) < 16
