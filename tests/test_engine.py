"""The Python API on a tiny model pair: what is reused, made, repaired and recomputed, and that answers don't care."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from cacheclip_jax import Budget, CacheClip, PromptFormat, Sampling, Scoring
from cacheclip_jax.errors import BadInput
from cacheclip_jax.methods import AuxGuided, Full, Given, Naive
from cacheclip_jax.model.load import load_model
from cacheclip_jax.ranking import Ranking
from cacheclip_jax.store import ChunkStore, Passage
from tests.checkpoints import QWEN2, weights, write_directory
from tests.engine import GROUP, METHODS, OTHER, QUESTION, TEXTS, ask, clip, engine, fresh, greedy, models

# -------------------------------------------------------------------- chunk caches: found, made, repaired

def test_chunks_missing_from_the_store_are_encoded_and_found_the_next_time(fresh, clip):
    ids = [Passage.make(t).id for t in TEXTS[:4]]
    first, second = ask(fresh), ask(fresh)
    assert (first.hits, first.misses, set(first.encoded)) == (0, 8, set(ids))
    assert (second.hits, second.misses, second.encoded) == (8, 0, ())
    assert not first.repaired and not second.warnings
    assert first.token_ids == second.token_ids == ask(clip).token_ids
    assert sorted(fresh.store.passage_ids()) == sorted(ids) and not fresh.store.verify()


def test_one_missing_chunk_among_stored_ones_is_the_only_one_encoded(fresh):
    fresh.index(map(Passage.make, TEXTS[:3]))
    result = ask(fresh)
    assert (result.hits, result.misses, result.encoded) == (6, 2, (Passage.make(TEXTS[3]).id,))


def test_index_finds_what_is_there_and_an_interrupted_one_resumes(fresh):
    def stop(kind: str, n: int) -> None:
        if kind == "documents":
            raise KeyboardInterrupt

    passages = [Passage.make(f"{TEXTS[0]} Number {i}.") for i in range(132)]  # windows of 128
    with pytest.raises(KeyboardInterrupt):
        fresh.index(passages, progress=stop)
    report = fresh.index(passages)
    assert (report.encoded, report.found) == (2 * 4, 2 * 128)
    report = fresh.index(passages)
    assert (report.encoded, report.found, report.tokens) == (0, 2 * 132, 0)


@pytest.mark.parametrize("place", [-1, 500], ids=["data", "head"])
@pytest.mark.parametrize("role", ["primary", "aux"])
def test_a_flipped_byte_is_found_reported_and_repaired(fresh, tmp_path, role, place):
    fresh.index(map(Passage.make, TEXTS[:4]))
    before = ask(fresh)
    caches = getattr(fresh, role)
    passage = Passage.make(TEXTS[1])
    space = caches.space("shared")
    chunk = space.chunk_key(caches.encoded(passage).ids)
    (damaged,) = (tmp_path / "store").glob(f"kv/{space.key}/*/{chunk}.kv")
    data = bytearray(damaged.read_bytes())
    data[place] ^= 1
    damaged.write_bytes(data)
    after = ask(fresh)
    assert after.repaired == (passage.id,) and not after.encoded
    assert len(after.warnings) == 1 and passage.id in after.warnings[0]
    assert (after.hits, after.misses) == (7, 1)
    assert after.token_ids == before.token_ids
    assert not fresh.store.verify()
    again = ask(fresh)
    assert again.hits == 8 and not again.repaired and not again.warnings


@pytest.mark.parametrize("part, says", [("dtype", "the dtype (float32, not bfloat16)"), ("prefix", "the prefix"),
                                        ("model", "the model (primary, not other)")])
def test_a_store_made_otherwise_is_a_miss_and_the_warning_says_which_part_differs(models, pair, tmp_path, part, says):
    store = ChunkStore.open(f"memory://test-engine-{part}")
    engine(models, store).index(map(Passage.make, TEXTS[:4]))
    model, words = models[0], PromptFormat()
    if part == "dtype":
        model = load_model(pair[0], dtype="bfloat16")
    if part == "model":
        w = {name: x * np.float32(0.3) for name, x in weights(QWEN2, 5).items()}
        model = load_model(write_directory(tmp_path / "other", QWEN2, w), dtype="float32")
    if part == "prefix":
        words = PromptFormat(instructions="Answer from the passages.\n\n")
    other = CacheClip(model, None, store, prompt_format=words)
    result = ask(other, method="naive", max_new_tokens=1)
    assert (result.hits, result.misses) == (0, 4)
    assert len(result.warnings) == 1 and says in result.warnings[0]
    for unchanged in {"the dtype", "the prefix", "the model", "the shape"} - {says.partition(" (")[0]}:
        assert unchanged not in result.warnings[0]
    again = ask(other, method="naive", max_new_tokens=1)
    assert (again.hits, again.misses, again.warnings) == (4, 0, ())


@pytest.mark.parametrize("method", ["cacheclip", "prophetkv", "full"])
def test_answers_decode_in_bfloat16_too(pair, method):
    clip = CacheClip.load(*pair, "memory://test-engine-bfloat16", dtype="bfloat16", prompt_format=PromptFormat())
    assert len(ask(clip, method=method).token_ids) > 1


def test_a_model_that_scores_for_itself_shares_its_caches(models):
    alone = CacheClip(models[0], models[0], ChunkStore.open("memory://test-engine-own-aux"))
    report = alone.index(map(Passage.make, TEXTS[:4]))
    assert report.encoded == 4 and alone.store.stats().chunks == 4
    result = ask(alone)
    assert (result.hits, result.misses) == (8, 0) and result.recomputed_tokens


def test_what_another_process_indexes_meanwhile_is_not_encoded_again(models, tmp_path):
    one, other = (engine(models, ChunkStore.open(tmp_path / "store")) for _ in range(2))
    passages = [Passage.make(f"{text} Page {n}.") for n in range(12) for text in TEXTS]
    reports = []

    def meanwhile(kind, _):
        if kind == "tokens" and not reports:
            reports.append(other.index(passages))

    report = one.index(passages, progress=meanwhile)
    assert reports[0].encoded > len(passages)
    assert report.encoded <= 32 and report.encoded + report.found == 2 * len(passages)
    assert not one.primary.missing(passages) and not one.aux.missing(passages)


# -------------------------------------------------------------------- compiles

@pytest.mark.parametrize("method", METHODS)
def test_a_second_request_of_the_same_buckets_compiles_nothing(clip, method):
    ask(clip, QUESTION, TEXTS[:4], method=method)
    result = ask(clip, OTHER, [TEXTS[i] for i in (5, 2, 0, 4)], method=method)
    assert result.compiles == 0
    sampled = Sampling(temperature=1.0, seed=1)
    ask(clip, QUESTION, TEXTS[:4], method=method, sampling=sampled)
    stream = clip.stream(OTHER, [TEXTS[i] for i in (5, 2, 0, 4)], method=method, max_new_tokens=12,
                         sampling=Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=2))
    assert "".join(stream) == stream.result.text and stream.result.compiles == 0


def test_warm_up_leaves_nothing_to_compile(clip):
    chunks = TEXTS + TEXTS[:2]  # a size that no other test has
    clip.warmup(QUESTION, chunks, max_new_tokens=9)
    assert ask(clip, OTHER, chunks[::-1], 9).compiles == 0


# -------------------------------------------------------------------- decoding

@pytest.mark.parametrize("seed", range(4))
def test_streamed_pieces_join_to_the_text(clip, seed):
    stream = clip.stream(QUESTION, TEXTS[:4], sampling=Sampling(temperature=2.0, seed=seed), max_new_tokens=40)
    with pytest.raises(RuntimeError, match="isn't finished"):
        _ = stream.result
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text and len(pieces) > 2 and all(pieces)
    assert stream.result.text == clip.primary.model.tokenizer.decode(stream.result.token_ids)


def test_a_stop_string_cuts_the_text_before_it(clip):
    whole = ask(clip, method="full", max_new_tokens=40).text
    at = next(i for i in range(5, len(whole)) if whole[i : i + 2].isprintable() and whole.find(whole[i : i + 2]) == i)
    stream = clip.stream(QUESTION, TEXTS[:4], method="full", max_new_tokens=40, stop=["never", whole[at : at + 2]])
    assert "".join(stream) == stream.result.text == whole[:at]
    assert stream.result.finish_reason == "stop_string"


@pytest.mark.parametrize("limit", [1, 2, 5, 6])
def test_the_longest_answer_has_max_new_tokens(clip, greedy, limit):
    result = ask(clip, method="full", max_new_tokens=limit)
    assert result.token_ids == greedy.token_ids[:limit] and result.finish_reason == "length"


@pytest.mark.parametrize("at", [0, 1, 4, 5])
def test_an_end_token_ends_the_answer_and_is_not_part_of_it(clip, greedy, monkeypatch, at):
    ids = greedy.token_ids
    assert ids.index(ids[at]) == at
    monkeypatch.setattr(clip.primary.model.tokenizer, "eos_ids", (ids[at],))
    result = ask(clip, method="full")
    assert result.token_ids == ids[:at] and result.finish_reason == "stop"


def test_sampling_follows_its_seed_and_temperature_0_is_greedy(clip, greedy):
    drawn = [ask(clip, method="full", sampling=Sampling(temperature=1.5, seed=s)).token_ids for s in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    assert ask(clip, method="full", sampling=Sampling(temperature=0, seed=7)).token_ids == greedy.token_ids
    assert clip.greedy(clip.prefill(QUESTION, TEXTS[:4], method="full", reserve=12), 12) == greedy.token_ids


# -------------------------------------------------------------------- methods

@pytest.mark.parametrize("method, options", [
    ("prefix", {}), ("cacheclip", {"ratio": 1.0}), ("random", {"ratio": 1.0}),
    ("cacheclip", {"budget": Budget(mass=1.0)}), ("cacheclip", {"budget": Budget(tokens=10**6)}),
    (Given(tuple(range(10))), {})], ids=str)
def test_recomputing_all_that_another_chunk_could_change_equals_full_prefill(clip, greedy, method, options):
    chunks = TEXTS[:1] if isinstance(method, Given) else TEXTS[:4]  # one chunk needs no repair at all
    full = clip.prefill(QUESTION, chunks, method="full")
    repaired = clip.prefill(QUESTION, chunks, method=method, **options)
    np.testing.assert_allclose(repaired.logits, full.logits, atol=1e-4)
    if not isinstance(method, Given):
        assert ask(clip, method=method, **options).token_ids == greedy.token_ids


def test_reuse_without_repair_is_not_full_prefill_and_repair_comes_closer(clip):
    full, naive, half, most = (np.asarray(clip.prefill(QUESTION, TEXTS[:4], method=m).logits) for m in (
        Full(), Naive(), AuxGuided(Budget(ratio=0.5)), AuxGuided(Budget(ratio=0.9))))
    error = [np.abs(x - full).max() for x in (naive, half, most)]
    assert error[0] > 0.5 and error[2] < error[0]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("method", ["cacheclip", "random"])
def test_the_realised_ratio_is_the_wanted_one_within_a_group(clip, method, ratio):
    plan = clip.prefill(QUESTION, TEXTS[:4], method=method, ratio=ratio).plan
    wanted = round(ratio * len(plan.recompute))
    assert wanted <= plan.recompute.sum() < wanted + GROUP


def test_random_groups_are_reproducible(clip):
    first, second = (ask(clip, method="random") for _ in range(2))
    np.testing.assert_array_equal(first.selection.recompute, second.selection.recompute)
    assert first.token_ids == second.token_ids and first.selection.scores is None


@pytest.mark.parametrize("scoring", [Scoring(), Scoring(context="joint"), Scoring("all", "max", "max"), Scoring((-2,))],
                         ids=str)
def test_every_scoring_gives_each_context_token_a_score(clip, scoring):
    result = ask(clip, method=AuxGuided(Budget(ratio=0.3), scoring), max_new_tokens=1)
    scores = result.selection.scores
    assert scores is not None and scores.shape == (result.context_tokens,)
    assert np.isfinite(scores).all() and (scores >= 0).all() and scores.std() > 0


def test_a_selection_tells_what_its_groups_were_ranked_by(clip):
    def selected(ranking):
        return ask(clip, method=AuxGuided(ranking=ranking), max_new_tokens=1).selection

    plain, last = selected(Ranking()), selected(Ranking(skip_first=10_000, smooth=3))
    np.testing.assert_array_equal(plain.ranked, plain.scores)
    np.testing.assert_array_equal(last.scores, plain.scores)
    assert not last.ranked.any()


def test_joint_scores_are_the_cached_ones_for_one_chunk_and_not_for_several(clip):
    for chunks, same in ((TEXTS[:1], True), (TEXTS[:4], False)):
        joint, cached = (clip.prefill(QUESTION, chunks, method=AuxGuided(scoring=scoring)).plan.scores
                         for scoring in (Scoring(context="joint"), Scoring(context="cached")))
        assert np.allclose(joint, cached, atol=1e-5) == same


@pytest.mark.parametrize("method", METHODS)
def test_tokens_and_times_add_up(clip, method):
    r = ask(clip, method=method)
    assert r.reused_tokens + r.recomputed_tokens == r.context_tokens == len(r.selection.recompute)
    assert r.recomputed_tokens == r.selection.recompute.sum() == round(r.realised_ratio * r.context_tokens)
    prompt = clip.prefill(QUESTION, TEXTS[:4], method=method).prompt
    assert r.prefix_tokens + r.context_tokens + r.question_tokens == len(prompt.ids)
    times = asdict(r.times)
    ttft, _ = times.pop("ttft"), times.pop("decode")
    assert all(0 <= t <= ttft + 1e-3 for t in times.values()) and times["recompute"] > 0
    assert json.loads(json.dumps(r.to_dict()))["chunks"] == [Passage.make(t).id for t in TEXTS[:4]]


def test_without_an_aux_model_only_cacheclip_is_refused(models, clip, greedy):
    alone = CacheClip(models[0], None, clip.store)
    with pytest.raises(BadInput, match="cacheclip needs an aux model"):
        ask(alone)
    assert ask(alone, method="full").token_ids == greedy.token_ids
    assert ask(alone, method="naive").token_ids == ask(clip, method="naive").token_ids
