"""The correctness gate for a model pair: is reuse exact where it must be, and near full attention where it's not?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from cacheclip_jax.assemble import empty
from cacheclip_jax.bucket import bucket
from cacheclip_jax.engine import CacheClip, Chunk
from cacheclip_jax.methods import AuxGuided, Full, Given, Method, Naive
from cacheclip_jax.select import Budget
from cacheclip_jax.store import ChunkStore


@dataclass(frozen=True)
class Check:
    """One property: what was measured, the limit, and whether it holds."""

    name: str
    passed: bool
    measured: float
    limit: float
    explanation: str


def verify(clip: CacheClip, question: str, chunks: Sequence[Chunk], *, method: Method | None = None,
           answer_tokens: int = 16, max_kl: float = 0.2, min_agreement: float = 0.75) -> list[Check]:
    """Check a model pair on one question and its chunks.

    Exactness is judged on the first token's logits: their largest difference from full prefill must stay under 1e-3 in
    float32, else under twice the noise of full prefills that compute the same in another order (or one rounding of the
    largest logit, where that is more). Quality is judged on
    the tokens that full attention answers with: mean KL divergence from full attention's distributions, and how often
    the most likely token agrees.
    """
    method = method or AuxGuided(Budget(ratio=0.2))
    full = clip.prefill(question, chunks, method=Full(), reserve=answer_tokens)
    expected = np.asarray(full.logits)
    noise, limit = _noise(clip, full.prompt.ids, expected)
    every = Given(tuple(range(full.prompt.context_tokens)))
    recomputed = np.asarray(clip.prefill(question, chunks, method=every).logits)
    stated = f"largest logit difference; full prefill in another order differs by {noise:.2g}"
    checks = [
        _below("ratio 1.0 equals full prefill", float(np.abs(recomputed - expected).max()), limit, stated),
        *(_check_one_chunk(clip, question, chunks, limit, stated) if clip.store.kv == "exact" else
          _check_storage(clip, question, chunks, method)),
    ]
    ids = clip.greedy(full, answer_tokens)  # uses the cache up: the tokens' logits take a second prefill
    full = clip.prefill(question, chunks, method=Full(), reserve=answer_tokens)
    reference = np.stack([expected, *clip.continuation(full, ids)])
    reused = clip.prefill(question, chunks, method=method, reserve=answer_tokens)
    judged = np.stack([np.asarray(reused.logits), *clip.continuation(reused, ids)])
    kl = float(np.mean([kl_divergence(a, b) for a, b in zip(reference, judged, strict=True)]))
    agreement = float(np.mean(reference.argmax(-1) == judged.argmax(-1)))
    share = f"{reused.plan.recompute.mean():.1%} of the context recomputed"
    return [*checks,
            _below(f"KL divergence of the first {len(reference)} tokens", kl, max_kl, f"{method.name}, {share}"),
            Check(f"top-1 agreement of the first {len(reference)} tokens", agreement >= min_agreement, agreement,
                  min_agreement, f"{method.name}, {share}; at least the limit")]


def _check_one_chunk(clip: CacheClip, question: str, chunks: Sequence[Chunk], limit: float, stated: str
                     ) -> list[Check]:
    if clip.primary.lead_in_ids:  # behind one no chunk's cache is exact
        clip = CacheClip(clip.primary.model, None, ChunkStore.open("memory://verify-one-chunk"),
                         prompt_format=replace(clip.primary.format, lead_in=""))
    one_full = np.asarray(clip.prefill(question, chunks[:1], method=Full()).logits)
    one_reused = np.asarray(clip.prefill(question, chunks[:1], method=Naive()).logits)
    return [_below("one chunk at ratio 0 equals full prefill", float(np.abs(one_reused - one_full).max()), limit,
                   stated)]


def _check_storage(clip: CacheClip, question: str, chunks: Sequence[Chunk], method: Method) -> list[Check]:
    """What storing values in one byte costs: KL of the first token from reuse of the same caches stored exactly."""
    aux = None if clip.aux is None else clip.aux.model
    exact = CacheClip(clip.primary.model, aux, ChunkStore.open("memory://verify-exact"),
                      prompt_format=clip.primary.format)
    checks = []
    for each in (Naive(), method):
        ours, theirs = (np.asarray(c.prefill(question, chunks, method=each).logits) for c in (clip, exact))
        checks.append(_below(f"KL divergence of {each.name} from exact storage", kl_divergence(theirs, ours), 0.01,
                             f"first token, {clip.store.kv}; nothing else differs"))
    return checks


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """KL(reference || other) in nats, from logits."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64)) for x in (reference, other))
    return float(np.sum(np.exp(p) * (p - q)))


def _below(name: str, measured: float, limit: float, explanation: str) -> Check:
    # Written so that a NaN fails.
    return Check(name, bool(measured <= limit), measured, limit, explanation)


def _noise(clip: CacheClip, ids: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Largest logit difference between full prefills in one piece and in two, and the limit that follows from it."""
    model, worst = clip.primary.model, 0.0
    for part in (1 / 3, 2 / 3):
        cut = int(len(ids) * part)
        cache = empty(model.config, bucket(len(ids), 256, steps=4), clip.primary.dtype)
        _, cache = clip.rows(model, ids[:cut], np.arange(cut), cache)
        logits, _ = clip.rows(model, ids[cut:], np.arange(cut, len(ids)), cache)
        worst = max(worst, float(np.abs(np.asarray(logits) - expected).max()))
    if clip.primary.dtype == np.float32:
        return worst, 1e-3
    one_rounding = float(jnp.finfo(clip.primary.dtype).eps) * float(np.abs(expected).max())
    return worst, max(2 * worst, one_rounding)
