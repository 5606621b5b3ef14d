"""Question + aux caches -> one score per context token: which tokens the question's rows attend to in the aux model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

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
from cacheclip_jax.recompute import SPAN, LayerCache, embed_rows, rows_over_cached, rows_over_loaded


@dataclass(frozen=True)
class Scoring:
    """How attention becomes a score. All of it happens over the aux model's own tokens, before a score is mapped to the
    primary's where the tokenizers differ.

    layers: "last", "late" (the second half without the last layer), "all", or layer indices (negative ones count from
      the end).
    rows: over question rows, "mean", "max", "last" (the row that has read the whole question), or a number: the mean of
      so many last ones.
    heads: over query heads, "mean" or "max".
    context: "cached" (question rows over the model's own chunk caches), "joint" (the model prefills the whole prompt
      first: it sees across chunks, at the price of a prefill) or "alone" (the question is read behind the prefix only,
      then its queries meet the chunk caches' keys: see `alone.py`; it takes none of the settings below).
    values: weigh each attention weight by the L2 norm of the value it fetches: what a token adds to the row, up to the
      output projection (Kobayashi et al. 2020, "Attention is Not Only a Weight").
    head_weights: for each scored layer in ascending order a weight for each query head. The score is then the weighted
      sum over layers and heads, in place of their mean; learned weights come from finetuning the model.
    second_pass: the model recomputes this share of the context, its own best groups of 8 tokens, over its own assembled
      cache, and scores again from what that repaired (0: it scores once). Only with context "cached".
    look_ahead: greedy tokens that the model drafts after the question, at most; their rows see what an answer will need
      next. Their attention, reduced by `drafts` ("mean" or "max" over the tokens up to an end token), is added to the
      question's.
    """

    layers: Literal["last", "late", "all"] | tuple[int, ...] = "late"
    rows: Literal["mean", "max", "last"] | int = "last"
    heads: Literal["mean", "max"] = "mean"
    context: Literal["cached", "joint", "alone"] = "cached"
    values: bool = False
    head_weights: tuple[tuple[float, ...], ...] | None = None
    second_pass: float = 0.0
    look_ahead: int = 0
    drafts: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        for name, allowed in (("heads", ("mean", "max")), ("drafts", ("mean", "max")),
                              ("context", ("cached", "joint", "alone"))):
            if getattr(self, name) not in allowed:
                raise BadInput(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.rows not in ("mean", "max", "last") and not (isinstance(self.rows, int) and self.rows >= 1):
            raise BadInput(f"rows={self.rows!r}: choose mean, max, last or a number of rows from 1 on")
        if isinstance(self.layers, str) and self.layers not in ("last", "late", "all"):
            raise BadInput(f"layers={self.layers!r}: choose last, late, all or a tuple of layer indices")
        if self.look_ahead < 0:
            raise BadInput(f"look_ahead={self.look_ahead} is out of range: it must be 0 (none) or more")
        if not 0 <= self.second_pass <= 1:
            raise BadInput(f"second_pass={self.second_pass} is out of range: it must be between 0 (none) and 1")
        if self.second_pass and self.context == "joint":
            raise BadInput(f"second_pass={self.second_pass} needs context='cached': joint caches need no repair")
        if self.context == "alone":
            self._check_alone()
        if self.head_weights is not None:
            if self.heads != "mean":
                raise BadInput(f"heads={self.heads!r} and head_weights both say how heads count: leave one of them out")
            wrong = [w for layer in self.head_weights for w in layer if not 0 <= w < np.inf]
            if wrong:
                raise BadInput(f"head_weights has {wrong[0]}: weights are finite and not negative")

    def _check_alone(self) -> None:
        for name in ("values", "head_weights", "second_pass", "look_ahead"):
            if getattr(self, name):
                raise BadInput(f"{name}={getattr(self, name)} needs context='cached' or 'joint', not 'alone'")
        if isinstance(self.rows, int):
            raise BadInput(f"rows={self.rows} needs context='cached' or 'joint': 'alone' takes mean, max or last")

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
        """How many of the first layers must run: up to the last one that is scored, all where tokens are drafted."""
        return num_layers if self.look_ahead else self.layer_indices(num_layers)[-1] + 1

    @property
    def further(self) -> bool:
        """Whether scoring goes on after a first pass, from the rows and caches that it leaves."""
        return bool(self.second_pass or self.look_ahead)

    def layers_run(self, num_layers: int) -> int:
        """How many of the first layers run: `depth`, but over assembled caches in whole spans, since a layer more takes
        less than another program, of a shorter span, to compile."""
        depth = self.depth(num_layers)
        return min(-(-depth // SPAN) * SPAN, num_layers) if self.further or self.context == "joint" else depth

    @property
    def key(self) -> Scoring:
        """What compiled programs depend on: the settings that only say which of them run are left out, so that they
        share their programs."""
        return replace(self, context="cached", head_weights=None, second_pass=0.0, look_ahead=0, drafts="mean")

    @property
    def span_key(self) -> Scoring:
        """`key` of programs that are told which of their layers are scored: they are the same whatever all layers
        are."""
        return replace(self.key, layers="all")

    def weights(self, cfg: ModelConfig) -> Float[np.ndarray, "L N"] | None:
        """`head_weights` as an array over all layers, zero for those that aren't scored; None without any.

        Raises BadInput where they don't fit the model.
        """
        if self.head_weights is None:
            return None
        wanted = self.layer_indices(cfg.num_layers)
        given = [len(layer) for layer in self.head_weights]
        if given != [cfg.num_heads] * len(wanted):
            raise BadInput(f"head_weights has {len(given)} layers of {sorted(set(given))}: with layers={self.layers!r} "
                           f"this model takes {len(wanted)} layers of {cfg.num_heads}")
        out = np.zeros((cfg.num_layers, cfg.num_heads), np.float32)
        out[list(wanted)] = self.head_weights
        return out


# "paper" is what CacheClip (arXiv 2510.10129) does as far as known; "late" answers more of the demo's questions.
SCORINGS = {
    "late": Scoring(),
    "paper": Scoring(layers="last", rows="mean"),
    "late-joint": Scoring(context="joint"),
    "paper-joint": Scoring(layers="last", rows="mean", context="joint"),
}


@partial(jax.jit, static_argnames=("cfg", "scoring", "scored", "how", "keep"), donate_argnames="x")
def score_span(x: Float[Array, "T D"], layers: tuple[Layer, ...], cfg: ModelConfig, scoring: Scoring,
               scored: tuple[bool, ...], positions: Int[Array, "T"], last: Int[Array, ""], rows: Float[Array, "B R H"],
               where: Placement, total: Float[Array, "S"], how: str = "blocked",
               weights: Float[Array, "B N"] | None = None, keep: bool = False
               ) -> tuple[Float[Array, "T D"], Float[Array, "S"], tuple[LayerCache, ...]]:
    """A span of layers for the question's rows, over chunk caches just loaded. Attention in those that are `scored` is
    added to `total`, which `layer_mean` makes a score in the end. On demand beside it, the assembled caches with the
    rows' own keys and values in them."""
    own, kept = row_of_slot(positions, where.first.shape[0]), []
    for nth, layer in enumerate(layers):
        q, kv = rows_over_loaded(x, layer, cfg, positions, rows[nth], where, own)
        attended, seen = _attend(q, kv, positions, last, scoring, scored[nth], how, _of(weights, nth))
        x, total = decoder.finish(x, attended, layer, cfg), total + seen
        kept += [kv] if keep else []
    return x, total, tuple(kept)


@partial(jax.jit, static_argnames=("cfg", "scoring", "scored", "how", "size"))
def last_span_scores(x: Float[Array, "T D"], layers: tuple[Layer, ...], cfg: ModelConfig, scoring: Scoring,
                     scored: tuple[bool, ...], positions: Int[Array, "T"], last: Int[Array, ""],
                     rows: Float[Array, "B R H"], where: Placement, total: Float[Array, "S"], how: str,
                     weights: Float[Array, "B N"] | None, count: Float[Array, ""], prefix: Int[Array, ""], size: int
                     ) -> Float[Array, "C"]:
    """The scores of the context after a last `score_span`, whose last layer is scored; `count` layers are. Nothing
    reads that layer's rows or cache, so the compiler leaves out all of it behind the attention weights."""
    _, total, _ = score_span(x, layers, cfg, scoring, scored, positions, last, rows, where, total, how, weights)
    return context_scores(layer_mean(total, weights, count), prefix, size)


def embed_and_score(params: Params, cfg: ModelConfig, scoring: Scoring, ids: Int[Any, "T"], positions: Int[Any, "T"],
                    last: Int[Any, ""], cache: KVCache, how: str = "blocked", weights: Float[Any, "L N"] | None = None
                    ) -> tuple[Float[Array, "T D"], Float[Array, "S"], KVCache]:
    """Attention of the question's rows to every cache slot, reduced over rows, heads and layers; the rows as they leave
    the cache's last layer, and the cache with them in it. The cache is donated.

    `cache` holds prefix and context of the aux at slots 0.., of the model's first layers; the question's rows follow at
    `positions` (padding: -1, at the end), `last` is the index of the last real row, `weights` are the scoring's for
    this model. Rows after softmax sum to one over prefix, context and question, so scores of different chunks compare;
    the caller keeps the context's slots.
    """
    wanted, done = scoring.layer_indices(cfg.num_layers), []
    x = embed_rows(params.outer, ids)
    total = jnp.zeros(cache.slots, jnp.float32, device=params.final_norm.sharding)  # where the next one will be
    for start in range(0, len(cache.k), SPAN):
        span = range(start, min(start + SPAN, len(cache.k)))
        part = slice(span.start, span.stop)
        x, total, kept = cached_score_span(
            x, params.layers[part], cfg, scoring.span_key, tuple(layer in wanted for layer in span), positions, last,
            tuple(zip(cache.k[part], cache.v[part], strict=True)), total, how, _of(weights, part))
        done += kept
    return x, layer_mean(total, weights, len(wanted)), KVCache(*zip(*done, strict=True))


def score_layers(x: Float[Array, "T D"], layers: tuple[Layer, ...], cfg: ModelConfig, scoring: Scoring,
                 scored: tuple[bool, ...], positions: Int[Array, "T"], last: Int[Array, ""],
                 caches: Sequence[LayerCache], total: Float[Array, "S"], how: str,
                 weights: Float[Array, "B N"] | None
                 ) -> tuple[Float[Array, "T D"], Float[Array, "S"], tuple[LayerCache, ...]]:
    """What `score_span` does, over assembled caches."""
    kept = []
    for nth, (layer, cached) in enumerate(zip(layers, caches, strict=True)):
        q, kv = rows_over_cached(x, layer, cfg, positions, cached)
        attended, seen = _attend(q, kv, positions, last, scoring, scored[nth], how, _of(weights, nth))
        x, total = decoder.finish(x, attended, layer, cfg), total + seen
        kept.append(kv)
    return x, total, tuple(kept)


cached_score_span = jax.jit(score_layers, static_argnames=("cfg", "scoring", "scored", "how"),
                            donate_argnames=("x", "caches"))


def layer_mean(total: Float[Array, "S"], weights: Float[Any, "L N"] | None, layers: int | Float[Array, ""]
               ) -> Float[Array, "S"]:
    """The mean of what so many layers added up; head weights make the sum itself the score."""
    return total / layers if weights is None else total


def _of(weights, index):
    return None if weights is None else weights[index]


def _attend(q, kv, positions, last, scoring, scored, how, weights):
    """Row attention, and the attention weights of a scored layer reduced over rows and heads (0 for another one)."""
    keys, values = kv
    if not scored:
        return row_attention(q, keys, values, positions, for_rows(how, len(q))), 0.0
    count = {"last": 1, "mean": len(q), "max": len(q)}.get(scoring.rows, scoring.rows)
    take = partial(jax.lax.dynamic_slice_in_dim, start_index=jnp.maximum(last - count + 1, 0),
                   slice_size=min(count, len(q)))
    if how != "blocked" and for_rows(how, len(q)) == "dense":
        attended, seen = dense_with_weights(q, keys, values, positions)  # these weights are computed anyway
        seen = jnp.where(take(positions)[:, None, None] >= 0, take(seen), 0)
    else:
        attended = row_attention(q, keys, values, positions, for_rows(how, len(q)))
        seen = attention_weights(take(q), keys, take(positions))
    if scoring.values:
        norms = jnp.linalg.norm(values.astype(jnp.float32), axis=-1)
        seen *= jnp.repeat(norms, q.shape[1] // len(norms), axis=0)
    if weights is not None:
        seen = jnp.einsum("tns,n->ts", seen, weights, precision=precision(jnp.float32))
    else:
        seen = seen.mean(1) if scoring.heads == "mean" else seen.max(1)
    return attended, seen.max(0) if scoring.rows == "max" else seen.sum(0) / jnp.minimum(last + 1, count)


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
