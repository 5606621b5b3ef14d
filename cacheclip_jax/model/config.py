"""ModelConfig: the architecture of one decoder, and the refusal of every architecture we would not compute exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cacheclip_jax.errors import BadModelFile, UnsupportedModel


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's RoPE scaling: low frequencies divided by `factor`, a smooth ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base `theta`, and at most one of Llama 3's scaling or per-frequency divisors (GGUF)."""

    theta: float
    llama3: Llama3Scaling | None = None
    divisors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """One decoder: Qwen2/2.5, Qwen3, Llama 3.x, SmolLM2 or Mistral. Static under jit.

    Letters used for shapes everywhere: L `num_layers`, D `d_model`, F `d_mlp`, N `num_heads`, K `num_kv_heads`,
    H `head_dim`, V `vocab_size`, G = N // K.
    """

    family: str
    num_layers: int
    d_model: int
    d_mlp: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope: Rope
    norm_eps: float
    max_positions: int
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def kv_values_per_token(self) -> int:
        """Number of K and V values that one token adds to the cache, over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim

    @property
    def num_params(self) -> int:
        """Weights of the matrices (embedding counted once, and once more when the head isn't tied)."""
        attention = self.d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        layers = self.num_layers * (attention + 3 * self.d_model * self.d_mlp)
        return layers + self.vocab_size * self.d_model * (1 if self.tied else 2)


FAMILIES = ("qwen2", "qwen3", "llama", "mistral")

_REFUSED = {
    "mixtral": "mixture of experts",
    "qwen2_moe": "mixture of experts",
    "qwen3_moe": "mixture of experts",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "gemma": "another norm and embedding scale",
    "gemma2": "sliding-window layers and soft caps",
    "gemma3": "sliding-window layers",
    "gemma3_text": "sliding-window layers",
    "phi3": "fused projections",
    "smollm3": "layers without RoPE",
    "gpt_oss": "mixture of experts and attention sinks",
    "ministral": "sliding-window layers",
}

# Settings that change the arithmetic: the value that means "not in use", by name.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "kv_lora_rank": (None,),
    "no_rope_layers": (None,),
    "logit_scale": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
}


def read_config(directory: Path) -> ModelConfig:
    """The config of a Hugging Face model directory (its config.json).

    Raises BadModelFile when the file is missing or isn't JSON, UnsupportedModel when a setting isn't handled exactly.
    """
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadModelFile(f"{path} is missing: a model directory holds config.json, *.safetensors and "
                           "tokenizer.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise BadModelFile(f"{path} isn't valid JSON ({e}): fetch the model again") from None
    return from_hf(raw, str(path))


def from_hf(raw: Mapping[str, Any], where: str = "config") -> ModelConfig:
    """The config of a Hugging Face config.json's content; `where` names it in errors.

    Raises UnsupportedModel naming the setting when the decoder would not compute this model exactly.
    """
    def refuse(setting: str, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{where}: {setting} isn't supported ({why}). Supported: Qwen2/2.5, Qwen3, Llama 3.x, "
                                "SmolLM2 and Mistral with full attention and default or llama3 RoPE.")

    family = raw.get("model_type")
    if family not in FAMILIES:
        why = _REFUSED.get(str(family), "text_config: a multimodal wrapper" if "text_config" in raw
                           else "an unknown architecture")
        raise refuse(f"model_type {family!r}", why)
    for name, allowed in _NEUTRAL.items():
        if name in raw and raw[name] not in allowed:
            raise refuse(f"{name}={raw[name]!r}", "it changes the model's arithmetic")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise refuse(f"quantization_config with quant_method {method!r}", "use the unquantised weights or a GGUF file")
    missing = [k for k in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                           "vocab_size", "rms_norm_eps", "max_position_embeddings") if k not in raw]
    if missing:
        raise BadModelFile(f"{where} lacks {', '.join(missing)}: fetch the model again")
    _refuse_sliding_window(raw, refuse)
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise refuse(f"num_key_value_heads={kv_heads}", f"it doesn't divide num_attention_heads={heads}")
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        family=family,
        num_layers=raw["num_hidden_layers"],
        d_model=raw["hidden_size"],
        d_mlp=raw["intermediate_size"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        vocab_size=raw["vocab_size"],
        rope=_rope(raw, refuse),
        norm_eps=raw["rms_norm_eps"],
        max_positions=raw["max_position_embeddings"],
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bias,
        out_bias=family != "qwen2" and bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
    )


def _refuse_sliding_window(raw: Mapping[str, Any], refuse) -> None:
    kinds = set(raw.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise refuse(f"layer_types with {', '.join(sorted(kinds))}", "only full attention is computed exactly")
    window = raw.get("sliding_window")
    # Qwen configs carry a window that use_sliding_window=false switches off; Mistral has no such switch.
    switched_on = raw.get("use_sliding_window", raw["model_type"] == "mistral")
    if switched_on and window is not None:
        raise refuse(f"sliding_window={window}", "a sliding window is in use")


def _rope(raw: Mapping[str, Any], refuse) -> Rope:
    # transformers 5 writes rope_parameters (theta inside); older configs have rope_theta and rope_scaling.
    scaling = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = scaling.get("rope_theta", raw.get("rope_theta"))
    if theta is None:
        theta = 10000.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise refuse(f"partial_rotary_factor={scaling['partial_rotary_factor']}", "only full rotary embeddings")
    if kind == "default":
        return Rope(theta=float(theta))
    if kind == "llama3":
        return Rope(theta=float(theta), llama3=Llama3Scaling(
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_positions=int(scaling["original_max_position_embeddings"])))
    raise refuse(f"RoPE scaling {kind!r}", "its rotation isn't implemented")
