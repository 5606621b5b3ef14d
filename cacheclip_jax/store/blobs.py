"""Named bytes on a disk, in memory or in a bucket, with errors that say what to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tensorstore as ts

from cacheclip_jax.errors import BadInput, StoreError

# Every memory:// store of this process lives here, so that two opens of one name see the same data.
_MEMORY = ts.Context()

# TensorStore raises these for a failed operation; the status is in the message alone.
FAILURES = (ValueError, IndexError, NotImplementedError, RuntimeError, OSError)
_IN_FLIGHT = 256

_WAYS_OUT = (
    (
        ("No space left", "quota", "File too large"),
        "Free some space or shrink the store with `cacheclip store gc`; what was committed before is kept.",
    ),
    (
        ("Permission denied", "PERMISSION_DENIED", "Operation not permitted", "Read-only file system"),
        "Check its permissions, or name another --store.",
    ),
    (("Not a directory", "File exists"), "A file is in the way: name another --store."),
    (("UNAUTHENTICATED", "redential"), "Check the credentials for this bucket."),
)


@dataclass(frozen=True)
class Blobs:
    """Keys and values under one URL; a single write is atomic."""

    url: str
    spec: dict
    context: ts.Context
    kv: ts.KvStore

    @classmethod
    def open(cls, url: str | Path) -> Blobs:
        scheme, found, rest = str(url).partition("://")
        if not found:
            scheme, rest = "file", str(url)
        bucket, _, path = rest.partition("/")
        # Files are read, not mapped: mapping is at most 17% faster here, and a failing disk would be a SIGBUS.
        context = ts.Context()
        match scheme:
            case "file" if rest:
                root = Path(rest).expanduser().absolute()
                url, spec = root, {"driver": "file", "path": f"{root}/"}
            case "memory" if rest:
                spec, context = {"driver": "memory", "path": f"{rest}/"}, _MEMORY
            case "s3" | "gs" if bucket:
                driver = {"s3": "s3", "gs": "gcs"}[scheme]
                spec = {"driver": driver, "bucket": bucket, "path": f"{path.rstrip('/')}/" if path else ""}
            case _:
                raise BadInput(
                    f"{str(url)!r} is no place for a store: give a directory, or file://DIRECTORY, "
                    "memory://NAME, s3://BUCKET/PATH or gs://BUCKET/PATH."
                )
        with translated("open", str(url)):
            return cls(str(url), spec, context, ts.KvStore.open(spec, context=context).result())

    @property
    def directory(self) -> Path | None:
        """The root, when this is a local directory."""
        return Path(self.spec["path"]) if self.spec["driver"] == "file" else None

    def where(self, key: str) -> str:
        return f"{self.url.rstrip('/')}/{key}"

    def read(self, key: str) -> bytes | None:
        return next(self.read_all([key]))[1]

    def read_all(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """Reads keys in their order, a bounded number at a time; None stands for a key that isn't there."""
        for some in itertools.batched(keys, _IN_FLIGHT):
            futures = [self.kv.read(key) for key in some]
            for key, future in zip(some, futures, strict=True):
                with translated("read", self.where(key)):
                    result = future.result()
                yield key, bytes(result.value) if result.state == "value" else None

    def write(self, key: str, value: bytes) -> None:
        self.write_all([(key, value)])

    def write_all(self, items: Iterable[tuple[str, bytes]]) -> None:
        for some in itertools.batched(items, _IN_FLIGHT):
            futures = [(key, self.kv.write(key, value)) for key, value in some]
            for key, future in futures:
                with translated("write", self.where(key)):
                    future.result()

    def list(self, prefix: str) -> list[str]:
        with translated("list", self.where(prefix)):
            names = self.kv.list(_from_to(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))).result()
        return sorted(name.decode("utf-8", "replace") for name in names)

    def delete(self, key: str) -> None:
        with translated("delete", self.where(key)):
            self.kv.write(key, None).result()

    def delete_range(self, first: str, end: str) -> None:
        """Deletes the keys from `first` up to but without `end`, files of unfinished writes included."""
        with translated("delete", self.where(first)):
            self.kv.delete_range(_from_to(first, end)).result()


@contextmanager
def translated(doing: str, where: str) -> Iterator[None]:
    """Turns failures of TensorStore and the system into a StoreError that names the place and the way out."""
    try:
        yield
    except FAILURES as e:
        text = str(e)
        hints = [hint for signs, hint in _WAYS_OUT if any(sign in text for sign in signs)]
        raise StoreError(" ".join([f"Could not {doing} {where}: {_reason(text)}.", *hints[:1]])) from e


def _reason(text: str) -> str:
    """The status of TensorStore's message without its bookkeeping and source locations."""
    return text.partition(" [")[0].rstrip(". ") or "unknown failure"


def _from_to(first: str, end: str) -> ts.KvStore.KeyRange:
    return ts.KvStore.KeyRange(first, end)
