"""The question read without the context: its queries over the chunk caches' keys (FusionRAG's online selection)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cacheclip_jax.assemble import Placement, place
from cacheclip_jax.attention import for_rows, row_attention
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.params import Layer
from cacheclip_jax.model.rope import rotate
from cacheclip_jax.score import Scoring, attention_weights


@partial(jax.jit, static_argnames=("cfg", "scoring", "scored", "how"), donate_argnames="x")
def alone_span(x: Float[Array, "T D"], layers: tuple[Layer, ...], cfg: ModelConfig, scoring: Scoring,
               scored: tuple[bool, ...], positions: Int[Array, "T"], context: Int[Array, "2"],
               rows: Float[Array, "B R H"], where: Placement, total: Float[Array, "S"], how: str = "blocked"
               ) -> tuple[Float[Array, "T D"], Float[Array, "S"]]:
    """A span of layers for the rows of prefix and question, which see each other and nothing else.

    At the layers that are `scored` the question's queries, rotated to where the question is in the whole prompt, meet
    the keys of the context (slots context[0] to context[1]); the softmax is over these. What `scoring` makes of the
    weights is added to `total`. `positions` are 0, 1, ... (padding: -1).
    """
    prefix, question = context
    asks = positions >= prefix
    sees = jnp.where(asks, question - 1, -1)
    for nth, layer in enumerate(layers):
        q, k, v = decoder.project(x, layer, cfg)
        if scored[nth]:
            keys, _ = place(cfg, rows[nth], where)
            moved = rotate(q.swapaxes(0, 1), positions + question - prefix, cfg.rope).swapaxes(0, 1)
            weights = attention_weights(moved, keys, sees, prefix)
            weights = weights.mean(1) if scoring.heads == "mean" else weights.max(1)
            total += _over_rows(weights, asks, scoring)
        q, k = (rotate(y.swapaxes(0, 1), positions, cfg.rope) for y in (q, k))
        attended = row_attention(q.swapaxes(0, 1), k, v.swapaxes(0, 1), positions, for_rows(how, len(x)))
        x = decoder.finish(x, attended, layer, cfg)
    return x, total


def _over_rows(weights, asks, scoring):
    """Weights [T, S], zero but for the question's rows, reduced over these."""
    if scoring.rows == "max":
        return weights.max(0)
    if scoring.rows == "last":
        return weights[jnp.where(asks, jnp.arange(len(asks)), 0).max()]
    return weights.sum(0) / asks.sum()
