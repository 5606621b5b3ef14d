"""Scores refined by the model that made them: a second pass over caches that it repaired, and look-ahead.

Both go on from its assembled cache with the question's rows in it. They are programs of their own, dispatched
after the first pass without waiting for it: the selection of the second pass, and the drafted tokens, stay on device.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cacheclip_jax.assemble import KVCache
from cacheclip_jax.bucket import bucket
from cacheclip_jax.decode import padded_stop_ids
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Params
from cacheclip_jax.recompute import choose_rows, push_rows
from cacheclip_jax.score import Scoring, context_scores, embed_and_score, layer_mean, score_layers
from cacheclip_jax.select import Budget, select_on_device
from cacheclip_jax.side import Side


def refine(side: Side, scoring: Scoring, question: tuple[Any, Any, Any], x: Float[Array, "T D"],
           scores: Float[Array, "S"], cache: KVCache) -> Float[Array, "S"]:
    """The scores of a first pass after the scoring's second pass and look-ahead.

    `question` has its rows' ids, positions and the index of the last one; `x` are they as they left the last layer that
    ran, `cache` is the assembled one with their keys and values, of as many layers. The cache is used up.
    """
    model, cfg, slots, end = side.model, side.model.config, cache.slots, len(side.prompt.ids)
    weights, how = scoring.weights(cfg), model.attention.name
    if scoring.second_pass:
        cache = repair_best(side, scores, scoring.second_pass, cache)
        x, scores, cache = embed_and_score(model.asking, cfg, scoring, *question, cache, how, weights)
    if scoring.look_ahead:
        if end + scoring.look_ahead > slots:
            cache = widen(cache, bucket(end + scoring.look_ahead, 256))
        ahead = look_ahead(model.asking, cfg, scoring.key, x, question[2], np.int32(end), cache,
                           np.int32(scoring.look_ahead), padded_stop_ids(model), scoring.drafts, how, weights)
        scores = scores + ahead[:slots]
    return scores


def repair_best(side: Side, scores: Float[Array, "S"], ratio: float, cache: KVCache) -> KVCache:
    """The cache after the model recomputed the best groups of its own context by `scores`, as `execute` does it for the
    primary."""
    model, prompt = side.model, side.prompt
    ids, bounds = prompt.in_slots(cache.slots)
    bounds[2] = bounds[1]  # the question's rows come after this, over what is repaired here
    ids, bounds = jax.device_put((ids, bounds), side.sharding)
    own = context_scores(scores, np.int32(len(prompt.prefix)), bucket(prompt.context_tokens))
    best = select_on_device(own, prompt.chunk_lengths, Budget(ratio=ratio))
    x, positions, _ = choose_rows(model.params.outer, ids, bounds, best.mask, side.rows(best.count(), "repair"))
    return push_rows(model.params, model.config, x, positions, cache, model.attention.name)[1]


@partial(jax.jit, static_argnames="slots")
def widen(cache: KVCache, slots: int) -> KVCache:
    """The cache with free slots up to `slots` behind its own."""
    return jax.tree.map(lambda rows: jnp.pad(rows, ((0, 0), (0, slots - rows.shape[1]), (0, 0))), cache)


@partial(jax.jit, static_argnames=("cfg", "scoring", "drafts", "how"))
def look_ahead(params: Params, cfg: ModelConfig, scoring: Scoring, x: Float[Array, "T D"], last: Int[Array, ""],
               start: Int[Array, ""], cache: KVCache, steps: Int[Array, ""], end_ids: Int[Array, "M"],
               drafts: Literal["mean", "max"], how: str = "blocked", weights: Float[Array, "L N"] | None = None
               ) -> Float[Array, "S"]:
    """Attention of up to `steps` greedily drafted tokens to every slot, each one's reduced as `scoring` says, and their
    mean or maximum; zero where the first one ends the answer.

    The row `last` of `x`, out of the last layer, gives the first token, which goes to position `start`. An end token
    ends the draft and has no row.
    """
    wanted, nothing = scoring.layer_indices(cfg.num_layers), jnp.zeros(cache.slots, jnp.float32)
    scored = tuple(layer in wanted for layer in range(cfg.num_layers))

    def going(carry):
        step, token, _, _ = carry
        return (step < steps) & ~(token == end_ids).any()

    def draft(carry):
        step, token, cache, total = carry
        x, seen, kept = score_layers(
            decoder.embed(params, token[None]), params.layers, cfg, scoring, scored, (start + step)[None], jnp.int32(0),
            tuple(zip(cache.k, cache.v, strict=True)), nothing, how, weights)
        seen, cache = layer_mean(seen, weights, len(wanted)), KVCache(*zip(*kept, strict=True))
        total = total + seen if drafts == "mean" else jnp.maximum(total, seen)
        return step + 1, decoder.logits(params, cfg, x)[0].argmax(), cache, total

    first = decoder.logits(params, cfg, jax.lax.dynamic_slice_in_dim(x, last, 1))[0].argmax()
    drafted, _, _, total = jax.lax.while_loop(going, draft, (jnp.int32(0), first, cache, nothing))
    return total / jnp.maximum(drafted, 1) if drafts == "mean" else total
