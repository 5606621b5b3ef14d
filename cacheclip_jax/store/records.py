"""What the store writes down in JSON: passages, spaces and entries, each carrying a hash of itself."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import tensorstore as ts

from cacheclip_jax.errors import BadInput

LAYOUT_VERSION = 1
ID_DIGITS = 16
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Passage:
    """A piece of a document; `start` and `end` are characters. `id` is a hash of the rest."""

    id: str
    text: str
    document: str
    start: int
    end: int

    @classmethod
    def make(cls, text: str, document: str = "", start: int = 0, end: int | None = None) -> Passage:
        end = start + len(text) if end is None else end
        return cls(_passage_id(text, document, start, end), text, document, start, end)

    def to_json(self) -> bytes:
        return _canonical(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Passage:
        """Parses; raises ValueError for any byte that isn't as it was written."""
        passage = _parse(cls, json.loads(data))
        id = _passage_id(passage.text, passage.document, passage.start, passage.end)
        if passage.id != id or passage.to_json() != data:
            raise ValueError("its text doesn't match its id")
        return passage


@dataclass(frozen=True)
class Space:
    """Everything that two chunk caches must agree on to be interchangeable.

    `model` is the fingerprint of the weights; `model_name` is for people and isn't part of the key.
    """

    model: str
    model_name: str
    dtype: str
    prefix_ids: tuple[int, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    layout: int = LAYOUT_VERSION

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise BadInput(f"A chunk cache can't be stored as {self.dtype}: choose one of {', '.join(DTYPES)}.")

    @cached_property
    def key(self) -> str:
        return _digest({**asdict(self), "model_name": None})[:32]

    def chunk_key(self, ids: Sequence[int]) -> str:
        return hashlib.sha256(self.key.encode() + np.asarray(ids, "<i4").tobytes()).hexdigest()[:32]

    def shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """[L, 2, K, C, H] for a chunk of C tokens."""
        if tokens < 1:
            raise BadInput("A chunk of 0 tokens has no chunk cache: leave empty passages out.")
        return self.num_layers, 2, self.num_kv_heads, tokens, self.head_dim

    @property
    def numpy_dtype(self) -> np.dtype:
        return ts.dtype(self.dtype).numpy_dtype

    def to_json(self) -> bytes:
        return seal(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Space:
        return _parse(cls, unseal(data))


@dataclass(frozen=True)
class Entry:
    """The manifest of one committed chunk cache; `spans` are the tokens' characters in the passage's text."""

    space: str
    chunk: str
    passage: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    nbytes: int
    created: float

    @classmethod
    def make(cls, space: Space, passage: str, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Entry:
        shape = space.shape(len(ids))
        size = math.prod(shape) * space.numpy_dtype.itemsize
        return cls(
            space.key,
            space.chunk_key(ids),
            passage,
            _ints(ids),
            _frozen(np.asarray(spans).tolist()),
            shape,
            size,
            time.time(),
        )

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def to_json(self) -> bytes:
        return seal(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Entry:
        return _parse(cls, unseal(data))

    @classmethod
    def parse(cls, data: bytes, space: Space, ids: Sequence[int]) -> Entry:
        """The manifest of exactly this chunk; raises ValueError for anything else."""
        entry = cls.from_json(data)
        wanted = (space.key, space.chunk_key(ids), _ints(ids), space.shape(len(ids)))
        if (entry.space, entry.chunk, entry.ids, entry.shape) != wanted:
            raise ValueError("it describes another chunk")
        return entry

    def inherited(self, passage: str) -> Entry:
        """The same chunk cache as another passage's with the same text."""
        return replace(self, passage=passage)


def is_chunk_id(text: str) -> bool:
    """Whether this can be a passage's id, or enough of one: 4 to 16 hex digits."""
    return re.fullmatch(f"[0-9a-f]{{4,{ID_DIGITS}}}", text) is not None


def seal(record: dict) -> bytes:
    """JSON of a record with, as its last member, a digest of the rest."""
    body = _canonical(record)
    return body[:-1] + _seal_of(body)


def unseal(data: bytes) -> dict:
    """The record that `seal` wrote; raises ValueError for any other bytes."""
    body = data[:-_SEAL_BYTES] + b"}"
    if data[-_SEAL_BYTES:] != _seal_of(body):
        raise ValueError("its digest doesn't match")
    return json.loads(body)


def _seal_of(body: bytes) -> bytes:
    return b',"digest":"%s"}' % hashlib.sha256(body).hexdigest().encode()


_SEAL_BYTES = len(_seal_of(b""))


def _canonical(value: object) -> bytes:
    # ASCII, so that lone surrogates from undecodable file names survive.
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _passage_id(text: str, document: str, start: int, end: int) -> str:
    return _digest([document, start, end, text])[:ID_DIGITS]


def _digest(value: object) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


def _parse[T](cls: type[T], record: dict) -> T:
    try:
        return cls(**{name: _frozen(value) for name, value in record.items()})
    except (AttributeError, TypeError, BadInput) as e:
        raise ValueError(f"it isn't a {cls.__name__.lower()} of this version") from e


def _ints(ids: Sequence[int]) -> tuple[int, ...]:
    return tuple(np.asarray(ids).tolist())


def _frozen(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(map(tuple, value)) if value and isinstance(value[0], list) else tuple(value)
