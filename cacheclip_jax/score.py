"""Question + aux caches -> one score per context token: which tokens the question's rows attend to in the aux model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cacheclip_jax.assemble import KVCache, Placement, row_of_slot
from cacheclip_jax.attention import for_rows, row_attention
from cacheclip_jax.attention.dense import dense_with_weights
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Layer, Params
from cacheclip_jax.precision import precision
from cacheclip_jax.recompute import rows_over_cached, rows_over_loaded


@dataclass(frozen=True)
class Scoring:
    """How attention becomes a score.

    layers: "last", "late" (the second half without the last layer), "all", or layer indices (negative ones count from
      the end).
    rows: over question rows, "mean", "max", or "last" (the row that has read the whole question).
    heads: over query heads, "mean" or "max".
    context: "cached" (question rows over the model's own chunk caches), "joint" (the model prefills the whole prompt
      first: it sees across chunks, at the price of a prefill) or "alone" (the question is read behind the prefix only,
      then its queries meet the chunk caches' keys: see `alone.py`).
    """

    layers: Literal["last", "late", "all"] | tuple[int, ...] = "late"
    rows: Literal["mean", "max", "last"] = "last"
    heads: Literal["mean", "max"] = "mean"
    context: Literal["cached", "joint", "alone"] = "cached"

    def __post_init__(self) -> None:
        for name, allowed in (("rows", ("mean", "max", "last")), ("heads", ("mean", "max")),
                              ("context", ("cached", "joint", "alone"))):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if isinstance(self.layers, str) and self.layers not in ("last", "late", "all"):
            raise BadInput(f"layers={self.layers!r}: choose last, late, all or a tuple of layer indices")

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """The scored layers of a model with `num_layers` layers, ascending."""
        if self.layers == "last":
            return (num_layers - 1,)
        if self.layers == "all":
            return tuple(range(num_layers))
        if self.layers == "late":
            return tuple(range(num_layers // 2, max(num_layers - 1, num_layers // 2 + 1)))
        chosen = tuple(sorted({int(i) for i in self.layers}))
        if not chosen or any(not -num_layers <= i < num_layers for i in chosen):
            raise BadInput(f"layers={self.layers}: the model has layers 0 to {num_layers - 1}")
        return tuple(sorted({i % num_layers for i in chosen}))

    def depth(self, num_layers: int) -> int:
        """How many of the first layers must run: up to the last one that is scored."""
        return self.layer_indices(num_layers)[-1] + 1


# "paper" is what CacheClip (arXiv 2510.10129) does as far as known; "late" answers more of the demo's questions.
SCORINGS = {
    "late": Scoring(),
    "paper": Scoring(layers="last", rows="mean"),
    "late-joint": Scoring(context="joint"),
    "paper-joint": Scoring(layers="last", rows="mean", context="joint"),
}


@partial(jax.jit, static_argnames=("cfg", "scoring", "scored", "how"), donate_argnames="x")
def score_span(x: Float[Array, "T D"], layers: tuple[Layer, ...], cfg: ModelConfig, scoring: Scoring,
               scored: tuple[bool, ...], positions: Int[Array, "T"], last: Int[Array, ""], rows: Float[Array, "B R H"],
               where: Placement, total: Float[Array, "S"], how: str = "blocked"
               ) -> tuple[Float[Array, "T D"], Float[Array, "S"]]:
    """The part of `score` that a span of layers does, over chunk caches just loaded; those that are `scored` add to
    `total`, which is divided by their number in the end."""
    own = row_of_slot(positions, where.first.shape[0])
    for nth, layer in enumerate(layers):
        q, kv = rows_over_loaded(x, layer, cfg, positions, rows[nth], where, own)
        attended, seen = _attend(q, kv, positions, last, scoring, scored[nth], how)
        x, total = decoder.finish(x, attended, layer, cfg), total + seen
    return x, total


@partial(jax.jit, static_argnames=("cfg", "scoring", "how"))
def score(params: Params, cfg: ModelConfig, scoring: Scoring, ids: Int[Array, "T"], positions: Int[Array, "T"],
          last: Int[Array, ""], cache: KVCache, how: str = "blocked") -> Float[Array, "S"]:
    """Attention of the question's rows to every cache slot, reduced over rows, heads and layers.

    `cache` holds prefix and context of the aux at slots 0.., the question's rows follow at `positions` (padding: -1, at
    the end), `last` is the index of the last real row. Rows after softmax sum to one over prefix, context and question,
    so scores of different chunks compare; the caller keeps the context's slots.
    """
    x, total = decoder.embed(params, ids), jnp.zeros(cache.slots, jnp.float32)
    for index, layer in enumerate(params.layers[: scoring.depth(cfg.num_layers)]):
        q, kv = rows_over_cached(x, layer, cfg, positions, (cache.k[index], cache.v[index]))
        attended, seen = _attend(q, kv, positions, last, scoring, index in scoring.layer_indices(cfg.num_layers), how)
        x, total = decoder.finish(x, attended, layer, cfg), total + seen
    return total / len(scoring.layer_indices(cfg.num_layers))


def _attend(q, kv, positions, last, scoring, scored, how):
    """Row attention, and the weights of a scored layer reduced over rows and heads (0 for another one)."""
    keys, values = kv
    if not scored:
        return row_attention(q, keys, values, positions, for_rows(how, len(q))), 0.0
    if how != "blocked" and for_rows(how, len(q)) == "dense":
        attended, weights = dense_with_weights(q, keys, values, positions)  # these weights are computed anyway
        if scoring.rows == "last":
            weights = jax.lax.dynamic_slice_in_dim(weights, last, 1)
        else:
            weights = jnp.where(positions[:, None, None] >= 0, weights, 0)
    else:
        attended = row_attention(q, keys, values, positions, for_rows(how, len(q)))
        if scoring.rows == "last":
            weights = attention_weights(jax.lax.dynamic_slice_in_dim(q, last, 1), keys, positions[last][None])
        else:
            weights = attention_weights(q, keys, positions)
    over_heads = weights.mean(1) if scoring.heads == "mean" else weights.max(1)
    if scoring.rows == "max":
        return attended, over_heads.max(0)
    return attended, over_heads.sum(0) / (1 if scoring.rows == "last" else last + 1)


@partial(jax.jit, static_argnames="size")
def context_scores(scores: Float[Array, "S"], prefix: Int[Array, ""], size: int) -> Float[Array, "C"]:
    """The `size` scores from slot `prefix` on, zeros after the last slot."""
    return jax.lax.dynamic_slice_in_dim(jnp.pad(scores, (0, size)), prefix, size)


def attention_weights(q: Float[Array, "T N H"], keys: Float[Array, "K S H"], positions: Int[Array, "T"],
                      start: int | Int[Array, ""] = 0) -> Float[Array, "T N S"]:
    """Attention weights themselves over the slots from `start` to each row's position, zero for padding rows; T is the
    question's length or 1, so T x S is small here."""
    T, N, H = q.shape
    K, S, _ = keys.shape
    s = jnp.einsum("tkgh,ksh->tkgs", q.reshape(T, K, N // K, H), keys, preferred_element_type=jnp.float32,
                   precision=precision(q.dtype)) * H**-0.5
    slot = jnp.arange(S)
    seen = ((slot >= start) & (slot <= positions[:, None]))[:, None, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, s, -1e30), axis=-1), 0)
    return weights.reshape(T, N, S)


def map_scores(scores: np.ndarray, spans: tuple[tuple[int, int], ...], target: tuple[tuple[int, int], ...]
               ) -> np.ndarray:
    """Scores of one tokenisation of a text -> scores of another, through character spans.

    A token's score is spread evenly over its characters, and a character's share goes in equal parts to the target
    tokens that cover it (several where a character takes several tokens), so the mass is kept wherever the spans tile
    the text. Empty spans count as one character.
    """
    if spans == target:
        return scores
    length = max((end for _, end in (*spans, *target)), default=0) + 1
    density, covering = np.zeros(length), np.zeros(length)
    for value, (start, end) in zip(scores, spans, strict=True):
        end = max(end, start + 1)
        density[start:end] += value / (end - start)
    for start, end in target:
        covering[start : max(end, start + 1)] += 1
    mass = np.concatenate([[0.0], np.cumsum(density / np.maximum(covering, 1))])
    return np.array([mass[max(end, start + 1)] - mass[start] for start, end in target], np.float32)
