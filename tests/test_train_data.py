"""Examples: the tuning half only, tasks held out whole, questions that a corpus poses, and what the metric counts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.load import load_tokenizer
from cacheclip_jax.prompt import PromptFormat
from eval.tasks.split import half
from tests import samples
from tests.test_train_forward import ROWS, SLOTS, prompt_of
from train.benchmark import FILES, HAYSTACK, Benchmark, benchmark_examples
from train.corpus import Corpus, corpus_examples
from train.dataset import Asked, mapped
from train.example import Example, read_examples, write_examples
from train.losses import Loss
from train.packed import pack
from train.recall import overlap, recall, top_tokens

TEXT = ("port: Varnholm\nThe lighthouse of Varnholm was built in 1871 by the brothers who owned the quarry nearby.\n"
        "| keeper | Ines |\nkeeper = Ines Dahl\nIts lamp was changed twice before the harbour council sold it.\n")


@pytest.fixture(scope="module")
def tokenizer(pair):
    return load_tokenizer(pair[0])


@pytest.fixture
def folder(tmp_path):
    """A data folder with a file of open questions, which needles take their text from."""
    rows = [{"question": f"who built tower number {i}?", "answers": [f"mason {i}"],
             "ctxs": [{"title": f"Tower {i}", "text": f"Tower {i} of the town was built by mason {i} in a year."}]}
            for i in range(40)]
    samples.write(tmp_path / HAYSTACK, rows)
    return tmp_path


def test_examples_come_from_the_tuning_half_and_tasks_are_held_out_whole(folder):
    wanted = Benchmark(str(folder), ("nq", "vt"), ("niah_single_2",), per_task=5, holdout_per_task=3,
                       lengths=(900, 1200), chunk_tokens=64)
    made = benchmark_examples(wanted, samples.spans, folder / "work")
    assert {(e.part, e.task) for e in made} == {("train", "nq"), ("train", "vt"), ("holdout", "niah_single_2")}
    assert len({e.id for e in made}) == len(made) == 2 * (5 + 5 + 3)
    asked = [e.question.split("Question: ")[1].split("\n")[0] for e in made if e.task == "nq"]
    assert asked and all(half(q) == "tune" for q in asked)
    text = (folder / "work" / "haystack.txt").read_text()
    known = [half(f"who built tower number {i}?") == "tune" for i in range(40)]
    assert [f"Tower {i} of the town" in text for i in range(40)] == known
    assert max(len(samples.spans(c)) for e in made if e.task == "vt" for c in e.chunks) <= 64
    assert made == benchmark_examples(wanted, samples.spans, folder / "other")


def test_tasks_that_are_not_there_are_refused():
    with pytest.raises(BadInput, match="task 'niah' is unknown here"):
        Benchmark("", ("niah",))
    assert set(FILES.values()) >= {HAYSTACK}


def test_examples_come_back_from_disk(tmp_path):
    made = [Example("a/1", "a", "train", "read:\n", ("one\u2028two", "é"), "what?", " It", "Q {question}", "be kind")]
    write_examples(tmp_path / "examples.jsonl", made)
    assert read_examples(tmp_path / "examples.jsonl") == made


def corpus_of(tmp_path, **settings) -> Corpus:
    texts = [TEXT.replace("Varnholm", f"Varnholm{i}").replace("1871", str(1700 + i)) for i in range(12)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return Corpus((str(tmp_path / "docs.jsonl"),), chunk_tokens=400, length=1500, **settings)


def test_a_corpus_poses_clozes_and_lookups_among_passages_that_fit(tmp_path, tokenizer):
    corpus = corpus_of(tmp_path, per_passage=9)
    made = corpus_examples(corpus, tokenizer)
    assert {e.task for e in made} == {"cloze", "lookup"} and {e.part for e in made} == {"train", "holdout"}
    clozes = [e for e in made if e.task == "cloze"]
    assert any("built in ____ by" in e.question and "17" not in e.question for e in clozes)
    assert any('"keeper"' in e.question for e in made)
    for example in made:
        assert len(example.prompt(tokenizer).ids) <= 1500 and len(example.chunks) > 1
    assert made == corpus_examples(corpus, tokenizer)


def test_a_users_own_questions_are_asked_as_the_engine_asks_them(tmp_path, tokenizer, pair):
    (tmp_path / "mine.jsonl").write_text('{"question": "who keeps Varnholm3?"}\n')
    form = PromptFormat("be brief.\n", "- {text}\n", "Q: {question} A:", "sys")
    corpus = corpus_of(tmp_path, questions=str(tmp_path / "mine.jsonl"), per_passage=0, format=form)
    (made,) = corpus_examples(corpus, tokenizer)
    prompt = made.prompt(tokenizer)
    assert made.task == "questions" and any("Varnholm3 " in c for c in made.chunks)
    assert prompt.prefix == form.prefix_ids(tokenizer)
    assert prompt.question == form.question_ids(tokenizer, "who keeps Varnholm3?")
    assert all(c.startswith("- ") for c in made.chunks)


@pytest.mark.parametrize("text, message", [("\n", "every document is empty"), ("short.\n", "no sentence")])
def test_a_corpus_that_poses_no_question_is_refused(tmp_path, tokenizer, text, message):
    (tmp_path / "docs.txt").write_text(text)
    with pytest.raises(BadInput, match=message):
        corpus_examples(Corpus((str(tmp_path / "docs.txt"),)), tokenizer)


def test_recall_counts_the_teachers_best_tokens_in_what_select_takes():
    target = np.array([0, 5, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], np.float32)
    assert top_tokens(target, 0.1).nonzero()[0].tolist() == [1, 8]
    assert top_tokens(target, 0.5).nonzero()[0].tolist() == [1, 8, 9]
    scores = np.zeros(20, np.float32)
    scores[10] = 1
    assert recall(scores, target, (20,), 0.1) == 0.5  # the group of tokens 8 to 15
    assert recall(target, target, (20,), 0.5) == 1.0
    assert recall(scores, np.zeros(20, np.float32), (20,), 0.1) == 1.0


def test_overlap_compares_two_selections_of_one_size():
    target, scores = np.arange(32, dtype=np.float32), np.arange(32, dtype=np.float32)
    scores[:8] = 99
    assert overlap(target, target, (32,), 0.5) == 1.0
    assert overlap(scores, target, (32,), 0.5) == 0.5  # groups 0 and 3 instead of 2 and 3
    assert overlap(scores, target, (32,), 0.25) == 0.0


def test_scores_of_another_tokenizer_are_mapped_chunk_by_chunk(pair):
    primary, aux = load_tokenizer(pair[0]), load_tokenizer(pair[1])
    example = Example("a", "a", "train", "x", ("the cat sat", "the end mat"), "what?")
    asked = Asked(example, example.prompt(primary), example.prompt(aux), 256)
    assert asked.primary.chunk_lengths != asked.aux.chunk_lengths
    scores = np.arange(1, 1 + asked.primary.context_tokens, dtype=np.float32)
    out, first = mapped(scores, asked), asked.primary.chunk_lengths[0]
    assert out[: asked.aux.chunk_lengths[0]].sum() == pytest.approx(scores[:first].sum())
    assert out.sum() == pytest.approx(scores.sum())


@pytest.fixture(scope="module")
def packed(qwen2):
    return pack(prompt_of(qwen2[0]), SLOTS, ROWS)


def random_scores(packed, seed):
    return np.where(packed.context, np.random.default_rng(seed).exponential(size=SLOTS), 0).astype(np.float32)


@pytest.mark.parametrize("name", ["kl", "ranking", "recall"])
def test_every_loss_is_least_at_the_teachers_scores_whatever_their_scale(packed, name):
    loss = Loss(**{"kl": 0.0, "ranking": 0.0, "recall": 0.0} | {name: 1.0}, budgets=(0.2,), softness=0.01)
    target = random_scores(packed, 0)
    best = loss(target * 7, target, packed)["loss"]
    others = [loss(random_scores(packed, seed), target, packed)["loss"] for seed in range(1, 6)]
    assert best < min(others)
    if name == "kl":
        assert best == pytest.approx(0, abs=1e-5)


def test_the_soft_recall_is_the_recall_of_the_metric_where_it_is_sharp(packed):
    start, end = np.flatnonzero(packed.context)[[0, -1]]
    lengths = tuple(np.bincount(packed.part[packed.context])[1:].tolist())
    loss = Loss(0.0, 0.0, 1.0, budgets=(0.3,), softness=1e-5)
    for seed in range(4):
        scores, target = random_scores(packed, seed), random_scores(packed, 99)
        soft = 1 - float(loss(scores, target, packed)["loss"])
        exact = recall(scores[start : end + 1], target[start : end + 1], lengths, 0.3)
        assert soft == pytest.approx(exact, abs=1e-3)


def test_gradients_of_losses_are_finite_with_zeros_in_scores_and_target(packed):
    loss = Loss(1.0, 1.0, 1.0)
    target = np.where(np.arange(SLOTS) % 7 == 0, random_scores(packed, 1), 0)
    slopes = jax.grad(lambda s: loss(s, target, packed)["loss"])(jnp.where(np.arange(SLOTS) % 3, target, 0.0))
    assert np.isfinite(slopes).all() and np.abs(slopes).max() > 0


def test_losses_that_say_nothing_are_refused():
    with pytest.raises(BadInput, match="not all 0"):
        Loss(0.0, 0.0, 0.0)
    with pytest.raises(BadInput, match="budgets below 1"):
        dataclasses.replace(Loss(), budgets=(1.5,))
