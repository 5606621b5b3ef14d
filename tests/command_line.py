"""Calls of the command line, and fixtures over an indexed store: what the tests of its commands share."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from cacheclip_jax import cli
from cacheclip_jax.store.blobs import Blobs, translated

CORPUS = {
    "light.txt": "Ada Moss keeps the north light.\n\nThe lamp burns oil, and the mat at the end of the stairs is red.",
    "cat.md": "The cat sat on the mat <script>alert('mat')</script> & the keeper's hat.",
    "more/boats.txt": "Boats land at the third quay when the tide is high. Barrels cost seven crowns.",
}
QUESTION = "Who keeps the north light?"
COMMANDS = [(), ("pull",), ("index",), ("ask",), ("verify",), ("info",), ("demo",), ("store",), ("store", "stats"),
            ("store", "ls"), ("store", "verify"), ("store", "rm"), ("store", "gc")]


@dataclass(frozen=True)
class Run:
    """What one call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        assert self.code == 0, self.err
        return json.loads(self.out)


def cacheclip(*args: object, stdin: bytes = b"") -> Run:
    """Run the command line in this process, as the console script does."""
    raw = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(r, encoding="utf-8", write_through=True) for r in raw]
    argv = ["cacheclip", *map(str, args)]
    source = io.TextIOWrapper(io.BytesIO(stdin))
    with (redirect_stdout(streams[0]), redirect_stderr(streams[1]), mock.patch.object(sys, "argv", argv),
          mock.patch.object(sys, "stdin", source), pytest.raises(SystemExit) as stopped):
        cli.main()
    code = stopped.value.code
    assert code is None or isinstance(code, int)
    return Run(code or 0, *(r.getvalue().decode() for r in raw))


def process(*args: object, env: dict[str, str] | None = None, before: str = "") -> Run:
    """Run the command line in a process of its own, after the statement `before`."""
    program = f"{before}\nfrom cacheclip_jax.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True,
                          env={**os.environ, **(env or {})}, check=False)
    return Run(done.returncode, done.stdout.decode(), done.stderr.decode())


def fails(run: Run, *parts: str) -> None:
    """It failed with exit code 2 and one line on stderr that has all these parts."""
    assert run.code == 2, run
    lines = run.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), run.err
    assert all(part in lines[0] for part in parts), run.err


def whole(store: Path) -> list[str]:
    """The ids of a store's passages, after a check that nothing in it is damaged."""
    assert cacheclip("store", "verify", "--store", store).code == 0
    return [p["id"] for p in cacheclip("store", "ls", "--store", store, "--json").json]


@pytest.fixture(scope="session")
def models(pair) -> list[str]:
    """Options that name the tiny pair, in float32 for exact comparisons."""
    return ["--primary", str(pair[0]), "--aux", str(pair[1]), "--dtype", "float32"]


@pytest.fixture(scope="session")
def indexed(models, tmp_path_factory) -> tuple[Path, dict]:
    """A store of the corpus, whose files are gone, and what indexing said."""
    folder = tmp_path_factory.mktemp("cli")
    write_corpus(folder / "corpus")
    report = cacheclip("index", folder / "corpus", "--store", folder / "store", *models, "--json").json
    shutil.rmtree(folder / "corpus")
    return folder / "store", report


@pytest.fixture
def store(indexed, tmp_path) -> Path:
    """A copy of the indexed store, for tests that change it."""
    return Path(shutil.copytree(indexed[0], tmp_path / "store"))


@pytest.fixture(scope="session")
def ask(indexed, models):
    """`cacheclip ask` over the indexed store."""
    return lambda *options: cacheclip("ask", "--store", indexed[0], *models, "--max-new-tokens", 6, *options)


def write_corpus(folder: Path) -> None:
    for name, text in CORPUS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@contextmanager
def unwritable() -> Iterator[None]:
    """Every write to a store fails as on a medium that is read-only."""
    def refuse(self: Blobs, key, parts) -> None:
        with translated("write", self.where(key)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with mock.patch.object(Blobs, "write_parts", refuse):
        yield


def flip_a_byte(store: Path) -> None:
    """Damage one chunk cache's data."""
    file = sorted(store.glob("kv/*/*/*.kv"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.fixture
def mounted(tmp_path) -> Iterator[Path]:
    """A small file system of its own; where that may not be mounted the test is skipped."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)
