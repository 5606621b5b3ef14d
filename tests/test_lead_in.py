"""Chunks encoded behind a lead-in: what is cached, what is read, and what stays exact."""

import numpy as np
import pytest

from cacheclip_jax import CacheClip, PromptFormat
from cacheclip_jax.encode import encode_many, no_prefix
from cacheclip_jax.methods import Full, Prefix
from cacheclip_jax.prompt import LEAD_IN, LEAD_IN_TOKENS
from cacheclip_jax.store import ChunkStore, Passage
from cacheclip_jax.verify import verify
from tests.conftest import max_diff
from tests.engine import QUESTION, TEXTS, ask, engine, models

SHORT = "the cat sat on the mat. the end of the hat.\n"
CHUNKS = list(map(Passage.make, TEXTS[:4]))


@pytest.fixture(scope="module")
def led(models) -> CacheClip:
    clip = engine(models, ChunkStore.open("memory://test-lead-in"), prompt_format=PromptFormat(lead_in=SHORT))
    clip.index(CHUNKS)
    return clip


@pytest.fixture(scope="module")
def plain(models) -> CacheClip:
    return engine(models, ChunkStore.open("memory://test-lead-in-plain"))


def test_a_chunks_cache_is_that_of_words_behind_prefix_and_lead_in(led):
    caches, passage = led.primary, CHUNKS[1]
    params, cfg, own = caches.model.params, caches.model.config, caches.encoded(passage).ids
    before = (*caches.prefix_ids, *caches.lead_in_ids)
    (_, whole), = encode_many(params, cfg, [[*before, *own]], no_prefix(params, cfg))
    (_, kv), = caches.encode([passage], "shared")
    assert len(caches.lead_in_ids) > 5
    assert max_diff(kv, whole[:, :, :, len(before):]) < 1e-4
    (_, alone), = caches.encode([passage], "none")
    (_, expected), = encode_many(params, cfg, [own], no_prefix(params, cfg))
    assert max_diff(alone, expected) < 1e-4


def test_no_prompt_holds_it_and_full_prefill_is_the_same(led, plain):
    ours, theirs = (clip.prefill(QUESTION, CHUNKS, method="full") for clip in (led, plain))
    np.testing.assert_array_equal(ours.prompt.ids, theirs.prompt.ids)
    assert max_diff(ours.logits, theirs.logits) == 0
    reused = [clip.prefill(QUESTION, CHUNKS, method="naive").logits for clip in (led, plain)]
    assert max_diff(*reused) > 1e-2


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"method": Prefix()}], ids=["ratio one", "prefix"])
def test_what_reuses_only_exact_caches_equals_full_prefill(led, options):
    got, full = (led.prefill(QUESTION, CHUNKS, **o) for o in (options, {"method": Full()}))
    assert max_diff(got.logits, full.logits) < 1e-3


def test_the_prefix_method_recomputes_the_first_chunk_only_behind_a_lead_in(led, plain):
    first = len(led.primary.encoded(CHUNKS[0]).ids)
    assert led.prefill(QUESTION, CHUNKS, method="prefix").plan.recompute.all()
    assert not plain.prefill(QUESTION, CHUNKS, method="prefix").plan.recompute[:first].any()


def test_caches_behind_another_lead_in_are_others(led, models):
    assert ask(led, method="naive", max_new_tokens=1).misses == 0
    other = engine(models, led.store)
    result = ask(other, method="naive", max_new_tokens=1)
    assert result.misses == 4 and "the prefix" in result.warnings[0]


def test_loading_gives_the_lead_in_for_any_purpose_and_its_length_is_bounded(pair):
    clip = CacheClip.load(*pair, "memory://test-lead-in-loaded", dtype="float32")
    assert clip.primary.format.lead_in == LEAD_IN and clip.aux.format.lead_in == LEAD_IN
    assert 0 < len(clip.primary.lead_in_ids) <= LEAD_IN_TOKENS


def test_verification_holds_behind_a_lead_in(led):
    failed = [check for check in verify(led, QUESTION, CHUNKS) if not check.passed and "KL" not in check.name
              and "top-1" not in check.name]  # what an untrained model's answers agree on says nothing
    assert not failed
