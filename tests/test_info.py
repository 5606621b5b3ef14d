"""`cacheclip info`: what it says about this machine and about models is what the code does."""

from __future__ import annotations

import shutil

import jax
import pytest

from cacheclip_jax import __version__
from cacheclip_jax.attention import choose
from cacheclip_jax.engine import compilation_cache, enable_compilation_cache
from cacheclip_jax.info import gather
from cacheclip_jax.model.config import read_config
from cacheclip_jax.model.load import load_config, load_model
from cacheclip_jax.store.records import DTYPES
from tests.command_line import cacheclip, fails

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="what is said of a CPU")


@pytest.fixture(autouse=True)
def no_models_from_the_environment(monkeypatch):
    for name in ("CACHECLIP_PRIMARY", "CACHECLIP_AUX"):
        monkeypatch.delenv(name, raising=False)


def test_json_is_what_gather_finds():
    found = cacheclip("info", "--json").json
    assert found == gather()
    assert found["versions"]["cacheclip"] == __version__ and found["versions"]["jax"] == jax.__version__
    assert sum(d["count"] for d in found["devices"]) == jax.local_device_count()
    assert {(a["dtype"], a["head_dim"]) for a in found["attention"]} == {(d, h) for d in DTYPES for h in (64, 128)}
    assert found["models"] == {}


@on_cpu
def test_a_cpu_runs_blocked_attention_from_memory_that_is_not_pinned():
    found = gather()
    blocked = choose("cpu", None, 64, "bfloat16")
    assert {(a["rows"], a["reason"]) for a in found["attention"]} == {("blocked", blocked.reason)}
    assert found["copies"]["pinned"] is False and "CPU" in found["copies"]["reason"]
    shown = cacheclip("info")
    assert shown.code == 0 and "blocked" in shown.out and "not through pinned pages" in shown.out


@pytest.mark.parametrize("dtype, itemsize", [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_a_token_takes_the_bytes_of_its_keys_and_values(pair, dtype, itemsize):
    found = cacheclip("info", "--primary", pair[0], "--aux", pair[1], "--dtype", dtype, "--json").json["models"]
    assert list(found) == ["primary", "aux"]
    for said, directory in zip(found.values(), pair, strict=True):
        cfg = read_config(directory)
        assert said["bytes_per_token"] == 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * itemsize
        assert said["parameters"] == cfg.num_params


def test_a_model_has_the_attention_that_it_is_said_to_have(pair):
    said = gather({"primary": str(pair[0])}, "float32")["models"]["primary"]["attention"]
    really = load_model(pair[0], dtype="float32").attention
    assert (said["rows"], said["reason"]) == (really.name, really.reason)


def test_a_model_is_described_without_its_weights(pair, tmp_path):
    shutil.copy(pair[0] / "config.json", tmp_path)
    assert load_config(tmp_path) == read_config(pair[0])
    shown = cacheclip("info", "--primary", tmp_path, "--dtype", "float32")
    nbytes = gather({"primary": str(tmp_path)}, "float32")["models"]["primary"]["bytes_per_token"]
    assert shown.code == 0 and f"{nbytes:,} bytes in float32" in shown.out


def test_compiled_programs_are_kept_where_it_says():
    before = compilation_cache()
    enable_compilation_cache()
    assert gather()["compiled_programs"] == before == jax.config.jax_compilation_cache_dir


@pytest.mark.parametrize("role", ["--primary", "--aux"])
def test_an_unknown_model_or_dtype_is_one_line(tmp_path, monkeypatch, role):
    monkeypatch.setenv("CACHECLIP_NO_HUB", "1")
    monkeypatch.setenv("CACHECLIP_MODELS", str(tmp_path))
    fails(cacheclip("info", role, tmp_path / "no"), str(tmp_path / "no"), "no local path")
    fails(cacheclip("info", role, "smollm2-135m"), "cacheclip pull smollm2-135m")
    fails(cacheclip("info", "--dtype", "int4"), "int4", "float16")
