"""A chunk cache as one object: what it is, its tokens, and one checksummed part per layer.

    byte 0      "CCKV" and the layout's number
    byte 8      crc32c of the next 1012 bytes
    byte 12     the entry as JSON, zeros up to byte 1024
    byte 1024   ids int32 [C], spans int32 [C, 2], crc32c of every layer uint32 [L], zeros up to a multiple of 4096
    then        L layers of equal size, [2, K, C, H] each (quantize.py says how those of one byte per value lie)

Everything is little-endian, and every byte is covered by a checksum. Where a layer lies follows from L, the chunk's
length and the kind of its values, so that one read finds it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache

import crc32c
import numpy as np

from cacheclip_jax.store.quantize import KINDS, layer_bytes, quantize
from cacheclip_jax.store.records import LAYOUT_VERSION, Entry, Space

PRELUDE = 1024
_MAGIC = b"CCKV%04d" % LAYOUT_VERSION
_PAGE = 4096
_TABLES = "tables"
_SANE = 1 << 40
_POLYNOMIAL = 0x82F63B78  # of crc32c; the highest bit belongs to x^0


def head_bytes(layers: int, tokens: int) -> int:
    """Where the first layer begins."""
    return -(-(PRELUDE + 12 * tokens + 4 * layers) // _PAGE) * _PAGE


def stored_layer_bytes(space: Space, tokens: int) -> int:
    _, two, k, c, h = space.shape(tokens)
    return layer_bytes(space.kv, (two, k, c, h), space.numpy_dtype.itemsize)


def pack(space: Space, entry: Entry, ids: Sequence[int], spans: Sequence, kv: np.ndarray) -> list[bytes | np.ndarray]:
    """The parts of the object, one after the other: its head, then its layers."""
    kv = np.ascontiguousarray(kv)
    layers = [kv] if space.kv == "exact" else [quantize(space.kv, layer) for layer in kv]
    parts = list(kv) if space.kv == "exact" else layers
    crcs = np.array([checksum(part.reshape(-1).view(np.uint8)) for part in parts], "<u4")
    tables = np.asarray(ids, "<i4").tobytes() + np.asarray(spans, "<i4").tobytes() + crcs.tobytes()
    head = head_bytes(space.num_layers, entry.tokens)
    tables = tables.ljust(head - PRELUDE, b"\0")
    record = asdict(replace(entry, tables=b"")) | {_TABLES: crc32c.crc32c(tables)}
    body = json.dumps(record, separators=(",", ":")).encode().ljust(PRELUDE - 12, b"\0")
    if len(body) > PRELUDE - 12:
        raise ValueError(f"an entry of {len(body)} bytes doesn't fit its {PRELUDE - 12}")
    return [_MAGIC + crc32c.crc32c(body).to_bytes(4, "little") + body + tables, *layers]


def unpack(head: bytes) -> Entry:
    """The entry at the beginning of an object, with its tables where the head is whole; raises ValueError."""
    if len(head) < PRELUDE:
        raise ValueError("it is too short")
    if head[:8] != _MAGIC:
        raise ValueError("it isn't a chunk cache of this version")
    body = head[12:PRELUDE]
    if crc32c.crc32c(body) != int.from_bytes(head[8:12], "little"):
        raise ValueError("its description fails its checksum")
    entry, crc = _entry(body.rstrip(b"\0"))
    shape = entry.shape
    tables = head[PRELUDE : head_bytes(shape[0], shape[3])]
    if len(head) > PRELUDE and crc32c.crc32c(tables) != crc:
        raise ValueError("its tokens fail their checksum")
    return replace(entry, tables=tables)


def _entry(body: bytes) -> tuple[Entry, int]:
    """The entry and its tables' checksum; raises ValueError for anything but what `pack` writes."""
    try:
        record = json.loads(body)
        crc, record["shape"] = record.pop(_TABLES), tuple(record["shape"])
        entry = Entry(**record, tables=b"")
        numbers = [*entry.shape, entry.nbytes, crc]
        sane = all(type(n) is int and 0 <= n < _SANE for n in numbers) and len(entry.shape) == 5
        texts = (entry.space, entry.chunk, entry.passage, entry.text)
        if not (sane and min(entry.shape) > 0 and entry.kv in KINDS and all(type(t) is str for t in texts)):
            raise ValueError("its description makes no sense")
        return replace(entry, created=float(entry.created)), crc
    except (KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError("its description makes no sense") from e


def unpack_for(head: bytes, space: Space, ids: Sequence[int]) -> Entry:
    """The entry of exactly this chunk; raises ValueError for anything else."""
    entry = unpack(head)
    wanted = (space.key, space.chunk_key(ids), space.shape(len(ids)), space.kv)
    if (entry.space, entry.chunk, entry.shape, entry.kv) != wanted:
        raise ValueError("it describes another chunk")
    if entry.tables[: 4 * len(ids)] != np.asarray(ids, "<i4").tobytes():
        raise ValueError("it holds other tokens")
    return entry


def checksum(data: np.ndarray, before: int = 0) -> int:
    return crc32c.crc32c(data, before, data.nbytes > 1 << 15)  # without Python's lock where that pays


def joined(crcs: Sequence[int], size: int) -> int:
    """The checksum of parts of `size` bytes each, one after another, from those of the parts."""
    a, b, c, d = _followed(size)
    out = 0
    for crc in crcs:
        out = a[out & 255] ^ b[out >> 8 & 255] ^ c[out >> 16 & 255] ^ d[out >> 24] ^ crc
    return out


@lru_cache(256)
def _followed(size: int) -> list[list[int]]:
    """What a checksum becomes when `size` zero bytes follow, for each of its bytes by value: their sum, as it's linear.

    As zlib's crc32_combine: it is multiplied with x^(8 size) modulo the polynomial.
    """
    factor, square = 1 << 31, 1 << 23
    while size:
        factor = _times(square, factor) if size & 1 else factor
        size, square = size >> 1, _times(square, square)
    tables = [[0] for _ in range(4)]
    for bit in range(32):
        one = _times(1 << bit, factor)
        tables[bit // 8] += [one ^ other for other in tables[bit // 8]]
    return tables


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2) modulo crc32c's."""
    out = 0
    for bit in range(31, -1, -1):
        out ^= b if a >> bit & 1 else 0
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return out
