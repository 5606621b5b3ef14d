"""Rows through the primary against an assembled cache: masked grouped recompute, and full prefill as its limit.

The layers run in spans, one compiled program each. A span takes the caches of its layers in one of three states: rows
from the store that it places itself, an assembled cache, or nothing. So the first layers compute while the caches of
the later ones are on their way, and no layer's cache is ever copied.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cacheclip_jax.assemble import Fresh, KVCache, Placement, place, row_of_slot
from cacheclip_jax.attention import causal_attention, for_rows, reshaped, row_attention
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Layer, Params
from cacheclip_jax.model.rope import rotate
from cacheclip_jax.packed import Packed
from cacheclip_jax.plan import Context, Discount, Tail
from cacheclip_jax.ranking import rank_tokens
from cacheclip_jax.select import select_groups

SPAN = 2  # layers of a program where nothing else decides: all at once take several times as long to compile on a CPU

Rows = Float[Array, "T D"]
LayerCache = tuple[Float[Array, "K S H"], Float[Array, "K S H"]]


@partial(jax.jit, static_argnames=("count", "with_prefix"))
def choose_rows(params: Params, ids: Int[Array, "S"], bounds: Int[Array, "3"], recompute: Bool[Array, "C"], count: int,
                with_prefix: bool = False) -> tuple[Rows, Int[Array, "T"], Int[Array, ""]]:
    """The rows of a prompt (see `Prompt.in_slots`): the context tokens to `recompute` and the question, on demand the
    prefix too, sorted by position, padded to `count` with position -1; their embeddings, positions, and the index of
    the last one. On device, so that a selection made there needs no trip to the host."""
    slot, (prefix, question, end) = jnp.arange(ids.shape[0]), bounds
    context = recompute[jnp.clip(slot - prefix, 0, recompute.shape[0] - 1)] & (slot >= prefix) & (slot < question)
    always = ((slot >= question) & (slot < end)) | (with_prefix & (slot < prefix))
    positions = jnp.nonzero(context | always, size=count, fill_value=-1)[0]
    return decoder.embed(params, ids[positions]), positions.astype(jnp.int32), (positions >= 0).sum(dtype=jnp.int32) - 1


@partial(jax.jit, static_argnames="count")
def best_rows(params: Params, given: Packed, scores: Float[Array, "C"], count: int
              ) -> tuple[Bool[Array, "C"], Float[Array, "C"] | None, tuple[Rows, Int[Array, "T"], Int[Array, ""]],
                         Discount | None]:
    """`rank_tokens`, `select_groups` and `choose_rows` as one program: between scoring and recompute there is no other.
    `given` are a prompt's ids and bounds (see `Prompt.in_slots`), Ranks or None, Best, and what comes out again last.
    """
    ids, bounds, ranks, best, discount = given.unpacked()
    ranked = None if ranks is None else rank_tokens(scores, ranks, ranks.said(ids, bounds, len(scores)))
    mask = select_groups(scores if ranked is None else ranked, best)
    return mask, ranked, choose_rows(params, ids, bounds, mask, count), discount


@partial(jax.jit, static_argnames=("cfg", "how", "first"), donate_argnames="x")
def reuse_span(x: Rows, layers: tuple[Layer, ...], cfg: ModelConfig, slots: Int[Array, "T"],
               rows: Float[Array, "B R H"], where: Placement, how: str = "blocked", first: int = 0,
               at: Int[Array, "S"] | None = None, context: Context | None = None, discount: Discount | None = None
               ) -> tuple[Rows, tuple[LayerCache, ...]]:
    """A span of layers over chunk caches just loaded, from the block's layer `first` on: place them with the rows' K
    and V over stale ones, attend, finish. Slots are positions, unless `at` has those of all slots; the rows'
    attention to a `context` is reshaped, with a `discount` stale slots count less."""
    return _reuse(x, layers, cfg, slots, rows, where, how, first, at, context, discount)


@partial(jax.jit, static_argnames=("cfg", "how", "first"))
def last_reuse_span(outer: Params, last: Int[Array, ""], x: Rows, layers: tuple[Layer, ...], cfg: ModelConfig,
                    slots: Int[Array, "T"], rows: Float[Array, "B R H"], where: Placement, how: str = "blocked",
                    first: int = 0, at: Int[Array, "S"] | None = None, context: Context | None = None,
                    discount: Discount | None = None) -> tuple[Float[Array, "V"], tuple[LayerCache, ...]]:
    """`reuse_span` for the model's last layers, and the logits of the row with index `last`. All rows need K and V in
    the last layer; what comes after them there is computed for that one row."""
    x, caches = _reuse(x, layers, cfg, slots, rows, where, how, first, at, context, discount, last)
    return decoder.logits(outer, cfg, x)[0], caches


def _reuse(x, layers, cfg, slots, rows, where, how, first, at, context, discount, last=None):
    own, out = row_of_slot(slots, where.first.shape[0]), []
    bias = None if discount is None else discount.bias(own)
    for nth, layer in enumerate(layers):
        q, kv = rows_over_loaded(x, layer, cfg, slots, rows[first + nth], where, own, at)
        x = _finish(x, layer, cfg, q, kv, slots, how, bias, context, last if nth == len(layers) - 1 else None)
        out.append(kv)
    return x, tuple(out)


def _finish(x, layer, cfg, q, kv, slots, how, bias=None, context=None, only=None):
    """Attention and the rest of a layer, for all rows or the one with index `only`."""
    if only is not None:
        x, q, slots = (jax.lax.dynamic_slice_in_dim(rows, only, 1) for rows in (x, q, slots))
    return decoder.finish(x, _attention(q, kv, slots, how, bias, context), layer, cfg)


def _attention(q: Float[Array, "T N H"], kv: LayerCache, slots: Int[Array, "T"], how: str,
               bias: Float[Array, "S"] | None = None, context: Context | None = None) -> Float[Array, "T N H"]:
    with jax.named_scope("attention"):
        if context is not None:
            return reshaped(q, *kv, slots, context, bias)
        return row_attention(q, *kv, slots, for_rows(how, len(q)), bias)


def rows_over_loaded(x: Rows, layer: Layer, cfg: ModelConfig, slots: Int[Array, "T"], loaded: Float[Array, "R H"],
                     where: Placement, own: Int[Array, "S"], at: Int[Array, "S"] | None = None
                     ) -> tuple[Float[Array, "T N H"], LayerCache]:
    """One layer's rotated queries of rows, and its cache from rows just loaded with the rows' own K and V in it; `own`
    is `row_of_slot` of their slots, `at` the slots' positions where they aren't the slots themselves."""
    q, k, v = decoder.project(x, layer, cfg)
    fresh = Fresh(k.swapaxes(0, 1), v.swapaxes(0, 1), own)
    positions = slots if at is None else at[slots]
    return rotate(q.swapaxes(0, 1), positions, cfg.rope).swapaxes(0, 1), place(cfg, loaded, where, fresh, at)


@partial(jax.jit, static_argnames="size")
def bias_of(discount: Discount, slots: Int[Array, "T"], size: int) -> Float[Array, "S"]:
    """What a discount adds to the logits of `size` slots where those of `slots` were recomputed."""
    return discount.bias(row_of_slot(slots, size))


@partial(jax.jit, static_argnames=("cfg", "how"), donate_argnames=("x", "caches"))
def cached_span(x: Rows, layers: tuple[Layer, ...], cfg: ModelConfig, positions: Int[Array, "T"],
                caches: tuple[LayerCache, ...], how: str = "blocked") -> tuple[Rows, tuple[LayerCache, ...]]:
    """A span of layers over an assembled cache, which is donated."""
    out = []
    for layer, cache in zip(layers, caches, strict=True):
        x, kv = attend_and_finish(x, layer, cfg, positions, cache, how)
        out.append(kv)
    return x, tuple(out)


def attend_and_finish(x: Rows, layer: Layer, cfg: ModelConfig, slots: Int[Array, "T"], cache: LayerCache, how: str,
                      at: Int[Array, "T"] | None = None, tail: Tail | None = None) -> tuple[Rows, LayerCache]:
    """One layer for rows over an assembled cache: overwrite their K and V, attend, finish. `at` has the rows' positions
    where these aren't their slots; with a `tail` it says so, and how to attend."""
    bias = context = None
    if tail is not None:
        at, bias, context = tail.positions(slots), tail.bias, tail.context
    q, kv = rows_over_cached(x, layer, cfg, slots, cache, at)
    return _finish(x, layer, cfg, q, kv, slots, how, bias, context), kv


def rows_over_cached(x: Rows, layer: Layer, cfg: ModelConfig, slots: Int[Array, "T"], cache: LayerCache,
                     at: Int[Array, "T"] | None = None) -> tuple[Float[Array, "T N H"], LayerCache]:
    """One layer's rotated queries of rows, and its cache with the rows' own K and V written into it; `at` has the rows'
    positions where these aren't their slots."""
    q, k, v = decoder.project(x, layer, cfg)
    positions = slots if at is None else at
    q = rotate(q.swapaxes(0, 1), positions, cfg.rope).swapaxes(0, 1)
    # Padding rows write to the slot after the last one, which mode="drop" discards (-1 would wrap around).
    slots = jnp.where(slots < 0, cache[0].shape[1], slots)
    new = rotate(k.swapaxes(0, 1), positions, cfg.rope), v.swapaxes(0, 1)
    keys, values = (old.at[:, slots].set(rows, mode="drop", indices_are_sorted=True)
                    for old, rows in zip(cache, new, strict=True))
    return q, (keys, values)


@partial(jax.jit, static_argnames=("cfg", "size", "how"), donate_argnames="x")
def fresh_span(x: Rows, layers: tuple[Layer, ...], cfg: ModelConfig, slots: Int[Array, "T"], size: int,
               how: str = "blocked", at: Int[Array, "T"] | None = None) -> tuple[Rows, tuple[LayerCache, ...]]:
    """A span of layers of a full prefill: row t is the token in slot t, the cache of `size` slots holds nothing else.
    `at` has the rows' positions where these aren't their slots.

    Causal attention among the rows is then row attention; on a GPU the library's kernel computes it.
    """
    return _fresh(x, layers, cfg, slots, size, how, at)


@partial(jax.jit, static_argnames=("cfg", "size", "how"))
def last_fresh_span(outer: Params, last: Int[Array, ""], x: Rows, layers: tuple[Layer, ...], cfg: ModelConfig,
                    slots: Int[Array, "T"], size: int, how: str = "blocked", at: Int[Array, "T"] | None = None
                    ) -> tuple[Float[Array, "V"], tuple[LayerCache, ...]]:
    """`fresh_span` for the model's last layers, and the logits of the row with index `last`; see `last_reuse_span`."""
    x, caches = _fresh(x, layers, cfg, slots, size, how, at, last)
    return decoder.logits(outer, cfg, x)[0], caches


def _fresh(x, layers, cfg, slots, size, how, at, last=None):
    out = []
    for nth, layer in enumerate(layers):
        q, k, v = _rotated(x, layer, cfg, slots if at is None else at)
        kv = _in_slots(k, v, slots, size)
        only = last if nth == len(layers) - 1 else None
        if only is None and how in ("cudnn", "mosaic_gpu"):
            with jax.named_scope("attention"):
                attended = causal_attention(q[None], k[None], v[None], how)[0]
            x = decoder.finish(x, attended, layer, cfg)
        else:
            x = _finish(x, layer, cfg, q, kv, slots, how, only=only)
        out.append(kv)
    return x, tuple(out)


@partial(jax.jit, static_argnames=("cfg", "size", "how"))
def narrow_layer(x: Float[Array, "A D"], layer: Layer, cfg: ModelConfig, everything: Int[Array, "A"],
                 positions: Int[Array, "T"], size: int, how: str = "blocked") -> tuple[Rows, LayerCache]:
    """One layer in which every token of the prompt gets fresh K and V, and only the rows at `positions` go on; row a of
    `x` is token a, `everything` their positions (padding: -1)."""
    q, k, v = _rotated(x, layer, cfg, everything)
    kv = _in_slots(k, v, everything, size)
    chosen = jnp.maximum(positions, 0)
    return decoder.finish(x[chosen], _attention(q[chosen], kv, positions, how), layer, cfg), kv


def _rotated(x, layer, cfg, positions):
    q, k, v = decoder.project(x, layer, cfg)
    q, k = (rotate(y.swapaxes(0, 1), positions, cfg.rope) for y in (q, k))
    return q.swapaxes(0, 1), k, v.swapaxes(0, 1)


def _in_slots(k, v, slots, size):
    """K and V of rows 0, 1, ... in a cache of `size` slots, padding as zeros."""
    zeros, real = jnp.zeros((k.shape[0], size, k.shape[2]), k.dtype), (slots >= 0)[:, None]
    return tuple(zeros.at[:, : len(slots)].set(jnp.where(real, y, 0)[:, :size]) for y in (k, v))


@partial(jax.jit, static_argnames="cfg")
def last_logits(params: Params, cfg: ModelConfig, x: Rows, last: Int[Array, ""]) -> Float[Array, "V"]:
    """Next-token logits of the row with index `last`."""
    return decoder.logits(params, cfg, jax.lax.dynamic_slice_in_dim(x, last, 1))[0]


@jax.jit
def embed_rows(params: Params, ids: Int[Array, "T"]) -> Rows:
    """Embeddings of rows."""
    return decoder.embed(params, ids)


def recompute(params: Params, cfg: ModelConfig, ids: Int[Any, "T"], positions: Int[Any, "T"], last: Any,
              cache: KVCache, how: str = "blocked") -> tuple[Float[Array, "V"], KVCache]:
    """Push rows through every layer, overwriting their K and V in the cache; logits of the row with index `last`.

    Rows are sorted by absolute position, padding rows (position -1) come last. At each layer a row attends to every
    slot at or before its own position: stale rows of the cache and fresh ones alike. With every token of a prompt as a
    row this is full prefill, exactly. The cache is donated.
    """
    x, cache = push_rows(params, cfg, embed_rows(params.outer, ids), positions, cache, how)
    return last_logits(params.outer, cfg, x, last), cache


def push_rows(params: Params, cfg: ModelConfig, x: Rows, positions: Int[Any, "T"], cache: KVCache, how: str = "blocked"
              ) -> tuple[Rows, KVCache]:
    """Rows through the layers that the cache has, the first ones of the model, and the repaired cache. `x` and the
    cache are donated."""
    done: list[LayerCache] = []
    for start in range(0, len(cache.k), SPAN):
        span = slice(start, min(start + SPAN, len(cache.k)))
        caches = tuple(zip(cache.k[span], cache.v[span], strict=True))
        x, repaired = cached_span(x, params.layers[span], cfg, positions, caches, how)
        done += repaired
    return x, KVCache(*zip(*done, strict=True))


def continuation_logits(params: Params, cfg: ModelConfig, ids: Int[Any, "T"], positions: Int[Any, "T"],
                        cache: KVCache, how: str = "blocked", tail: Tail | None = None) -> Float[Array, "T V"]:
    """Logits of every row: how a repaired cache judges a given continuation. The cache stays as it is. `positions` are
    slots, which they differ from where there is a `tail`."""
    x = embed_rows(params.outer, ids)
    for start in range(0, cfg.num_layers, SPAN):
        span = slice(start, start + SPAN)
        caches = tuple(zip(cache.k[span], cache.v[span], strict=True))
        x = _continue_span(x, params.layers[span], cfg, positions, caches, how, tail)
    return _logits(params.outer, cfg, x)


@partial(jax.jit, static_argnames=("cfg", "how"))
def _continue_span(x, layers, cfg, slots, caches, how, tail):
    for layer, cache in zip(layers, caches, strict=True):
        x, _ = attend_and_finish(x, layer, cfg, slots, cache, how, tail=tail)
    return x


_logits = jax.jit(decoder.logits, static_argnames="cfg")
