"""Chunks -> chunk caches: each chunk runs behind the shared prefix, and only the chunk's own rows are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cacheclip_jax.attention import row_attention
from cacheclip_jax.bucket import bucket
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Params
from cacheclip_jax.model.rope import rotate

BATCH_TOKENS = 2048  # rows of one compiled encoding; enough to keep a CPU or a GPU busy, small enough for memory


@partial(jax.jit, static_argnames="cfg")
def encode(params: Params, cfg: ModelConfig, ids: Int[Array, "B C"], prefix: Float[Array, "L 2 K P H"]
           ) -> Float[Array, "B L 2 K C H"]:
    """K (before RoPE) and V of chunks that each run causally behind the same prefix (CacheClip's shared-prefix
    calibration: the prefix absorbs the attention sink, so no chunk carries its own).

    `prefix` holds the prefix's own cache, P may be 0. Chunks shorter than C are padded at the end: causality keeps
    padding out of every real row, and the caller drops the padding's rows.
    """
    start = prefix.shape[3]
    positions = start + jnp.arange(ids.shape[1])

    def one_chunk(ids):
        def step(x, layer_and_prefix):
            layer, (prefix_k, prefix_v) = layer_and_prefix
            q, k, v = decoder.project(x, layer, cfg)
            q = rotate(q.swapaxes(0, 1), positions, cfg.rope).swapaxes(0, 1)
            k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
            keys = jnp.concatenate([rotate(prefix_k, jnp.arange(start), cfg.rope), rotate(k, positions, cfg.rope)], 1)
            attended = row_attention(q, keys, jnp.concatenate([prefix_v, v], 1), positions)
            return decoder.finish(x, attended, layer, cfg), jnp.stack([k, v])

        return jax.lax.scan(step, decoder.embed(params, ids), (params.layers, prefix))[1]

    return jax.vmap(one_chunk)(ids)


def encode_prefix(params: Params, cfg: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    """The shared prefix's own cache [L, 2, K, P, H], encoded behind nothing."""
    nothing = no_prefix(params, cfg)
    (_, kv), = encode_many(params, cfg, [ids], nothing) if ids else [(0, nothing)]
    return kv


def no_prefix(params: Params, cfg: ModelConfig) -> np.ndarray:
    """An empty prefix cache [L, 2, K, 0, H]: what prefix="none" and the prefix itself are encoded behind."""
    return np.zeros((cfg.num_layers, 2, cfg.num_kv_heads, 0, cfg.head_dim), params.embed.dtype)


def encode_many(params: Params, cfg: ModelConfig, chunks: Sequence[Sequence[int]], prefix: np.ndarray
                ) -> Iterator[tuple[int, np.ndarray]]:
    """Encode chunks of any lengths: yields (index into `chunks`, its cache [L, 2, K, C, H]), batched by length.

    The next batch is dispatched before the last one is handed out, so the caller's writing overlaps with computing.
    """
    pending = None
    for batch in batches([len(c) for c in chunks]):
        width = bucket(max(len(chunks[i]) for i in batch))
        ids = np.zeros((len(batch), width), np.int32)
        for row, i in enumerate(batch):
            ids[row, : len(chunks[i])] = chunks[i]
        kv = encode(params, cfg, ids, prefix)
        if pending is not None:
            yield from _unpad(*pending)
        pending = (chunks, batch, kv)
    if pending is not None:
        yield from _unpad(*pending)


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices grouped into batches of one width bucket each and of 1, 4, 16, ... rows: few shapes, and no padded rows.

    A batch has at most BATCH_TOKENS padded tokens, unless one chunk alone is longer.
    """
    by_width: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        by_width.setdefault(bucket(n), []).append(i)
    out = []
    for width, indices in sorted(by_width.items()):
        while indices:
            rows = 1
            while rows * 4 <= min(len(indices), BATCH_TOKENS // width):
                rows *= 4
            out.append(indices[:rows])
            indices = indices[rows:]
    return out


def _unpad(chunks: Sequence[Sequence[int]], batch: list[int], kv: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    host = np.asarray(kv)
    for row, i in enumerate(batch):
        yield i, np.ascontiguousarray(host[row, :, :, :, : len(chunks[i])])
