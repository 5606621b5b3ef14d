"""Adapter: what finetuning adds to an aux model: low-rank changes of q and k, and a scoring of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import struct
from jaxtyping import Array, Float

from cacheclip_jax.errors import BadInput, BadModelFile
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.params import Params
from cacheclip_jax.score import Scoring

FORMAT = 1
Rows = Literal["question", "all"]


@struct.dataclass
class Factors:
    """A low-rank change of a matrix [out, in]: it adds `b @ a` (LoRA, arXiv 2106.09685, section 4.1; the scale
    alpha / r is within `b`)."""

    a: Any  # [r, in]
    b: Any  # [out, r]


@struct.dataclass
class Lora:
    """The changes of one layer's query and key projections; None where there is none."""

    q: Factors | None = None  # [N*H, D]
    k: Factors | None = None  # [K*H, D]


def merged(qkv: Float[Array, "QKV D"], cfg: ModelConfig, lora: Lora) -> Float[Array, "QKV D"]:
    """A layer's joint matrix with its low-rank changes in it: added in float32, rounded once."""
    groups = cfg.num_heads // cfg.num_kv_heads
    rows = qkv.astype(jnp.float32).reshape(cfg.num_kv_heads, groups + 2, cfg.head_dim, -1)
    if lora.q is not None:
        rows = rows.at[:, :groups].add(_product(lora.q).reshape(cfg.num_kv_heads, groups, cfg.head_dim, -1))
    if lora.k is not None:
        rows = rows.at[:, groups].add(_product(lora.k).reshape(cfg.num_kv_heads, cfg.head_dim, -1))
    return rows.reshape(qkv.shape).astype(qkv.dtype)


def _product(factors: Factors) -> jax.Array:
    return jnp.matmul(factors.b, factors.a, precision=jax.lax.Precision.HIGHEST)


_merge = jax.jit(merged, static_argnames="cfg")


@dataclass(frozen=True)
class Adapter:
    """A finetuned aux model, as the difference to its base.

    lora: one entry a layer, None where nothing changes.
    scoring: how its attention becomes a score, head weights included.
    rows: "question" applies the changes to the rows that go through the aux online, so that chunk caches are those of
      the base model and stay valid; "all" also to the chunks, which makes caches of their own.
    base, base_name: fingerprint and name of the model that it was trained on.
    card: where it comes from: data, settings, metrics; JSON values only.
    """

    lora: tuple[Lora | None, ...]
    scoring: Scoring
    rows: Rows
    base: str
    base_name: str
    card: dict[str, Any] = field(default_factory=dict)

    def adapted(self, model: Model) -> Model:
        """The model with the adapter's changes in the weights that they are for.

        Where chunks are encoded anew the fingerprint is another one, so that no cache of the base model is taken for
        one of theirs. Raises BadInput for another model than the adapter's.
        """
        if model.fingerprint != self.base:
            raise BadInput(f"the adapter belongs to {self.base_name} (fingerprint {self.base}), and the aux model is "
                           f"{model.name} ({model.fingerprint}): load that one, or train an adapter for this one")
        if len(self.lora) != model.config.num_layers:
            raise BadModelFile(f"the adapter has {len(self.lora)} layers and {model.name} {model.config.num_layers}: "
                               "its card doesn't belong to it")
        self.scoring.weights(model.config)  # refuses head weights of another shape
        params = add_lora(model.params, model.config, self.lora)
        if self.rows == "question":
            return dataclasses.replace(model, question_params=params)
        fingerprint = hashlib.sha256((self.base + self.digest()).encode()).hexdigest()[:16]
        return dataclasses.replace(model, params=params, fingerprint=fingerprint)

    def tensors(self) -> dict[str, np.ndarray]:
        """The low-rank factors by name, float32."""
        out = {}
        for index, lora in enumerate(self.lora):
            for part in ("q", "k"):
                if lora is not None and (factors := getattr(lora, part)) is not None:
                    for name in ("a", "b"):
                        out[f"layers.{index}.{part}.{name}"] = np.asarray(getattr(factors, name), np.float32)
        return out

    def digest(self) -> str:
        """A hash of the low-rank factors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name}{tensor.shape}".encode() + tensor.tobytes())
        return digest.hexdigest()


def add_lora(params: Params, cfg: ModelConfig, lora: Sequence[Lora | None]) -> Params:
    """Weights with low-rank changes merged in; what doesn't change is shared."""
    layers = [layer if change is None else dataclasses.replace(layer, qkv=_merge(layer.qkv, cfg, change))
              for layer, change in zip(params.layers, lora, strict=True)]
    return Params(params.embed, tuple(layers), params.final_norm, params.head)


def save_adapter(adapter: Adapter, directory: str | Path) -> Path:
    """Write `adapter.safetensors` (factors and head weights) and its card `adapter.json`; returns the directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = adapter.tensors()
    if adapter.scoring.head_weights is not None:
        tensors["head_weights"] = np.asarray(adapter.scoring.head_weights, np.float32)
    scoring = dataclasses.asdict(dataclasses.replace(adapter.scoring, head_weights=None))
    card = {"format": FORMAT, "base": adapter.base, "base_name": adapter.base_name, "rows": adapter.rows,
            "num_layers": len(adapter.lora), "scoring": scoring, "digest": adapter.digest(), "card": adapter.card}
    safetensors.numpy.save_file(tensors, directory / "adapter.safetensors")
    (directory / "adapter.safetensors").chmod(0o644)  # the library makes it readable to its owner alone
    (directory / "adapter.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return directory


def load_adapter(directory: str | Path) -> Adapter:
    """The adapter in a directory. Raises BadModelFile for what is missing, damaged or of a later version."""
    directory = Path(directory).expanduser()
    missing = [name for name in ("adapter.json", "adapter.safetensors") if not (directory / name).is_file()]
    if missing:
        raise BadModelFile(f"{directory} lacks {' and '.join(missing)}: an adapter is a directory with both, as"
                           " training writes it")
    try:
        card = json.loads((directory / "adapter.json").read_text(encoding="utf-8"))
        tensors = safetensors.numpy.load_file(directory / "adapter.safetensors")
        if card["format"] != FORMAT:
            raise BadModelFile(f"{directory} has adapter format {card['format']} and this version reads {FORMAT}: "
                               "update cacheclip-jax, or train the adapter again")
        weights = tensors.pop("head_weights", None)
        scoring = card["scoring"]
        if not isinstance(scoring["layers"], str):
            scoring["layers"] = tuple(scoring["layers"])
        heads = None if weights is None else tuple(tuple(float(w) for w in layer) for layer in weights)
        lora = tuple(_lora(tensors, index) for index in range(card["num_layers"]))
        adapter = Adapter(lora, Scoring(**scoring | {"head_weights": heads}), card["rows"], card["base"],
                          card["base_name"], card["card"])
    except (KeyError, TypeError, ValueError, OSError, safetensors.SafetensorError) as e:
        raise BadModelFile(f"{directory} isn't an adapter ({e!r}): copy it again") from None
    if adapter.digest() != card["digest"]:
        raise BadModelFile(f"{directory}: adapter.json describes another adapter.safetensors: copy both again")
    return adapter


def _lora(tensors: dict[str, np.ndarray], index: int) -> Lora | None:
    parts = {part: Factors(tensors[f"layers.{index}.{part}.a"], tensors[f"layers.{index}.{part}.b"])
             for part in ("q", "k") if f"layers.{index}.{part}.a" in tensors}
    return Lora(**parts) if parts else None
