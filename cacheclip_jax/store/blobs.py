"""Named bytes on a disk, in memory or in a bucket, with errors that say what to do."""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from cacheclip_jax.errors import BadInput, StoreError
from cacheclip_jax.store.files import Files, FileSource

# Every memory:// store of this process lives here, so that two opens of one name see the same data.
_MEMORY = ts.Context()

# TensorStore raises these for a failed operation; the status is in the message alone.
FAILURES = (ValueError, IndexError, NotImplementedError, RuntimeError, OSError, EOFError)
_IN_FLIGHT = 256
# A bucket that doesn't answer is given up after seconds, not minutes: an answer can do without it.
_TIMEOUT = 30.0
_RETRIES = {"max_retries": 3, "initial_delay": "100ms", "max_delay": "1s"}
_PATIENCE = {"s3_request_retries": _RETRIES, "gcs_request_retries": _RETRIES}

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
    (("UNAVAILABLE", "DEADLINE_EXCEEDED", "CURL"), "The bucket can't be reached: check the network and its address."),
)


@dataclass(frozen=True)
class Blobs:
    """Keys and values under one URL; a single write is atomic.

    A local directory is read and written directly, everything else by TensorStore: `files` tells which.
    """

    url: str
    spec: dict
    context: ts.Context
    files: Files | None

    @classmethod
    def open(cls, url: str | Path, *, direct: bool = True) -> Blobs:
        """Opens a place; `direct=False` leaves local directories to TensorStore too."""
        scheme, found, rest = str(url).partition("://")
        if not found:
            scheme, rest = "file", str(url)
        rest, _, query = rest.partition("?") if scheme == "s3" else (rest, "", "")
        bucket, _, path = rest.partition("/")
        context, files = ts.Context(_PATIENCE), None
        match scheme:
            case "file" if rest:
                root = Path(rest).expanduser().absolute()
                url, spec = root, {"driver": "file", "path": f"{root}/"}
                files = Files(root) if direct else None
            case "memory" if rest:
                spec, context = {"driver": "memory", "path": f"{rest}/"}, _MEMORY
            case "s3" | "gs" if bucket:
                driver = {"s3": "s3", "gs": "gcs"}[scheme]
                spec = {"driver": driver, "bucket": bucket, "path": f"{path.rstrip('/')}/" if path else ""}
                spec |= _endpoint(query)
            case _:
                raise BadInput(
                    f"{str(url)!r} is no place for a store: give a directory, or file://DIRECTORY, "
                    "memory://NAME, s3://BUCKET/PATH or gs://BUCKET/PATH."
                )
        with translated("open", str(url)):
            blobs = cls(str(url), spec, context, files)
            return blobs if files else blobs._opened()

    def below(self, folder: str) -> Blobs:
        """The same place with every key below a folder."""
        spec = self.spec | {"path": f"{self.spec['path']}{folder}/"}
        files = self.files and self.files.below(folder)
        return replace(self, url=self.where(folder), spec=spec, files=files)

    @cached_property
    def kv(self) -> ts.KvStore:
        """The same as TensorStore sees it."""
        return ts.KvStore.open(self.spec, context=self.context).result()

    def _opened(self) -> Blobs:
        assert self.kv is not None
        return self

    @property
    def directory(self) -> Path | None:
        """The root, when this is a local directory."""
        return Path(self.spec["path"]) if self.spec["driver"] == "file" else None

    @property
    def tier(self) -> str:
        """What metrics call it: disk, memory or bucket."""
        return {"file": "disk", "memory": "memory"}.get(self.spec["driver"], "bucket")

    def where(self, key: str) -> str:
        return f"{self.url.rstrip('/')}/{key}"

    def read(self, key: str) -> bytes | None:
        return next(self.read_all([key]))[1]

    def read_all(self, keys: Iterable[str], first: int | None = None) -> Iterator[tuple[str, bytes | None]]:
        """Reads keys in their order, a bounded number at a time; None stands for a key that isn't there.

        With `first`, only so many bytes from the beginning of each.
        """
        if self.files:
            for key in keys:
                with translated("read", self.where(key)):
                    data = self.files.read(key, first)
                yield key, data
            return
        for some in itertools.batched(keys, _IN_FLIGHT):
            futures = [self.kv.read(key, byte_range=slice(0, first)) for key in some]
            for key, future in zip(some, futures, strict=True):
                yield key, self.finish(key, future)

    def start(self, key: str) -> ts.Future:
        """Starts to read a value by TensorStore, for `finish`."""
        return self.kv.read(key)

    def finish(self, key: str, future: ts.Future) -> bytes | None:
        with translated("read", self.where(key)):
            result = _waited(future)
        return bytes(result.value) if result.state == "value" else None

    def write(self, key: str, value: bytes) -> None:
        self.write_all([(key, value)])

    def write_all(self, items: Iterable[tuple[str, bytes]]) -> None:
        if self.files:
            for key, value in items:
                self.write_parts(key, [value])
            return
        for some in itertools.batched(items, _IN_FLIGHT):
            futures = [(key, self.kv.write(key, value)) for key, value in some]
            for key, future in futures:
                with translated("write", self.where(key)):
                    _waited(future)

    def write_parts(self, key: str, parts: Sequence[bytes | np.ndarray]) -> None:
        """Writes one value that is given in parts."""
        with translated("write", self.where(key)):
            if self.files:
                self.files.write(key, parts)
            else:
                whole = b"".join(part if isinstance(part, bytes) else part.tobytes() for part in parts)
                _waited(self.kv.write(key, whole))

    def source(self, key: str, head: int, size: int | None) -> Source:
        """Starts to read a value: its first `head` bytes, and all of its `size` unless that is None.

        Raises FileNotFoundError where a local file isn't there; a bucket tells with the first read.
        """
        return FileSource(self.files.path(key)) if self.files else BucketSource(self.kv, key, head, size)

    def list(self, prefix: str) -> list[str]:
        with translated("list", self.where(prefix)):
            if self.files:
                return self.files.list(prefix)
            names = _waited(self.kv.list(ts.KvStore.KeyRange(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))))
        return sorted(name.decode("utf-8", "replace") for name in names)

    def unfinished(self, prefix: str) -> builtins.list[str]:
        """Files of writes that were interrupted or are under way; only local directories have such."""
        with translated("list", self.where(prefix)):
            return self.files.unfinished(prefix) if self.files else []

    def delete_unfinished(self, key: str, grace: float) -> bool:
        """Removes an unfinished file unless somebody is writing it; whether it was removed."""
        with translated("delete", self.where(key)):
            return self.files is not None and self.files.delete_unfinished(key, grace)

    def delete(self, key: str) -> None:
        with translated("delete", self.where(key)):
            if self.files:
                self.files.delete(key)
            else:
                _waited(self.kv.write(key, None))


class BucketSource:
    """One value that is read by TensorStore, in parts or as a whole."""

    def __init__(self, kv: ts.KvStore, key: str, head: int, size: int | None):
        self._kv, self._key, self._head_bytes = kv, key, head
        self._head = kv.read(key, byte_range=slice(0, head))
        self._body = None if size is None else kv.read(key, byte_range=slice(head, size))

    def read_into(self, offset: int, view: np.ndarray) -> None:
        """Fills a flat uint8 array; raises FileNotFoundError or EOFError where there is nothing to fill it with."""
        if offset == 0 and view.nbytes == self._head_bytes:
            start, result = 0, _waited(self._head)
        elif (body := self._body) is not None:
            start, result = self._head_bytes, _waited(body)
        else:
            start = offset
            result = _waited(self._kv.read(self._key, byte_range=slice(offset, offset + view.nbytes)))
        if result.state != "value":
            raise FileNotFoundError(f"{self._key} isn't there")
        part = np.frombuffer(result.value, np.uint8)[offset - start :][: view.nbytes]
        if part.nbytes != view.nbytes:
            raise EOFError(f"it ends at byte {offset + part.nbytes}")
        view[...] = part

    def release(self) -> None:
        """Lets go of what was read ahead; parts can still be read."""
        self._body = None


Source = FileSource | BucketSource


@contextmanager
def translated(doing: str, where: str) -> Iterator[None]:
    """Turns failures of TensorStore and the system into a StoreError that names the place and the way out."""
    try:
        yield
    except FAILURES as e:
        text = f"{e.strerror} [" if isinstance(e, OSError) and e.strerror else str(e)
        hints = [hint for signs, hint in _WAYS_OUT if any(sign in text for sign in signs)]
        raise StoreError(" ".join([f"Could not {doing} {where}: {_reason(text)}.", *hints[:1]])) from e


def _waited(future: ts.Future) -> Any:
    """A future's result; raises TimeoutError where it takes unreasonably long."""
    try:
        return future.result(timeout=_TIMEOUT)
    except TimeoutError:
        raise TimeoutError(f"DEADLINE_EXCEEDED: no answer within {_TIMEOUT:.0f} s") from None


def _reason(text: str) -> str:
    """The status of TensorStore's message without its bookkeeping and source locations."""
    return text.partition(" [")[0].rstrip(". ") or "unknown failure"


def _endpoint(query: str) -> dict:
    """Where an S3-compatible server is, from the URL's `endpoint=http://host:port` and `region=`."""
    pairs = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)
    if unknown := pairs.keys() - {"endpoint", "region"}:
        raise BadInput(f"An s3:// URL takes endpoint= and region=, not {', '.join(sorted(unknown))}=.")
    return {{"endpoint": "endpoint", "region": "aws_region"}[name]: value for name, value in pairs.items()}
