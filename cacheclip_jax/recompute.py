"""Rows through the primary against an assembled cache: masked grouped recompute, and full prefill as its limit.

The layers run in spans, one compiled program each. A span takes the caches of its layers in one of three states: rows
from the store that it places itself, an assembled cache, or nothing. So the first layers compute while the caches of
the later ones are on their way, and no layer's cache is ever copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cacheclip_jax.assemble import KVCache, Placement, place
from cacheclip_jax.attention import causal_attention, for_rows, row_attention
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Layer, Params
from cacheclip_jax.model.rope import rotate

Rows = Float[Array, "T D"]
LayerCache = tuple[Float[Array, "K S H"], Float[Array, "K S H"]]


@partial(jax.jit, static_argnames="count")
def choose_rows(params: Params, ids: Int[Array, "S"], recompute: Bool[Array, "C"], prefix: Int[Array, ""],
                question: Int[Array, ""], end: Int[Array, ""], count: int
                ) -> tuple[Rows, Int[Array, "T"], Int[Array, ""]]:
    """The rows of a prompt: the context tokens to recompute (`recompute`, from slot `prefix` on) and the question
    (slots `question` to `end`), sorted by position, padded to `count` with position -1; their embeddings, positions,
    and the index of the last one. On device, so that a selection made there needs no trip to the host."""
    slot = jnp.arange(ids.shape[0])
    context = recompute[jnp.clip(slot - prefix, 0, recompute.shape[0] - 1)] & (slot >= prefix) & (slot < question)
    positions = jnp.nonzero(context | ((slot >= question) & (slot < end)), size=count, fill_value=-1)[0]
    return decoder.embed(params, ids[positions]), positions.astype(jnp.int32), (positions >= 0).sum(dtype=jnp.int32) - 1


@partial(jax.jit, static_argnames=("cfg", "how"), donate_argnames="x")
def reuse_span(x: Rows, layers: tuple[Layer, ...], cfg: ModelConfig, positions: Int[Array, "T"],
               rows: tuple[Float[Array, "R H"], ...], where: Placement, how: str = "blocked"
               ) -> tuple[Rows, tuple[LayerCache, ...]]:
    """A span of layers over chunk caches just loaded: place them, overwrite the rows' K and V, attend, finish."""
    return _span(x, layers, cfg, positions, [partial(place, cfg, r, where) for r in rows], how)


@partial(jax.jit, static_argnames=("cfg", "how"), donate_argnames=("x", "caches"))
def cached_span(x: Rows, layers: tuple[Layer, ...], cfg: ModelConfig, positions: Int[Array, "T"],
                caches: tuple[LayerCache, ...], how: str = "blocked") -> tuple[Rows, tuple[LayerCache, ...]]:
    """A span of layers over an assembled cache, which is donated."""
    return _span(x, layers, cfg, positions, caches, how)


@partial(jax.jit, static_argnames=("cfg", "slots", "how"), donate_argnames="x")
def fresh_span(x: Rows, layers: tuple[Layer, ...], cfg: ModelConfig, positions: Int[Array, "T"], slots: int,
               how: str = "blocked") -> tuple[Rows, tuple[LayerCache, ...]]:
    """A span of layers of a full prefill: row t is token t, the cache holds nothing else.

    Causal attention among the rows is then row attention; on a GPU the library's kernel computes it.
    """
    zeros = partial(jnp.zeros, (cfg.num_kv_heads, slots, cfg.head_dim), x.dtype)
    return _span(x, layers, cfg, positions, [lambda: (zeros(), zeros())] * len(layers), how,
                 causal=how in ("cudnn", "mosaic_gpu"))


def _span(x: Rows, layers: Sequence[Layer], cfg: ModelConfig, positions: Int[Array, "T"],
          caches: Sequence[LayerCache | Callable[[], LayerCache]], how: str, causal: bool = False
          ) -> tuple[Rows, tuple[LayerCache, ...]]:
    out = []
    for layer, cache in zip(layers, caches, strict=True):
        kv = cache() if callable(cache) else cache
        x, kv, _ = attend_and_finish(x, layer, cfg, positions, kv, how, causal)
        out.append(kv)
    return x, tuple(out)


def attend_and_finish(x: Rows, layer: Layer, cfg: ModelConfig, positions: Int[Array, "T"], cache: LayerCache, how: str,
                      causal: bool = False) -> tuple[Rows, LayerCache, Float[Array, "T N H"]]:
    """One layer for rows: overwrite their K and V, attend, finish. Also returns the rows' rotated queries."""
    q, k, v = decoder.project(x, layer, cfg)
    q = rotate(q.swapaxes(0, 1), positions, cfg.rope).swapaxes(0, 1)
    k, v = rotate(k.swapaxes(0, 1), positions, cfg.rope), v.swapaxes(0, 1)
    with jax.named_scope("attention"):
        if causal:  # row t is token t
            attended = causal_attention(q[None], k[None], v[None], how)[0]
            real = (positions >= 0)[:, None]
            keys, values = (old.at[:, : len(q)].set(jnp.where(real, new, 0)[:, : old.shape[1]])
                            for old, new in zip(cache, (k, v), strict=True))
        else:
            # Padding rows write to the slot after the last one, which mode="drop" discards (-1 would wrap around).
            slots = jnp.where(positions < 0, cache[0].shape[1], positions)
            keys, values = (old.at[:, slots].set(new, mode="drop", indices_are_sorted=True)
                            for old, new in zip(cache, (k, v), strict=True))
            attended = row_attention(q, keys, values, positions, for_rows(how, len(q)))
    return decoder.finish(x, attended, layer, cfg), (keys, values), q


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
    caches = tuple(zip(cache.k, cache.v, strict=True))
    x, caches = cached_span(embed_rows(params, ids), params.layers, cfg, positions, caches, how)
    return last_logits(params, cfg, x, last), KVCache(*zip(*caches, strict=True))


@partial(jax.jit, static_argnames=("cfg", "how"))
def continuation_logits(params: Params, cfg: ModelConfig, ids: Int[Array, "T"], positions: Int[Array, "T"],
                        cache: KVCache, how: str = "blocked") -> Float[Array, "T V"]:
    """Logits of every row: how a repaired cache judges a given continuation. The cache stays as it is."""
    caches = list(zip(cache.k, cache.v, strict=True))
    x, _ = _span(decoder.embed(params, ids), params.layers, cfg, positions, caches, how)
    return decoder.logits(params, cfg, x)
