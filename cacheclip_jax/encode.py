"""Chunks -> chunk caches: each chunk runs behind the shared prefix, and only the chunk's own rows are kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cacheclip_jax.attention import causal_attention
from cacheclip_jax.bucket import bucket
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Layer, Params
from cacheclip_jax.model.rope import rotate
from cacheclip_jax.pages import uses_pinned
from cacheclip_jax.recompute import SPAN, embed_rows

Fetch = Callable[[], np.ndarray]  # waits for a chunk cache on its way to the host

BATCH_TOKENS = 2048  # rows of one compiled encoding; enough to keep a CPU busy, small enough for memory
BATCH_TOKENS_ACCELERATOR = 8192  # where a product of 2,048 rows reaches four fifths of the rate of one of 8,192


def encode(params: Params, cfg: ModelConfig, ids: Int[Any, "B C"], prefix: Float[Any, "L 2 K P H"],
           how: str = "blocked") -> list[Float[Array, "B l 2 K C H"]]:
    """K (before RoPE) and V of chunks that each run causally behind the same prefix (CacheClip's shared-prefix
    calibration: the prefix absorbs the attention sink, so no chunk carries its own); one array for each span of layers.

    `prefix` holds the prefix's own cache, P may be 0. Chunks shorter than C are padded at the end: causality keeps
    padding out of every real row, and the caller drops the padding's rows.
    """
    x, out = embed_rows(params.outer, ids.reshape(-1)), []
    for start in range(0, cfg.num_layers, SPAN):
        span = slice(start, start + SPAN)
        given = (x, params.layers[span], cfg, prefix[span], len(ids), how)
        if span.stop < cfg.num_layers:
            x, kv = encode_span(*given)
        else:
            kv = last_encode_span(*given)
        out.append(kv)
    return out


@partial(jax.jit, static_argnames=("cfg", "B", "how"), donate_argnames="x")
def encode_span(x: Float[Array, "BC D"], layers: tuple[Layer, ...], cfg: ModelConfig, prefix: Float[Array, "l 2 K P H"],
                B: int, how: str) -> tuple[Float[Array, "BC D"], Float[Array, "B l 2 K C H"]]:
    """The part of `encode` that a span of layers does, for the rows of B chunks one after another."""
    return _encoded(x, layers, cfg, prefix, B, how)


@partial(jax.jit, static_argnames=("cfg", "B", "how"))
def last_encode_span(x: Float[Array, "BC D"], layers: tuple[Layer, ...], cfg: ModelConfig,
                     prefix: Float[Array, "l 2 K P H"], B: int, how: str) -> Float[Array, "B l 2 K C H"]:
    """`encode_span` for the model's last layers. Nothing reads the rows behind them, so the compiler leaves out all of
    the last layer that comes after its keys and values."""
    return _encoded(x, layers, cfg, prefix, B, how)[1]


def _encoded(x, layers, cfg, prefix, B, how):
    start, C = prefix.shape[3], x.shape[0] // B
    positions, out = start + jnp.arange(C), []

    def behind(shared, own):
        return jnp.concatenate([jnp.broadcast_to(shared, (B, *shared.shape)), own], 2)

    for layer, (prefix_k, prefix_v) in zip(layers, prefix, strict=True):
        q, k, v = (y.reshape(B, C, -1, cfg.head_dim).swapaxes(1, 2) for y in decoder.project(x, layer, cfg))
        out.append(jnp.stack([k, v], 1))
        keys = behind(rotate(prefix_k, jnp.arange(start), cfg.rope), rotate(k, positions, cfg.rope))
        q = rotate(q, positions, cfg.rope).swapaxes(1, 2)
        attended = causal_attention(q, keys, behind(prefix_v, v), how)
        x = decoder.finish(x, attended.reshape(B * C, cfg.num_heads, cfg.head_dim), layer, cfg)
    return x, jnp.stack(out, 1)


def encode_prefix(params: Params, cfg: ModelConfig, ids: Sequence[int], how: str = "blocked") -> np.ndarray:
    """The shared prefix's own cache [L, 2, K, P, H], encoded behind nothing."""
    nothing = no_prefix(params, cfg)
    (_, kv), = encode_many(params, cfg, [ids], nothing, how) if ids else [(0, nothing)]
    return kv


def no_prefix(params: Params, cfg: ModelConfig) -> np.ndarray:
    """An empty prefix cache [L, 2, K, 0, H]: what prefix="none" and the prefix itself are encoded behind."""
    return np.zeros((cfg.num_layers, 2, cfg.num_kv_heads, 0, cfg.head_dim), params.embed.dtype)


def encode_many(params: Params, cfg: ModelConfig, chunks: Sequence[Sequence[int]], prefix: np.ndarray,
                how: str = "blocked") -> Iterator[tuple[int, np.ndarray]]:
    """Encode chunks of any lengths: yields (index into `chunks`, its cache [L, 2, K, C, H]), batched by length.

    The next batch is dispatched before the last one is handed out, so the caller's work overlaps with computing.
    """
    split = batches([len(c) for c in chunks], batch_tokens(how))
    for batch, fetches in ahead((b, start_batch(params, cfg, [chunks[i] for i in b], prefix, how)) for b in split):
        for i, fetch in zip(batch, fetches, strict=True):
            yield i, fetch()


def ahead[T](started: Iterator[T]) -> Iterator[T]:
    """The same items, each handed out when the next has been taken: where taking one starts it, two are under way."""
    taken = list(itertools.islice(started, 1))
    for following in started:
        yield taken.pop()
        taken.append(following)
    yield from taken


def start_batch(params: Params, cfg: ModelConfig, chunks: Sequence[Sequence[int]], prefix: np.ndarray, how: str
                ) -> list[Fetch]:
    """Start to encode chunks of one width bucket, and to copy their caches to the host: for each chunk a function, for
    any thread, that waits for its cache [L, 2, K, C, H].

    While its function is held, a cache, padded to the bucket, stays in pinned memory on a GPU, else on the device.
    """
    width = bucket(max(map(len, chunks)))
    ids = np.zeros((len(chunks), width), np.int32)
    for row, chunk in zip(ids, chunks, strict=True):
        row[: len(chunk)] = chunk
    caches = to_host(by_chunk(encode(params, cfg, ids, prefix, how)))
    return [partial(_fetch, kv, len(chunk)) for kv, chunk in zip(caches, chunks, strict=True)]


@jax.jit
def by_chunk(spans: list[Float[Array, "B l 2 K C H"]]) -> tuple[Float[Array, "L 2 K C H"], ...]:
    """Each chunk's spans one after another, so that the host needn't put them together."""
    return jnp.unstack(jnp.concatenate(spans, 1))


def to_host(caches: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Arrays whose copies to the host are under way: on a GPU into pinned memory, which NumPy then uses as it is."""
    if uses_pinned(caches[0].sharding):
        return jax.device_put(caches, caches[0].sharding.with_memory_kind("pinned_host"))
    for kv in caches:
        kv.copy_to_host_async()
    return caches


def _fetch(kv: Float[Array, "L 2 K C H"], tokens: int) -> Float[np.ndarray, "L 2 K C H"]:
    return np.ascontiguousarray(np.asarray(kv)[:, :, :, :tokens])


def batch_tokens(how: str) -> int:
    """Rows of one compiled encoding where attention is computed by `how`."""
    return BATCH_TOKENS if how == "blocked" else BATCH_TOKENS_ACCELERATOR


def batches(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices grouped into batches of one width bucket each and of 1, 4, 16, ... rows: few shapes, and no padded rows.

    A batch has at most `limit` padded tokens, unless one chunk alone is longer.
    """
    by_width: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        by_width.setdefault(bucket(n), []).append(i)
    out = []
    for width, indices in sorted(by_width.items()):
        while indices:
            rows = 1
            while rows * 4 <= min(len(indices), limit // width):
                rows *= 4
            out.append(indices[:rows])
            indices = indices[rows:]
    return out
