"""What the store writes down in JSON: passages, spaces and entries, each carrying a hash of itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import tensorstore as ts

from cacheclip_jax.errors import BadInput
from cacheclip_jax.store.quantize import KINDS, Kind

LAYOUT_VERSION = 2
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

    `model` is the fingerprint of the weights; `model_name` is for people and isn't part of the key. `dtype` is what
    caches are read as, `kv` how their values are stored: exact, or int8 or fp8 with scales.
    """

    model: str
    model_name: str
    dtype: str
    prefix_ids: tuple[int, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    kv: Kind = "exact"
    layout: int = LAYOUT_VERSION

    def __post_init__(self):
        if self.kv not in KINDS:
            raise BadInput(f"A chunk cache's values can't be stored as {self.kv}: choose one of {', '.join(KINDS)}.")
        if self.dtype not in DTYPES:
            raise BadInput(f"A chunk cache can't be stored as {self.dtype}: choose one of {', '.join(DTYPES)}.")

    @cached_property
    def key(self) -> str:
        parts = {**asdict(self), "model_name": None}
        if self.layout < 2:
            del parts["kv"]
        return _digest(parts)[:32]

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
class Version:
    """The passages that a document has now; none once it is withdrawn."""

    document: str
    passages: tuple[str, ...]
    created: float

    def to_json(self) -> bytes:
        return seal(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Version:
        return _parse(cls, unseal(data))


@dataclass(frozen=True)
class Entry:
    """What one committed chunk cache says of itself.

    `passage` is the one that it was written for and `text` a hash of that one's text, where the store had it: every
    passage with this text can use it. `ids` and `spans` (the tokens' characters in the text) are known where the
    whole head of the object was read. `nbytes` are those of K and V as stored.
    """

    space: str
    chunk: str
    passage: str
    text: str
    shape: tuple[int, ...]
    kv: Kind
    nbytes: int
    created: float
    tables: bytes = field(default=b"", repr=False)

    @property
    def tokens(self) -> int:
        return self.shape[3]

    @cached_property
    def ids(self) -> tuple[int, ...]:
        return tuple(np.frombuffer(self.tables, "<i4", self.tokens).tolist())

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        pairs = np.frombuffer(self.tables, "<i4", 2 * self.tokens, 4 * self.tokens).reshape(-1, 2)
        return tuple(map(tuple, pairs.tolist()))

    @cached_property
    def crcs(self) -> list[int]:
        """The checksum of every layer."""
        return np.frombuffer(self.tables, "<u4", self.shape[0], 12 * self.tokens).tolist()


def text_id(text: str) -> str:
    """A hash that equal texts share."""
    return _digest(text)[:ID_DIGITS]


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


def _frozen(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(map(tuple, value)) if value and isinstance(value[0], list) else tuple(value)
