"""The online path's loops over layers: score the question, repair the cache, or prefill in full.

Programs are dispatched a few layers each and the device runs behind: nothing here waits but for caches still to come.
"""

from __future__ import annotations

import jax
import numpy as np

from cacheclip_jax.assemble import KVCache
from cacheclip_jax.bucket import bucket
from cacheclip_jax.caches import ChunkCaches
from cacheclip_jax.clock import Clock
from cacheclip_jax.feed import Feed
from cacheclip_jax.methods import Plan
from cacheclip_jax.model.load import Model
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.recompute import SPAN, choose_rows, embed_rows, fresh_span, last_logits, reuse_span
from cacheclip_jax.score import Scoring, score, score_span

ROW_STEPS = 32  # sizes per doubling of the number of rows: padding costs at most 3% of the compute


def question_scores(caches: ChunkCaches, prompt: Prompt, scoring: Scoring, slots: int, feed: Feed | None) -> jax.Array:
    """Attention of the question to every slot of the aux model's cache [S]: over chunk caches that are still arriving,
    or without a `feed` over the aux model's own prefill of the whole prompt."""
    model, cfg, on = caches.model, caches.model.config, caches.pages.sharding
    ids, positions = padded(prompt.question, prompt.question_start + np.arange(len(prompt.question)), minimum=16)
    last, how = np.int32(len(prompt.question) - 1), model.attention.name
    if feed is None:
        _, cache = full_prefill(model, prompt.ids[: prompt.question_start], slots)
        return score(model.params, cfg, scoring, ids, positions, last, cache, how)
    ids, positions, last, total = jax.device_put((ids, positions, last, np.zeros(slots, np.float32)), on)
    x = embed_rows(model.params, ids)
    wanted = scoring.layer_indices(cfg.num_layers)
    for number, block in enumerate(feed.blocks):
        scored = tuple(layer in wanted for layer in block)
        x, total = score_span(x, model.params.layers[block.start : block.stop], cfg, scoring, scored, positions, last,
                              feed.take(number), feed.where, total, how)
        feed.computed(total)
    return total / len(wanted)


def repair(caches: ChunkCaches, prompt: Prompt, plan: Plan, slots: int, feed: Feed, clock: Clock
           ) -> tuple[jax.Array, KVCache]:
    """Push the plan's rows and the question through the primary, over caches that are still arriving; the last row's
    logits and the repaired cache."""
    model, cfg, on = caches.model, caches.model.config, caches.pages.sharding
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
        done += layers
        if number < len(feed.blocks) - 1:
            feed.computed(layers[-1][0])
    clock.watch("load", rows)
    logits = last_logits(model.params, cfg, x, last)
    feed.computed(logits)
    return logits, KVCache(*zip(*done, strict=True))


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
