"""The online path's loops over layers: score the question, repair the cache, or prefill in full.

Programs are dispatched a few layers each and the device runs behind: nothing here waits but for caches still to come.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

from cacheclip_jax.alone import alone_span
from cacheclip_jax.assemble import KVCache
from cacheclip_jax.bucket import bucket
from cacheclip_jax.errors import ContextTooLong
from cacheclip_jax.model import decoder
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.params import Params
from cacheclip_jax.packed import Packed, pack
from cacheclip_jax.plan import Behind, Caches, Context, Plan, Tail
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.recompute import (
    SPAN,
    LayerCache,
    Rows,
    bias_of,
    choose_rows,
    embed_rows,
    fresh_span,
    last_fresh_span,
    last_logits,
    last_reuse_span,
    narrow_layer,
    reuse_span,
)
from cacheclip_jax.refine import refine
from cacheclip_jax.score import Scoring, context_scores, embed_and_score, last_span_scores, layer_mean, score_span
from cacheclip_jax.side import LayerFeed, Side, bucketed, up_to

if TYPE_CHECKING:
    from cacheclip_jax.request import Request


@dataclass(frozen=True)
class Repaired:
    """A cache that is ready to decode from, the last row's logits [V], and where decoding begins."""

    logits: jax.Array
    cache: KVCache
    tail: Tail


def execute(request: Request, plan: Plan, behind: Caches) -> Repaired:
    """Do what a plan says, over chunk caches encoded `behind` the shared prefix or nothing; None reuses nothing."""
    side, end = request.primary, len(request.prompt.ids)
    if plan.drop:
        return _prefill_kept(side, plan)
    if behind is None:
        return Repaired(*prefill(side), Tail(np.int32(end), np.int32(end)))
    return _repair(request, plan, behind)


def _repair(request: Request, plan: Plan, behind: Behind) -> Repaired:
    """Push the plan's rows and the question through the primary, over caches that may still be arriving."""
    side, prompt = request.primary, request.prompt
    model, cfg, how = side.model, side.model.config, side.model.attention.name
    wanted = None
    if isinstance(plan.recompute, np.ndarray):
        wanted = [not m.all() for m in np.split(plan.recompute, np.cumsum(prompt.chunk_lengths)[:-1])]
    feed = request.feed(behind, wanted)
    at, end = None, np.int32(len(prompt.ids))
    tail = Tail(end, end)
    if plan.reshape is not None:
        positions = parallel_positions(prompt, side.slots)
        at = jax.device_put(positions, side.sharding)
        context = Context.of(len(prompt.prefix), prompt.question_start, plan.reshape)
        tail = Tail(end, positions[end], context=context)
    x, slots, last = _chosen(side, plan, len(prompt.question))
    side.watch("select", slots, "score")
    done: list[LayerCache] = []
    if plan.dense_layers:
        everything, theirs, early = request.early(plan.dense_layers - 1)
        done = [(jnp.copy(k), jnp.copy(v)) for k, v in early]  # a decoded cache is given away, the request's isn't
        x, kv = narrow_layer(everything, model.params.layers[len(done)], cfg, theirs, slots, side.slots, how)
        done.append(kv)
        if len(done) == cfg.num_layers:
            logits = last_logits(model.params.outer, cfg, x, last)
    for number, block in enumerate(feed.blocks):
        rows = feed.take(number)
        # The device has nothing to do until the first block's program is launched: launching a smaller one takes less.
        size = SPAN if number == 0 else len(block)
        for start in range(max(block.start, len(done)), block.stop, size):
            stop = min(start + size, block.stop)
            span = (x, model.params.layers[start:stop], cfg, slots, rows, feed.where, how, start - block.start, at,
                    tail.context, plan.discount)
            if stop < cfg.num_layers:
                x, layers = reuse_span(*span)
            else:
                logits, layers = last_reuse_span(model.params.outer, last, *span)
            done += layers
        if number < len(feed.blocks) - 1:
            feed.computed(done[-1][0])
    side.watch("load", rows)
    feed.computed(logits)
    if plan.discount is not None:
        tail = Tail(end, end, bias_of(plan.discount, slots, side.slots))
    return Repaired(logits, KVCache(*zip(*done, strict=True)), tail)


def _prefill_kept(side: Side, plan: Plan) -> Repaired:
    """Prefill prefix, kept tokens and question, each at its position in the whole prompt, with nothing between them."""
    prompt = side.prompt
    x, positions, last = _chosen(side, plan, len(prompt.prefix) + len(prompt.question), with_prefix=True)
    side.watch("select", positions, "score")
    slots = jnp.where(positions < 0, -1, jnp.arange(len(positions)))
    logits, cache = _prefilled(side.model, x, last, slots, side.slots, positions)
    return Repaired(logits, cache, Tail(last + 1, np.int32(len(prompt.ids))))


def _chosen(side: Side, plan: Plan, besides: int, with_prefix: bool = False) -> tuple[Rows, jax.Array, jax.Array]:
    """The rows of a plan and `besides` others: embeddings, positions, index of the last one."""
    if plan.rows is not None:
        return plan.rows
    mask = plan.recompute
    if isinstance(mask, np.ndarray):
        mask = np.pad(mask, (0, bucket(len(mask)) - len(mask)))
    small = jax.device_put((*side.prompt.in_slots(side.slots), mask), side.sharding)
    return choose_rows(side.model.params.outer, *small, side.rows(plan.count() + besides, "repair"), with_prefix)


def parallel_positions(prompt: Prompt, slots: int) -> np.ndarray:
    """Each slot's position where every chunk begins behind the prefix, and the question behind the longest chunk."""
    at = np.arange(slots, dtype=np.int32)
    start = len(prompt.prefix)
    for length in prompt.chunk_lengths:
        at[start : start + length] -= start - len(prompt.prefix)
        start += length
    at[start:] -= start - len(prompt.prefix) - max(prompt.chunk_lengths)
    return at


def prefill(side: Side, tokens: int | None = None, spare: int = 0) -> tuple[jax.Array, KVCache]:
    """Full prefill of a side's prompt, or of its first `tokens`, into a cache with `spare` free slots or more."""
    ids = side.prompt.ids[:tokens]
    slots = side.slots if len(ids) + spare <= side.slots else bucket(side.slots + spare, 256)
    return full_prefill(side.model, ids, slots, side.rows(len(ids), "prefill"))


def full_prefill(model: Model, ids: np.ndarray, slots: int, rows: int | None = None) -> tuple[jax.Array, KVCache]:
    """Full prefill of a model: the last token's logits, and the cache. `rows`: with padding; the bucket by default."""
    rows = bucketed(len(ids), "prefill") if rows is None else rows
    x, positions = _embedded(model, ids, rows)
    return _prefilled(model, x, np.int32(len(ids) - 1), positions, slots)


def _prefilled(model: Model, x: Rows, last: Any, slots: jax.Array, size: int, at: jax.Array | None = None
               ) -> tuple[jax.Array, KVCache]:
    """Rows alone through all layers, into a cache of `size` slots: logits of the one with index `last`, and the cache.
    `at` has their positions where these aren't their slots."""
    params, cfg = model.params, model.config
    depth = (cfg.num_layers - 1) // SPAN * SPAN
    x, done = _through(model, x, depth, slots, size, at)
    logits, layers = last_fresh_span(params.outer, last, x, params.layers[depth:], cfg, slots, size,
                                     model.attention.name, at)
    return logits, KVCache(*zip(*done, *layers, strict=True))


def first_layers(model: Model, ids: np.ndarray, depth: int, slots: int, rows: int
                 ) -> tuple[Rows, jax.Array, list[LayerCache]]:
    """The first `depth` layers of a full prefill in `rows` rows, padding included: the rows after them, their positions
    (padding: -1), and the layers' caches."""
    x, positions = _embedded(model, ids, rows)
    x, done = _through(model, x, depth, positions, slots)
    return x, positions, done


def _embedded(model: Model, ids: np.ndarray, rows: int) -> tuple[Rows, jax.Array]:
    """A prompt from its beginning as `rows` rows, and their positions (padding: -1)."""
    ids, positions = jax.device_put(padded(ids, np.arange(len(ids)), rows), model.params.final_norm.sharding)
    return embed_rows(model.params.outer, ids), positions


def _through(model: Model, x: Rows, depth: int, slots: jax.Array, size: int, at: jax.Array | None = None
             ) -> tuple[Rows, list[LayerCache]]:
    """Rows alone through the first `depth` layers, see `fresh_span`."""
    done: list[LayerCache] = []
    for start in range(0, depth, SPAN):
        x, layers = fresh_span(x, model.params.layers[start : min(start + SPAN, depth)], model.config, slots, size,
                               model.attention.name, at)
        done += layers
    return x, done


class Asked(NamedTuple):
    """A question as rows that a model scores the context with, and what else its programs read beside caches."""

    ids: Int[Any, "T"]
    positions: Int[Any, "T"]
    known: Int[Any, "..."]  # index of the last row; of a question read alone, where context and question begin
    total: Float[Any, "S"]  # attention to each slot so far
    weights: list[Float[Any, "B N"] | None]  # of each block's heads
    count: Float[Any, ""]  # of scored layers
    prefix: Int[Any, ""]  # the slot where the context begins
    embedded: Rows  # the rows themselves; scoring over chunk caches uses them up

    @property
    def rows(self) -> tuple[Any, Any, Any]:
        """The rows alone."""
        return self.ids, self.positions, self.known


def ask(side: Side, scoring: Scoring, feed: LayerFeed | None) -> Asked:
    """Send a question to the device for `question_scores`, all of it at once; the side's caches follow."""
    prompt, model, cfg, end = side.prompt, side.model, side.model.config, len(side.prompt.ids)
    if scoring.look_ahead and end + scoring.look_ahead > cfg.max_positions:
        raise ContextTooLong(f"the prompt of {end} tokens and look_ahead={scoring.look_ahead} drafted ones don't fit "
                             f"{model.name}: the limit is {cfg.max_positions}. Draft fewer, or take shorter chunks.")
    read, positions = prompt.question, np.arange(prompt.question_start, end)
    known: Any = np.int32(len(read) - 1)
    if scoring.context == "alone":
        read = (*prompt.prefix, *prompt.question)
        positions = np.arange(len(read))
        known = np.array([len(prompt.prefix), prompt.question_start], np.int32)
    weights, blocks = scoring.weights(cfg), [] if feed is None else feed.blocks
    total, count, prefix = _constants(side.slots, len(scoring.layer_indices(cfg.num_layers)), len(prompt.prefix),
                                      side.sharding)
    sent = jax.device_put(pack((*padded(read, positions, side.rows(len(read), "question")), known,
                                [None if weights is None else weights[b.start : b.stop] for b in blocks])),
                          side.sharding)
    side.release()
    # Embedded right here: a call of a program lets go of Python's lock, which the thread that copies is waiting for.
    embedded, ids, positions, known, given = embed_question(model.asking.outer, sent)
    return Asked(ids, positions, known, total, given, count, prefix, embedded)


@jax.jit
def embed_question(outer: Params, sent: Packed) -> tuple[Any, ...]:
    """The embeddings of the ids that were packed first, and all that was packed."""
    ids, *others = sent.unpacked()
    return decoder.embed(outer, ids), ids, *others


@lru_cache(maxsize=64)
def _constants(slots: int, layers: int, prefix: int, sharding: Sharding
               ) -> tuple[Float[Array, "S"], Float[Array, ""], Int[Array, ""]]:
    """On the device what scoring reads that no question changes: no attention yet, how many layers are scored, and
    where the context begins."""
    return jax.device_put((np.zeros(slots, np.float32), np.float32(layers), np.int32(prefix)), sharding)


def question_scores(side: Side, scoring: Scoring, asked: Asked, feed: LayerFeed | None) -> Float[Array, "C"]:
    """Attention of the question to every context token, anything after them up to their bucket: over chunk caches that
    are still arriving, or without a `feed` over the model's own prefill of the whole prompt."""
    cfg, params, how = side.model.config, side.model.asking, side.model.attention.name
    weights, wanted = scoring.weights(cfg), scoring.layer_indices(cfg.num_layers)
    depth, size = scoring.layers_run(cfg.num_layers), bucket(side.prompt.context_tokens)
    if feed is None:
        _, cache = prefill(side, side.prompt.question_start)
        cache = KVCache(cache.k[:depth], cache.v[:depth])
        x, scores, cache = embed_and_score(params, cfg, scoring, *asked.rows, cache, how, weights)
        kept = list(zip(cache.k, cache.v, strict=True))
    else:
        x, total, kept, key = asked.embedded, asked.total, [], scoring.span_key
        for number, block in enumerate(up_to(feed.blocks, depth)):
            rows = feed.take(number)
            given = (x, params.layers[block.start : block.stop], cfg, key, tuple(layer in wanted for layer in block),
                     asked.positions, asked.known, rows, feed.where, total, how)
            if scoring.context == "alone":
                x, total = alone_span(*given)
            elif scoring.further or block.stop < depth:
                x, total, caches = score_span(*given, asked.weights[number], keep=scoring.further)
                kept += caches
            else:
                scores = last_span_scores(*given, asked.weights[number], asked.count, asked.prefix, size)
                feed.computed(scores)
                return scores
            feed.computed(total)
        scores = layer_mean(total, weights, asked.count)
    if scoring.further:
        scores = refine(side, scoring, asked.rows, x, scores, KVCache(*zip(*kept, strict=True)))
    return context_scores(scores, asked.prefix, size)


def padded(ids, positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded to `size`: ids with 0, positions with -1."""
    out_ids, out_positions = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    out_ids[: len(ids)], out_positions[: len(ids)] = ids, positions
    return out_ids, out_positions
