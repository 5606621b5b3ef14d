"""Loading a checkpoint: the same weights from every layout, dtype and sharding, and every defect by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cacheclip_jax.errors import BadModelFile, UnsupportedModel
from cacheclip_jax.model.load import load_model
from tests.checkpoints import HEADS, KV_HEADS, LLAMA, QWEN2, VOCAB, D, H, weights, write_directory, write_tokenizer
from tests.conftest import by_part


def same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


@pytest.mark.parametrize("shards", [1, 3])
def test_weights_arrive_unchanged_under_their_fields(tmp_path, shards):
    w = weights(QWEN2)
    params = load_model(write_directory(tmp_path, QWEN2, w, shards), dtype=jnp.float32).params
    names = {"o": "self_attn.o_proj.weight", "down": "mlp.down_proj.weight",
             "attn_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    for field, name in names.items():
        for i, layer in enumerate(params.layers):
            np.testing.assert_array_equal(getattr(layer, field), w[f"model.layers.{i}.{name}"])
    for i, layer in enumerate(params.layers):
        for part, ours in zip(("gate", "up"), layer.gate_up, strict=True):
            np.testing.assert_array_equal(ours, w[f"model.layers.{i}.mlp.{part}_proj.weight"])
        for kind, ours in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            for part, theirs in by_part(ours, HEADS, KV_HEADS, H).items():
                np.testing.assert_array_equal(theirs, w[f"model.layers.{i}.self_attn.{part}_proj.{kind}"])
    np.testing.assert_array_equal(params.embed, w["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params.head, w["lm_head.weight"])
    np.testing.assert_array_equal(params.final_norm, w["model.norm.weight"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_any_dtype_is_the_float32_load_rounded_and_shares_its_fingerprint(tmp_path, dtype):
    directory = write_directory(tmp_path, LLAMA, weights(LLAMA))
    exact, rounded = load_model(directory, dtype=jnp.float32), load_model(directory, dtype=dtype)
    assert same(jax.tree.map(lambda x: x.astype(dtype), exact.params), rounded.params)
    assert rounded.params.embed.dtype == dtype
    assert exact.fingerprint == rounded.fingerprint


def test_bfloat16_files_load_exactly(tmp_path):
    w = {name: x.astype(ml_dtypes.bfloat16) for name, x in weights(LLAMA).items()}
    params = load_model(write_directory(tmp_path, LLAMA, w), dtype=jnp.bfloat16).params
    np.testing.assert_array_equal(params.embed, w["model.embed_tokens.weight"])


def test_fingerprint_tells_checkpoints_apart_and_not_layouts(tmp_path):
    w = weights(LLAMA)
    one = load_model(write_directory(tmp_path / "one", LLAMA, w), dtype=jnp.float32)
    sharded = load_model(write_directory(tmp_path / "sharded", LLAMA, w, 2), dtype=jnp.float32)
    w["model.layers.1.mlp.up_proj.weight"][0, 3] += 1e-3
    tuned = load_model(write_directory(tmp_path / "tuned", LLAMA, w), dtype=jnp.float32)
    assert one.fingerprint == sharded.fingerprint != tuned.fingerprint
    assert one.tokenizer.identity == tuned.tokenizer.identity
    assert one.name == "one"


def test_a_tied_model_ignores_a_spare_head_and_buffers(tmp_path):
    w = weights(LLAMA) | {"lm_head.weight": np.zeros((VOCAB, D), np.float32),
                          "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    assert load_model(write_directory(tmp_path, LLAMA, w), dtype=jnp.float32).params.head is None


def test_all_mismatches_are_reported_at_once(tmp_path):
    w = weights(QWEN2)
    del w["model.layers.1.mlp.up_proj.weight"], w["lm_head.weight"]
    w["model.norm.weight"] = np.ones(D + 1, np.float32)
    w["model.layers.0.adapter.weight"] = np.ones(3, np.float32)
    with pytest.raises(BadModelFile) as e:
        load_model(write_directory(tmp_path, QWEN2, w), dtype=jnp.float32)
    for part in ("2 missing", "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight [65]",
                 "instead of [64]", "model.layers.0.adapter.weight"):
        assert part in str(e.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_names_file_and_tensor(tmp_path, value):
    w = weights(LLAMA)
    w["model.layers.1.self_attn.v_proj.weight"][3, 5] = value
    with pytest.raises(BadModelFile, match=r"model\.safetensors.*layers\.1\.self_attn\.v_proj\.weight.*NaN"):
        load_model(write_directory(tmp_path, LLAMA, w), dtype=jnp.bfloat16)


def test_a_value_beyond_float16_is_refused_there_only(tmp_path):
    w = weights(LLAMA)
    w["model.embed_tokens.weight"][7, 7] = 1e5
    directory = write_directory(tmp_path, LLAMA, w)
    load_model(directory, dtype=jnp.bfloat16)
    with pytest.raises(BadModelFile, match="as float16"):
        load_model(directory, dtype=jnp.float16)


def test_a_truncated_file_and_a_missing_shard_are_named(tmp_path):
    file = write_directory(tmp_path / "cut", LLAMA, weights(LLAMA)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadModelFile, match=r"cut.model\.safetensors is truncated"):
        load_model(file.parent, dtype=jnp.float32)
    directory = write_directory(tmp_path / "lost", LLAMA, weights(LLAMA), 3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadModelFile, match=r"lacks model-00002-of-00003\.safetensors, of 3 files"):
        load_model(directory, dtype=jnp.float32)


@pytest.mark.parametrize(("change", "named"), [
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"model_type": "qwen3_moe"}, "mixture of experts"),
    ({"model_type": "falcon"}, "'falcon'"),
    ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
    ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
])
def test_an_unsupported_setting_is_named(tmp_path, change, named):
    directory = write_directory(tmp_path, QWEN2 | change, weights(QWEN2))
    with pytest.raises(UnsupportedModel, match=named):
        load_model(directory, dtype=jnp.float32)


def test_integer_weights_are_refused_by_name(tmp_path):
    w = weights(LLAMA)
    w["model.norm.weight"] = np.ones(D, np.int8)
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight has dtype I8"):
        load_model(write_directory(tmp_path, LLAMA, w), dtype=jnp.float32)


def test_a_source_that_does_not_exist_says_what_would(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHECLIP_NO_HUB", "1")
    monkeypatch.setenv("CACHECLIP_MODELS", str(tmp_path))
    with pytest.raises(BadModelFile, match="cacheclip pull smollm2-135m"):
        load_model("smollm2-135m", dtype=jnp.float32)
    with pytest.raises(BadModelFile, match="nobody/nothing.*local directory"):
        load_model("nobody/nothing", dtype=jnp.float32)
    with pytest.raises(BadModelFile, match=r"absent\.gguf.*No such file"):
        load_model(tmp_path / "absent.gguf", dtype=jnp.float32)


def test_a_tokenizer_of_another_model_can_be_given_and_must_fit(tmp_path):
    directory = write_directory(tmp_path / "model", LLAMA, weights(LLAMA))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(BadModelFile, match=r"no tokenizer\.json"):
        load_model(directory, dtype=jnp.float32)
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other)
    assert load_model(directory, dtype=jnp.float32, tokenizer=other).tokenizer.vocab_size <= VOCAB
    raw = json.loads((directory / "config.json").read_text()) | {"vocab_size": 100}
    w = weights(LLAMA)
    w["model.embed_tokens.weight"] = w["model.embed_tokens.weight"][:100]
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(w, directory / "model.safetensors")
    with pytest.raises(BadModelFile, match="embeds only 100"):
        load_model(directory, dtype=jnp.float32, tokenizer=other)


_ON_TWO_DEVICES = """
import sys, jax, jax.numpy as jnp
from cacheclip_jax.model.load import load_model
mesh = jax.make_mesh((2,), ("model",))
whole = load_model(sys.argv[1], dtype=jnp.float32).params
split = load_model(sys.argv[1], dtype=jnp.float32, mesh=mesh).params
assert jax.tree.all(jax.tree.map(lambda a, b: (jax.device_get(a) == jax.device_get(b)).all(), whole, split))
assert {s.data.shape for s in split.layers[0].qkv.addressable_shards} == {(64, 64)}
assert {s.data.shape for s in split.layers[0].down.addressable_shards} == {(64, 48)}
"""


def test_two_devices_hold_the_halves_of_the_same_weights(tmp_path):
    directory = write_directory(tmp_path, QWEN2, weights(QWEN2))
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", _ON_TWO_DEVICES, str(directory)], env=env, check=True)
