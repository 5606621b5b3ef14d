"""The invariants on real models, in float32: reuse is exact where it must be, near full attention where it isn't."""

import numpy as np
import pytest

from cacheclip_jax.demo import CORPUS
from cacheclip_jax.documents import read_documents, split
from cacheclip_jax.engine import CacheClip
from cacheclip_jax.methods import Given
from cacheclip_jax.model.load import load_model
from cacheclip_jax.store import ChunkStore
from cacheclip_jax.verify import kl_divergence, verify
from tests.conftest import max_diff, stacked

pytestmark = pytest.mark.real

QUESTION = "How many tonnes does the crane Minna on South Quay lift?"


@pytest.fixture(scope="module", params=["smollm2-135m", "qwen2.5-coder-0.5b"])
def clip(request, real_model_path):
    """A model that scores for itself, over a store in memory."""
    model = load_model(real_model_path(request.param), dtype="float32")
    return CacheClip(model, model, ChunkStore.open(f"memory://real-{request.param}"))


@pytest.fixture(scope="module")
def chunks(clip):
    """Four passages, the one that answers among them."""
    documents = [d for d in read_documents([str(CORPUS)]) if d.name in ("quays.txt", "stores.txt")]
    passages = [p for d in documents for p in split(d, clip.primary.model.tokenizer, 128)]
    with_answer = next(p for p in passages if "Minna lifts 30 tonnes" in p.text)
    others = [p for p in passages if p is not with_answer]
    return [*others[:2], with_answer, others[-1]]


def test_reuse_passes_the_correctness_gate(clip, chunks):
    checks = {c.name.split(" of ")[0]: c for c in verify(clip, QUESTION, chunks, max_kl=1.0, min_agreement=0.5)}
    assert all(c.passed for c in checks.values()), checks


def test_ratio_one_repairs_the_whole_cache_and_ratio_zero_leaves_it(clip, chunks):
    full = clip.prefill(QUESTION, chunks, method="full")
    total = full.prompt.context_tokens
    every = clip.prefill(QUESTION, chunks, method=Given(tuple(range(total))))
    used = len(full.prompt.ids)
    assert max_diff(stacked(every.cache)[0][:, :, :used], stacked(full.cache)[0][:, :, :used]) < 2e-3
    naive = clip.prefill(QUESTION, chunks, method="naive")
    assert max_diff(naive.logits, full.logits) > 0.05
    repaired = clip.prefill(QUESTION, chunks, ratio=0.5)
    distances = [kl_divergence(np.asarray(full.logits), np.asarray(p.logits)) for p in (repaired, naive)]
    assert distances[0] <= distances[1] + 1e-3


def test_the_prompt_reads_as_the_chat_template_writes_it(clip, chunks):
    prompt = clip.primary.prompt(chunks, QUESTION)
    text = clip.primary.model.tokenizer.decode(prompt.ids)
    at = [text.index(p.text) for p in chunks]
    assert at == sorted(at) and text.index(QUESTION) > at[-1]
    np.testing.assert_array_equal(prompt.ids, clip.prefill(QUESTION, chunks, method="full").prompt.ids)
