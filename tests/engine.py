"""A tiny model pair behind the Python API, for tests of it."""

from __future__ import annotations

import ctypes
from functools import partial
from threading import Lock
from types import SimpleNamespace

import pytest

from cacheclip_jax import CacheClip, caches, copies, feed, online, pages, reading
from cacheclip_jax.model.load import Model
from cacheclip_jax.store import ChunkStore, Passage

TEXTS = [
    "Ada Moss keeps the north light of the bay.",
    "The lamp on the hill burns oil, and the mat at the end is red.",
    "The cat sat on the mat, the end of the hat.",
    "Boats land at the third quay at high tide.",
    "Barrels cost seven crowns, sacks cost two.",
    "The keeper's hat hangs on the door of the hut.",
]
QUESTION, OTHER = "Who keeps the north light?", "What does a barrel cost us?"
METHODS = ["cacheclip", "full", "prefix", "naive", "naive-none", "random"]
GROUP = 8


class CopyOnHost:
    """A CUDA stream's part, done by the CPU, whose memory stands for the device's; as late as a GPU may do it."""

    def __init__(self, device):
        self._asked: list[tuple[int, ...]] = []
        self._done = 0
        self._lock = Lock()

    def enter(self):
        pass

    def copy(self, source, source_pitch, target, target_pitch, width, height):
        self._asked += [(target + n * target_pitch, source + n * source_pitch, width) for n in range(height)]

    def mark(self):
        return SimpleNamespace(reach=partial(self._reach, len(self._asked)))

    def wait(self):
        self._reach(len(self._asked))

    def _reach(self, end):
        with self._lock:
            for asked in self._asked[self._done : end]:
                ctypes.memmove(*asked)
            self._done = max(self._done, end)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, driver: bool) -> None:
    """Let caches travel as they do on a GPU, with CUDA's driver or without, a layer at a time."""
    monkeypatch.setattr(copies, "driver", lambda: driver)
    monkeypatch.setattr(copies, "Stream", CopyOnHost)
    for module in (caches, pages):
        monkeypatch.setattr(module, "platform_of", lambda sharding: "gpu")
    for module, limit in ((pages, "PAGE_BYTES"), (reading, "STEP_BYTES"), (feed, "AHEAD_BYTES"), (online, "SPAN")):
        monkeypatch.setattr(module, limit, 1)
    monkeypatch.setattr(pages, "PAGE_TOKENS", 8)


def engine(models: tuple[Model, Model], store: ChunkStore, **options) -> CacheClip:
    """The pair over a store."""
    primary, aux = models
    return CacheClip(primary, aux, store, **options)


@pytest.fixture(scope="session")
def models(pair) -> tuple[Model, Model]:
    """The tiny primary and aux model in float32."""
    clip = CacheClip.load(pair[0], pair[1], "memory://test-engine-models", dtype="float32")
    assert clip.aux is not None
    return clip.primary.model, clip.aux.model


@pytest.fixture(scope="session")
def clip(models) -> CacheClip:
    """The pair over a store that holds TEXTS; tests may add to it, not take away."""
    clip = engine(models, ChunkStore.open("memory://test-engine"))
    clip.index(map(Passage.make, TEXTS))
    return clip


@pytest.fixture
def fresh(models, tmp_path) -> CacheClip:
    """The pair over an empty store on disk, every chunk cache read from there."""
    return engine(models, ChunkStore.open(tmp_path / "store"), host_bytes=0)


def ask(clip: CacheClip, question: str = QUESTION, chunks=tuple(TEXTS[:4]), max_new_tokens: int = 12, **options):
    return clip.ask(question, chunks, max_new_tokens=max_new_tokens, **options)


@pytest.fixture(scope="session")
def greedy(clip):
    """A full prefill's greedy answer of 12 tokens."""
    return ask(clip, method="full")
