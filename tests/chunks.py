"""Chunks of random values, and stores that hold them."""

import numpy as np

from cacheclip_jax.store import ChunkStore, Passage, Space

SPACE = Space("f00d", "tiny", "bfloat16", (1, 2, 3), num_layers=3, num_kv_heads=2, head_dim=8)


def chunk(seed: int, tokens: int = 16, space: Space = SPACE):
    """(passage, ids, spans, kv) of one chunk."""
    rng = np.random.default_rng(seed)
    passage = Passage.make(f"passage {seed}", "doc", seed * 100)
    ids = rng.integers(0, 50_000, tokens).tolist()
    spans = [(i, i + 1) for i in range(tokens)]
    return passage, ids, spans, rng.standard_normal(space.shape(tokens)).astype(space.numpy_dtype)


def put(store: ChunkStore, seed: int, space: Space = SPACE):
    passage, ids, spans, kv = chunk(seed, space=space)
    store.add_passages([passage])
    store.write(space, passage.id, ids, spans, kv)
    return passage, ids, kv


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
