"""Which configs are computed, and which are refused by name."""

import jax
import pytest

from cacheclip_jax.errors import BadModelFile, UnsupportedModel
from cacheclip_jax.model.config import Llama3Scaling, Rope, from_hf
from cacheclip_jax.model.params import abstract

QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-6,
         "max_position_embeddings": 512, "rope_theta": 1e6, "hidden_act": "silu"}


def test_the_families_differ_in_biases_and_norms_as_published():
    qwen2 = from_hf(QWEN2)
    assert qwen2.qkv_bias and not qwen2.out_bias and not qwen2.qk_norm
    qwen3 = from_hf(QWEN2 | {"model_type": "qwen3", "head_dim": 32, "attention_bias": False})
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 32
    llama = from_hf(QWEN2 | {"model_type": "llama", "attention_bias": True, "mlp_bias": True})
    assert llama.qkv_bias and llama.out_bias and llama.mlp_bias


def test_rope_is_read_from_old_and_new_configs():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    expected = Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    llama = QWEN2 | {"model_type": "llama"}
    assert from_hf(llama | {"rope_theta": 5e5, "rope_scaling": scaling}).rope == expected
    assert from_hf(llama | {"rope_parameters": scaling | {"rope_theta": 5e5}}).rope == expected


@pytest.mark.parametrize(("change", "named"), [
    ({"model_type": "mixtral"}, "mixture of experts"),
    ({"model_type": "deepseek_v3"}, "latent attention"),
    ({"model_type": "gemma3_text"}, "sliding-window"),
    ({"model_type": "unheard_of"}, "unheard_of"),
    ({"model_type": None, "text_config": {}}, "multimodal"),
    ({"use_sliding_window": True, "sliding_window": 128}, "sliding_window=128"),
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"num_experts": 8}, "num_experts=8"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
])
def test_what_would_not_be_computed_exactly_is_refused_by_name(change, named):
    with pytest.raises(UnsupportedModel, match=named):
        from_hf(QWEN2 | change)


def test_an_unused_window_is_no_reason_to_refuse():
    assert from_hf(QWEN2 | {"use_sliding_window": False, "sliding_window": 128}).family == "qwen2"
    assert from_hf(QWEN2 | {"model_type": "mistral", "sliding_window": None}).family == "mistral"


def test_missing_settings_are_named_all_at_once():
    with pytest.raises(BadModelFile, match="hidden_size, vocab_size"):
        from_hf({k: v for k, v in QWEN2.items() if k not in ("hidden_size", "vocab_size")})


def test_init_has_the_shapes_and_dtypes_that_abstract_states(tiny):
    cfg, params = tiny
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, params, abstract(cfg, "float32"))
    assert all(jax.tree.leaves(same))
    matrices = sum(x.size for path, x in jax.tree.leaves_with_path(params)
                   if not any(w in path[-1].name for w in ("norm", "bias")))
    assert matrices == cfg.num_params
