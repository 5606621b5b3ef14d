"""A directory of named bytes: whole files appear at once or not at all, and are read straight into buffers."""

from __future__ import annotations

import builtins
import errno
import fcntl
import itertools
import os
import resource
import stat
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

_UNFINISHED = ".tmp-"  # what the name of a file being written begins with
_OLD_LOCK = ".__lock"  # and ends with, where TensorStore wrote it
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_BLOCK = 1 << 20
_serial = itertools.count()


class Files:
    """Keys are paths below `root`; a write is durable when it returns, and replaces what was there.

    New directories and files get the root's permissions; a root that isn't there yet is made with 0700.
    """

    def __init__(self, root: Path, top: Path | None = None):
        self.root, self._top = root, top or root
        self._made: set[str] = set()

    def path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def below(self, folder: str) -> Files:
        return Files(self.root / folder, self._top)

    def read(self, key: str, first: int | None = None) -> bytes | None:
        """A file's bytes, or only the first so many of them."""
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if first is not None:
                return os.pread(fd, first, 0)
            with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
                return file.readall()
        finally:
            os.close(fd)

    def write(self, key: str, parts: Sequence[bytes | np.ndarray]) -> None:
        """Writes parts one after the other: to a file beside the final one, then renamed over it."""
        path = self.path(key)
        folder, _, name = path.rpartition("/")
        self._make(folder)
        fd, unfinished = self._create(folder, name)
        try:
            os.fchmod(fd, self._mode() & 0o666)
            size = sum(_size(part) for part in parts)
            if size > _BLOCK:
                _reserve(fd, size)
            for part in parts:
                _write_all(fd, part)
            os.fsync(fd)
            Path(unfinished).rename(path)
        except BaseException:
            _remove(unfinished)
            raise
        finally:
            os.close(fd)
        _sync_folder(folder)

    def _create(self, folder: str, name: str) -> tuple[int, str]:
        """A new file that this writer holds locked: gc takes those that nobody holds for what a killed one left."""
        while True:
            path = f"{folder}/{_UNFINISHED}{os.getpid()}-{threading.get_ident()}-{next(_serial)}-{name[-40:]}"
            try:
                fd = os.open(path, _NEW_FILE, 0o600)
            except FileNotFoundError:  # the store was removed and made again
                self._made.clear()
                self._make(folder)
                fd = os.open(path, _NEW_FILE, 0o600)
            try:
                with suppress(OSError):  # where a file system has no locks, gc goes by age
                    fcntl.flock(fd, fcntl.LOCK_EX)
                if os.fstat(fd).st_nlink:
                    return fd, path
            except BaseException:
                os.close(fd)
                _remove(path)
                raise
            os.close(fd)  # gc was here between the file's creation and its lock

    def list(self, prefix: str) -> list[str]:
        """Keys that begin with `prefix`, sorted; unfinished files aren't among them."""
        folder, _, start = prefix.rpartition("/")
        return sorted(key for key in self._walk(folder, start) if not is_unfinished(key))

    def unfinished(self, prefix: str) -> builtins.list[str]:
        folder, _, start = prefix.rpartition("/")
        return sorted(key for key in self._walk(folder, start, any_name=True) if is_unfinished(key))

    def _walk(self, folder: str, start: str, any_name: bool = False) -> Iterator[str]:
        try:
            entries = list(os.scandir(self.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if not (any_name or entry.name.startswith(start)):
                continue
            key = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(key, "", any_name)
            else:
                yield key

    def delete(self, key: str) -> None:
        Path(self.path(key)).unlink(missing_ok=True)

    def delete_unfinished(self, key: str, grace: float) -> bool:
        """Removes an unfinished file that nobody is writing: its lock is free, or where locks fail, it is old."""
        try:
            fd = os.open(self.path(key), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if not _claimed(fd, grace):
                return False
            with suppress(FileNotFoundError):  # finished or given up meanwhile
                Path(self.path(key)).unlink()  # while it is locked: its writer, if it only began, sees it gone
                return True
            return False
        finally:
            os.close(fd)

    def _mode(self) -> int:
        return stat.S_IMODE(self._top.stat().st_mode)

    def _make(self, folder: str) -> None:
        if folder in self._made:
            return
        if not Path(folder).is_dir():
            for path in [*reversed(Path(folder).parents), Path(folder)]:
                if path.is_relative_to(self._top):
                    _mkdir(path, 0o700 if path == self._top else self._mode() & 0o777)
                elif not path.exists():
                    with suppress(FileExistsError):
                        path.mkdir()
        self._made.add(folder)


class FileSource:
    """One file that is read in parts; it stays readable when it is removed meanwhile."""

    def __init__(self, path: str):
        self._path = path
        self._fd: int | None = None
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size
        if self._fd > _MOST_OPEN:  # many chunks at once: opened again for every part
            self.close()

    def read_into(self, offset: int, view: np.ndarray) -> None:
        """Fills a flat uint8 array; raises EOFError where the file ends before."""
        with self._open() as fd:
            left = memoryview(view)
            while left:
                if not (n := os.preadv(fd, [left], offset)):
                    raise EOFError(f"it ends at byte {offset}")
                left, offset = left[n:], offset + n

    def read_scattered(self, offset: int, views: Sequence[np.ndarray]) -> None:
        """Fills flat uint8 arrays one after another with few calls; raises EOFError where the file ends before."""
        with self._open() as fd:
            left = deque(memoryview(view) for view in views)
            while left:
                if not (n := os.preadv(fd, list(itertools.islice(left, _MOST_BUFFERS)), offset)):
                    raise EOFError(f"it ends at byte {offset}")
                offset += n
                while left and n >= len(left[0]):
                    n -= len(left.popleft())
                if n:
                    left[0] = left[0][n:]

    def release(self) -> None:
        """Nothing: other threads may be reading, so the file is closed with the last reference."""

    def close(self) -> None:
        if (fd := self._fd) is not None:
            self._fd = None
            os.close(fd)

    __del__ = close

    @contextmanager
    def _open(self) -> Iterator[int]:
        if (fd := self._fd) is not None:
            yield fd
            return
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


_MOST_BUFFERS = min(os.sysconf("SC_IOV_MAX"), 1024)  # of one call
_MOST_OPEN = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2


def is_unfinished(key: str) -> bool:
    return key.rpartition("/")[2].startswith(".") or key.endswith(_OLD_LOCK)


def _age(status: os.stat_result) -> float:
    return abs(time.time() - status.st_mtime)  # a clock that jumped back makes nothing young for ever


def _size(part: bytes | np.ndarray) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes


def _reserve(fd: int, size: int) -> None:
    """Finds out that a disk is full before the first byte, where the file system can tell."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _write_all(fd: int, part: bytes | np.ndarray) -> None:
    left = memoryview(part if isinstance(part, bytes) else part.reshape(-1).view(np.uint8))
    while left:
        left = left[os.write(fd, left) :]


def _claimed(fd: int, grace: float) -> bool:
    """Whether a file that another process may be writing is free, and locked here from now on."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return _age(os.fstat(fd)) > grace
    return True


def _remove(path: str) -> None:
    with suppress(OSError):
        Path(path).unlink()


def _mkdir(path: Path, mode: int) -> None:
    with suppress(FileExistsError):
        path.mkdir()
        path.chmod(mode)
        _sync_folder(str(path.parent))


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
