"""Builders that tests share: tiny random models of every family, and the pieces of a request over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacheclip_jax.assemble import KVCache, empty, join, place, placement
from cacheclip_jax.encode import encode_many, encode_prefix, no_prefix
from cacheclip_jax.errors import BadModelFile
from cacheclip_jax.model.config import Llama3Scaling, ModelConfig, Rope
from cacheclip_jax.model.params import init
from cacheclip_jax.model.pull import pull
from cacheclip_jax.recompute import recompute
from cacheclip_jax.score import Scoring, embed_and_score
from cacheclip_jax.store import ChunkStore
from tests.checkpoints import write_pair

_BASE = dict(num_layers=3, d_model=32, d_mlp=64, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=96,
             rope=Rope(theta=10000.0), norm_eps=1e-6, max_positions=4096, tied=False)

TINY = {
    "qwen2": ModelConfig(family="qwen2", **_BASE | dict(qkv_bias=True, tied=True)),
    "qwen3": ModelConfig(family="qwen3", **_BASE | dict(qk_norm=True, head_dim=16)),
    "llama3": ModelConfig(family="llama", **_BASE | dict(rope=Rope(500.0, llama3=Llama3Scaling(8.0, 1.0, 4.0, 32)))),
    "llama-bias": ModelConfig(family="llama", **_BASE | dict(qkv_bias=True, out_bias=True, mlp_bias=True)),
    "smollm2": ModelConfig(family="llama", **_BASE | dict(num_heads=9, num_kv_heads=3, d_model=36, tied=True)),
    "mistral": ModelConfig(family="mistral", **_BASE | dict(num_kv_heads=1)),
}


@pytest.fixture(scope="session", params=TINY)
def tiny(request) -> tuple[ModelConfig, object]:
    """(config, float32 params) of one tiny random model per family."""
    cfg = TINY[request.param]
    return cfg, init(jax.random.key(7), cfg)


@pytest.fixture(scope="session")
def qwen2() -> tuple[ModelConfig, object]:
    """(config, float32 params) of the tiny Qwen2, for properties that don't depend on the family."""
    return TINY["qwen2"], init(jax.random.key(7), TINY["qwen2"])


def random_prompt(cfg: ModelConfig, lengths=(5, 24, 17, 30, 9), seed=0) -> list[np.ndarray]:
    """Random ids: prefix, chunks..., question."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, cfg.vocab_size, n).astype(np.int32) for n in lengths]


def assembled(params, cfg: ModelConfig, prefix, chunks, slots: int, behind: str = "shared"):
    """The assembled cache of chunks that were encoded one by one."""
    dtype = params.embed.dtype
    prefix_kv = encode_prefix(params, cfg, list(prefix))
    anchor = prefix_kv if behind == "shared" else no_prefix(params, cfg)
    kv = dict(encode_many(params, cfg, [list(c) for c in chunks], anchor))
    parts = [prefix_kv, *(kv[i] for i in range(len(chunks)))]
    where = placement(cfg, slots, [p.shape[3] for p in parts])
    return KVCache(*zip(*(place(cfg, jnp.asarray(r), where) for r in join(cfg, slots, parts, dtype)), strict=True))


def stacked(cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    """A cache's keys and values as [L, K, S, H]."""
    return np.stack([np.asarray(k) for k in cache.k]), np.stack([np.asarray(v) for v in cache.v])


def rows(params, cfg: ModelConfig, ids, positions, cache, pad: int = 0):
    """Last row's logits and the repaired cache, with `pad` padding rows."""
    ids = np.concatenate([np.asarray(ids, np.int32), np.zeros(pad, np.int32)])
    positions = np.concatenate([np.asarray(positions, np.int32), np.full(pad, -1, np.int32)])
    logits, cache = recompute(params, cfg, ids, positions, np.int32(len(ids) - pad - 1), cache)
    return np.asarray(logits), cache


def full_prefill(params, cfg: ModelConfig, ids, slots: int = 128):
    """Logits after a whole prompt, nothing reused."""
    return rows(params, cfg, ids, np.arange(len(ids)), empty(cfg, slots, params.embed.dtype))


def scores_over(params, cfg: ModelConfig, scoring: Scoring, ids, positions, last, cache, how: str = "blocked"):
    """What `embed_and_score` gives as scores; the cache stays."""
    return embed_and_score(params, cfg, scoring, ids, positions, last, jax.tree.map(jnp.copy, cache), how,
                           scoring.weights(cfg))[1]


def max_diff(a, b) -> float:
    """Largest absolute difference, in float32."""
    return float(jnp.abs(jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)).max())


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forget compiled programs after every module: each takes memory maps, and XLA crashes when a process has no more
    of them."""
    yield
    jax.clear_caches()
    maps, limit = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")  # of Linux alone
    if maps.exists():
        kept = maps.read_text(encoding="utf-8").count("\n")
        assert kept < int(limit.read_text(encoding="utf-8")) / 4, f"{kept} memory maps outlive a module's programs"


@pytest.fixture
def store(tmp_path) -> ChunkStore:
    """An empty store on a disk."""
    return ChunkStore.open(tmp_path / "store")


@pytest.fixture(scope="session")
def real_model_path():
    """Directory of a real model by name, pulled on first use; where that fails the test is skipped, but not in CI."""
    def fetch(name: str) -> Path:
        try:
            return pull(name).path
        except BadModelFile as e:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"{name} can't be fetched here: {e}")

    return fetch


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Iterator[tuple[Path, Path]]:
    """Directories of a tiny primary and aux model; compiled programs are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def long_pair(tmp_path_factory) -> Iterator[tuple[Path, Path]]:
    """As `pair`, with room for benchmarks' prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield write_pair(tmp_path_factory.mktemp("long-pair"), positions=4096)


def by_part(qkv, heads: int, kv_heads: int, head_dim: int) -> dict[str, np.ndarray]:
    """The rows of q, k and v, as in a checkpoint, from a layer's joint matrix or bias."""
    qkv = np.asarray(qkv)
    grouped = qkv.reshape(kv_heads, heads // kv_heads + 2, head_dim, *qkv.shape[1:])
    parts = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
    return {name: part.reshape(-1, *qkv.shape[1:]) for name, part in parts.items()}
