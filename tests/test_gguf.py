"""GGUF files give the config, weights and tokenizer of the same model as safetensors, or a refusal by name."""

from __future__ import annotations

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from cacheclip_jax.errors import BadModelFile, UnsupportedModel
from cacheclip_jax.model.gguf import gguf_config, gguf_eos_ids, gguf_tensors
from cacheclip_jax.model.load import load_model
from cacheclip_jax.model.tokenizer import Tokenizer
from tests.checkpoints import LLAMA, QWEN2, D, H, bpe, weights, write_directory, write_gguf


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.BF16])
@pytest.mark.parametrize("raw", [QWEN2, LLAMA], ids=["qwen2", "llama"])
def test_a_gguf_file_loads_as_its_dequantised_safetensors_do(tmp_path, raw, kind):
    w = weights(raw)
    rounded = {name: x if x.ndim == 1 else gguf.dequantize(gguf.quantize(x, kind), kind)
               for name, x in w.items()}
    ours = load_model(write_gguf(tmp_path / "m.gguf", raw, w, kind=kind), dtype=jnp.float32)
    theirs = load_model(write_directory(tmp_path / "m", raw, rounded), dtype=jnp.float32)
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.tokenizer.identity == theirs.tokenizer.identity
    assert ours.name == "m"


def test_rows_are_dequantised_on_their_own(tmp_path, monkeypatch):
    tensors = gguf_tensors(write_gguf(tmp_path / "m.gguf", LLAMA, weights(LLAMA), kind=Kind.Q8_0))
    q = tensors["model.layers.0.self_attn.q_proj.weight"]
    whole, seen, real = q.read((slice(None), slice(None))), [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: seen.append(len(data)) or real(data, kind))
    np.testing.assert_array_equal(q.read((slice(5, 9), slice(2, 30))), whole[5:9, 2:30])
    assert seen == [4]


def test_rope_frequencies_become_divisors_and_qkv_biases_are_found(tmp_path):
    w = weights(LLAMA) | {"rope_freqs.weight": np.linspace(1, 8, H // 2, dtype=np.float32)}
    cfg = gguf_config(write_gguf(tmp_path / "m.gguf", LLAMA, w))
    assert cfg.rope.divisors == tuple(float(x) for x in w["rope_freqs.weight"])
    assert cfg.tied and not cfg.qkv_bias
    assert "rope_freqs.weight" not in gguf_tensors(tmp_path / "m.gguf")
    assert gguf_config(write_gguf(tmp_path / "q.gguf", QWEN2, weights(QWEN2))).qkv_bias


def test_biases_of_llama_q_and_k_follow_their_rows(tmp_path):
    w = weights(LLAMA)
    for name in [name for name in w if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        w[name.replace("weight", "bias")] = w[name][:, 0].copy()
    params = load_model(write_gguf(tmp_path / "m.gguf", LLAMA, w), dtype=jnp.float32).params
    for layer in params.layers:
        np.testing.assert_array_equal(layer.qkv_bias, layer.qkv[:, 0])


@pytest.mark.parametrize(("raw", "settings", "named"), [
    (LLAMA, {"expert_count": 8}, "llama.expert_count=8"),
    (LLAMA, {"rope__scaling__type": "yarn"}, "llama.rope.scaling.type='yarn'"),
    (QWEN2, {"attention__sliding_window": 128}, "attention.sliding_window=128"),
    (LLAMA, {"rope__dimension_count": H // 2}, "rope.dimension_count=8"),
    (LLAMA | {"model_type": "gemma2"}, {}, "general.architecture 'gemma2'"),
])
def test_an_unsupported_setting_is_named(tmp_path, raw, settings, named):
    with pytest.raises(UnsupportedModel) as e:
        gguf_config(write_gguf(tmp_path / "m.gguf", raw, weights(raw), **settings))
    assert named in str(e.value) and "m.gguf" in str(e.value)


def test_settings_that_change_nothing_are_accepted(tmp_path):
    unused = {"expert_count": 0, "rope__scaling__type": "none", "attention__sliding_window": 512}
    gguf_config(write_gguf(tmp_path / "m.gguf", QWEN2, weights(QWEN2), **unused, rope__dimension_count=H))


def test_a_tensor_type_without_dequantisation_is_named(tmp_path):
    w = weights(LLAMA) | {"model.norm.weight": np.ones(D, np.int32)}
    with pytest.raises(UnsupportedModel, match=r"output_norm\.weight has type I32"):
        gguf_tensors(write_gguf(tmp_path / "m.gguf", LLAMA, w))


@pytest.mark.parametrize("keep", [0, 3, 2000, -500])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = write_gguf(tmp_path / "m.gguf", LLAMA, weights(LLAMA))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadModelFile, match=r"m\.gguf"):
        gguf_config(path)


def test_another_kind_of_file_is_named(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(BadModelFile, match=r"m\.gguf isn't a whole GGUF file"):
        gguf_config(tmp_path / "m.gguf")


@pytest.mark.parametrize("pre", ["qwen2", "smollm", "llama-bpe"])
def test_the_tokenizer_keeps_the_ids_of_the_file(tmp_path, pre):
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", LLAMA, weights(LLAMA), pre=pre))
    text = "the cat sat on the mat in 2024,\n\n  naïve <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    vocab = bpe().get_vocab()
    assert tokenizer.encode("<|im_end|>", special=True).ids == (vocab["<|im_end|>"],)
    assert gguf_eos_ids(tmp_path / "m.gguf") == tuple(sorted((vocab["<|im_end|>"], vocab["<|endoftext|>"])))


def test_an_unknown_pre_tokenizer_asks_for_a_directory(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", LLAMA, weights(LLAMA), pre="tekken")
    with pytest.raises(UnsupportedModel, match=r"'tekken'.*directory with tokenizer\.json"):
        Tokenizer.from_gguf(path)
