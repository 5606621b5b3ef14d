"""The student: what training changes in the aux model, how it scores, and the adapter that it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.adapter import Adapter, Factors, Lora, Rows
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.load import Model
from cacheclip_jax.score import Scoring
from train.forward import Context, Kernel, Stacked, encode_context, score_batch
from train.packed import Packed

Layers = Literal["last", "late", "all"] | tuple[int, ...]


@dataclass(frozen=True)
class Design:
    """What may change.

    layers: scored ones, as `Scoring.layers`; each of their heads gets a weight. context: as `Scoring.context`.
    lora_layers: whose projections change, () for head weights alone. parts: which projections. rank, alpha: LoRA's.
    rows: "question" changes the rows that go through the aux online; stored chunk caches stay valid. "all" changes
      chunks too, and backpropagates through them: several times the cost, and caches of its own.
    """

    layers: Layers = "late"
    context: Context = "cached"
    lora_layers: Layers | tuple[()] = "all"
    parts: tuple[Literal["q", "k"], ...] = ("q",)
    rank: int = 16
    alpha: float = 32.0
    rows: Rows = "question"

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.parts or set(self.parts) - {"q", "k"}:
            raise BadInput(f"rank={self.rank}, parts={self.parts}: a rank of 1 or more, and q, k or both")
        if self.rows not in ("question", "all"):
            raise BadInput(f"rows={self.rows!r}: choose question or all")
        self.scoring()  # refuses layers and context that aren't there

    def scoring(self, head_weights: tuple[tuple[float, ...], ...] | None = None) -> Scoring:
        """The scoring of the finished adapter: the last question row's attention, by these head weights."""
        return Scoring(layers=self.layers, rows="last", context=self.context, head_weights=head_weights)

    def changed(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose projections change."""
        if not self.lora_layers:
            return ()
        return Scoring(layers=cast(Any, self.lora_layers)).layer_indices(num_layers)


@struct.dataclass
class Student:
    """What training changes, float32. `lora` has a leading axis L; where a layer doesn't change, b stays zero.
    `heads` are logits of the scored layers' head weights: their softmax over all of them is."""

    lora: Lora
    heads: Float[Array, "l N"]


def new_student(key: jax.Array, cfg: ModelConfig, design: Design) -> Student:
    """A student that begins where the untouched model is best: b = 0 in every low-rank change, and equal head weights
    for the layers of the preset "late"; other layers that are scored begin with a twentieth of their weight."""
    out = {"q": cfg.num_heads * cfg.head_dim, "k": cfg.num_kv_heads * cfg.head_dim}
    L, r, D = cfg.num_layers, design.rank, cfg.d_model
    factors = {part: Factors(jax.random.normal(jax.random.fold_in(key, n), (L, r, D)) * D**-0.5,
                             jnp.zeros((L, out[part], r)))
               for n, part in enumerate(design.parts)}
    scored, late = design.scoring().layer_indices(L), Scoring(layers="late").layer_indices(L)
    heads = np.log([1.0 if index in late or not set(scored) & set(late) else 0.05 for index in scored])
    heads = np.repeat(heads[:, None], cfg.num_heads, 1).astype(np.float32)
    return Student(Lora(**factors), jnp.asarray(heads))


def scaled(student: Student, cfg: ModelConfig, design: Design) -> Lora | None:
    """The low-rank changes as they are added: b times alpha / r, zero for layers that don't change."""
    changed = design.changed(cfg.num_layers)
    if not changed:
        return None
    scale = np.zeros((cfg.num_layers, 1, 1), np.float32)
    scale[list(changed)] = design.alpha / design.rank
    return jax.tree.map(lambda factors: Factors(factors.a, factors.b * scale), student.lora,
                        is_leaf=lambda node: isinstance(node, Factors))


def all_head_weights(student: Student, cfg: ModelConfig, design: Design) -> Float[Array, "L N"]:
    """Head weights of every layer, zero for those that aren't scored; they sum to one."""
    weights = jax.nn.softmax(student.heads.reshape(-1)).reshape(student.heads.shape)
    chosen = jnp.array(design.scoring().layer_indices(cfg.num_layers))
    return jnp.zeros((cfg.num_layers, cfg.num_heads)).at[chosen].set(weights)


def score(student: Student, weights: Stacked, cfg: ModelConfig, design: Design, packed: Packed, how: Kernel
          ) -> Float[Array, "B S"]:
    """The student's scores of a batch, as the adapter will give them. Layers after the last scored one don't run."""
    depth = design.scoring().depth(cfg.num_layers)
    layers, lora, heads = jax.tree.map(lambda leaf: leaf[:depth], (
        weights.layers, scaled(student, cfg, design), all_head_weights(student, cfg, design)))
    used = Stacked(weights.top, layers)
    cache = encode_context(used, cfg, packed, design.context, how, lora if design.rows == "all" else None)
    return score_batch(used, cfg, packed, cache, heads, lora)


def to_adapter(student: Student, model: Model, design: Design, card: dict[str, Any]) -> Adapter:
    """The adapter that scores as the student."""
    cfg = model.config
    scale, changed = design.alpha / design.rank, design.changed(cfg.num_layers)

    def of_layer(index: int) -> Lora:
        return Lora(**{part: Factors(np.asarray(getattr(student.lora, part).a[index]),
                                     np.asarray(getattr(student.lora, part).b[index]) * np.float32(scale))
                       for part in design.parts})

    heads = np.asarray(all_head_weights(student, cfg, design))[list(design.scoring().layer_indices(cfg.num_layers))]
    weights = tuple(tuple(float(w) for w in layer) for layer in heads)
    lora = tuple(of_layer(index) if index in changed else None for index in range(cfg.num_layers))
    return Adapter(lora, design.scoring(weights), design.rows, model.fingerprint, model.name, card)
