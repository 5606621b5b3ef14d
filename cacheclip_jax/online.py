"""The online path's loops over layers: score the question, repair the cache, or prefill in full.

Programs are dispatched a few layers each and the device runs behind: nothing here waits but for caches still to come.
"""

from __future__ import annotations

import jax
import numpy as np

from cacheclip_jax.assemble import KVCache
from cacheclip_jax.bucket import ROW_STEPS, bucket
from cacheclip_jax.caches import ChunkCaches
from cacheclip_jax.clock import Clock
from cacheclip_jax.feed import Feed
from cacheclip_jax.methods import Plan
from cacheclip_jax.model.load import Model
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.recompute import SPAN, choose_rows, embed_rows, fresh_span, last_logits, reuse_span
from cacheclip_jax.refine import refine
from cacheclip_jax.score import Scoring, embed_and_score, layer_mean, score, score_span


def question_scores(caches: ChunkCaches, prompt: Prompt, scoring: Scoring, slots: int, feed: Feed | None) -> jax.Array:
    """Attention of the question to every slot of the aux model's cache [S]: over chunk caches that are still arriving,
    or without a `feed` over the aux model's own prefill of the whole prompt."""
    model, cfg, on = caches.asking, caches.model.config, caches.staging.sharding
    ids, positions = padded(prompt.question, prompt.question_start + np.arange(len(prompt.question)), minimum=16)
    last, how = np.int32(len(prompt.question) - 1), model.attention.name
    key, weights = scoring.key, scoring.weights(cfg)
    further = bool(scoring.second_pass or scoring.look_ahead)
    if feed is None:
        _, cache = full_prefill(caches.model, prompt.ids[: prompt.question_start], slots)
        if not further:
            return score(model.params, cfg, key, ids, positions, last, cache, how, weights)
        x, scores, cache = embed_and_score(model.params, cfg, key, ids, positions, last, cache, how, weights)
        return refine(model, prompt, scoring, (ids, positions, last), x, scores, cache)
    ids, positions, last, total = jax.device_put((ids, positions, last, np.zeros(slots, np.float32)), on)
    x, kept = embed_rows(model.params, ids), []
    wanted = scoring.layer_indices(cfg.num_layers)
    for number, block in enumerate(feed.blocks):
        scored, span = tuple(layer in wanted for layer in block), slice(block.start, block.stop)
        x, total, layers = score_span(x, model.params.layers[span], cfg, key, scored, positions, last,
                                      feed.take(number), feed.where, total, how,
                                      None if weights is None else weights[span], further)
        feed.computed(total)
        kept += layers
    scores = layer_mean(total, weights, len(wanted))
    if not further:
        return scores
    return refine(model, prompt, scoring, (ids, positions, last), x, scores, KVCache(*zip(*kept, strict=True)))


def repair(caches: ChunkCaches, prompt: Prompt, plan: Plan, slots: int, feed: Feed, clock: Clock
           ) -> tuple[jax.Array, KVCache]:
    """Push the plan's rows and the question through the primary, over caches that are still arriving; the last row's
    logits and the repaired cache."""
    model, cfg, on = caches.model, caches.model.config, caches.staging.sharding
    ids = np.zeros(slots, np.int32)
    ids[: len(prompt.ids)] = prompt.ids
    mask = plan.recompute
    if isinstance(mask, np.ndarray):
        mask = np.pad(mask, (0, bucket(len(mask)) - len(mask)))
    count = bucket(plan.count() + len(prompt.question), 64, ROW_STEPS)
    ids, mask = jax.device_put((ids, mask), on)
    x, positions, last = choose_rows(model.params, ids, mask, np.int32(len(prompt.prefix)),
                                     np.int32(prompt.question_start), np.int32(len(prompt.ids)), count)
    clock.watch("select", positions, "score")
    done: list = []
    for number, block in enumerate(feed.blocks):
        rows = feed.take(number)
        x, layers = reuse_span(x, model.params.layers[block.start : block.stop], cfg, positions, rows, feed.where,
                               model.attention.name)
        feed.computed(layers[-1][0])
        done += layers
    clock.watch("load", rows)
    return last_logits(model.params, cfg, x, last), KVCache(*zip(*done, strict=True))


def full_prefill(model: Model, ids: np.ndarray, slots: int) -> tuple[jax.Array, KVCache]:
    """Full prefill of a model: the last token's logits, and the cache."""
    cfg = model.config
    rows, positions = padded(ids, np.arange(len(ids)), minimum=64, steps=ROW_STEPS)
    rows, positions = jax.device_put((rows, positions), model.params.final_norm.sharding)
    x, done = embed_rows(model.params, rows), []
    for start in range(0, cfg.num_layers, SPAN):
        x, layers = fresh_span(x, model.params.layers[start : start + SPAN], cfg, positions, slots,
                               model.attention.name)
        done += layers
    return last_logits(model.params, cfg, x, np.int32(len(ids) - 1)), KVCache(*zip(*done, strict=True))


def padded(ids, positions: np.ndarray, minimum: int = 32, steps: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded to their bucket: ids with 0, positions with -1."""
    size = bucket(len(ids), minimum, steps)
    out_ids, out_positions = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    out_ids[: len(ids)], out_positions[: len(ids)] = ids, positions
    return out_ids, out_positions
