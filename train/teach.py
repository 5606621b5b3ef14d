"""The primary's verdict on a prompt: for every context token, how much it matters that it is recomputed.

Three signals come from one full prefill ("fresh" keys and values) and the assembled chunk caches ("stale" ones):

- attention: a_ls, the attention of the last question row and of the answer's rows to slot s at layer l, over full
  prefill; mean over rows, heads and layers.
- deviation: sum over kv heads of a_lks |v_fresh - v_stale|, mean over layers. By the triangle inequality it bounds what
  the stale value changes in the row's attention output: attention x KV deviation.
- influence: the tokens' shares in how far the answer moves. With D(C) the KL divergence of the answer's next-token
  distributions from full attention's when its rows read the caches C, and dC = fresh - stale,

      influence_s = - sum_i mean_t( dD/dC_si (stale + t dC) ) dC_si,    t = 1/2n, 3/2n, ...

  over keys and values of all layers: integrated gradients (arXiv 1703.01365, equation 1) from the stale caches to the
  fresh ones. Their sum over all slots is D(stale) - D(fresh) as n grows, and D(fresh) = 0: the whole loss of reuse,
  divided among tokens. Negative shares count as 0.

The answer is the primary's own greedy one after full prefill.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cacheclip_jax.errors import BadInput
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.score import Scoring
from train.forward import Cache, Kernel, Stacked, encode_context, read_rows
from train.packed import Packed

Target = Literal["attention", "deviation", "influence"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True)
class Teaching:
    """How the teacher looks: which layers' attention counts (as `Scoring.layers`), tokens of the greedy answer at most,
    and points n on the way from stale to fresh caches."""

    layers: Literal["last", "late", "all"] | tuple[int, ...] = "all"
    answer_tokens: int = 8
    points: int = 3

    def __post_init__(self) -> None:
        if self.answer_tokens < 1 or self.points < 1:
            raise BadInput(f"answer_tokens={self.answer_tokens}, points={self.points}: 1 or more each")
        Scoring(layers=self.layers)  # refuses other layers


@struct.dataclass
class Verdict:
    """A batch of verdicts: for each target scores [B, S], 0 outside the context; `kl`, D(stale) in nats summed over the
    answer's tokens; the answer's ids, -1 after its end."""

    scores: dict[str, Float[Array, "B S"]]
    kl: Float[Array, "B"]
    answer: Int[Array, "B A"]


@partial(jax.jit, static_argnames=("cfg", "teaching", "how"))
def teach(weights: Stacked, cfg: ModelConfig, packed: Packed, eos: Int[Array, "E"], teaching: Teaching,
          how: Kernel = "xla") -> Verdict:
    """The verdicts on a batch of prompts that were packed with `teaching.answer_tokens` free rows."""
    stale, fresh = (encode_context(weights, cfg, packed, context, how) for context in ("cached", "joint"))
    return jax.vmap(partial(_judge, weights, cfg, eos, teaching), in_axes=(0, 1, 1))(packed, stale, fresh)


def _judge(weights: Stacked, cfg: ModelConfig, eos, teaching: Teaching, packed: Packed, stale: Cache, fresh: Cache
           ) -> Verdict:
    ids, positions, answer, real = greedy(weights, cfg, packed, fresh, eos, teaching.answer_tokens)
    layers = teaching.layers
    chosen = Scoring(layers=layers).layer_indices(cfg.num_layers)
    at = packed.count - 1 + jnp.arange(teaching.answer_tokens)  # the rows whose next tokens are the answer
    row_weights = jnp.zeros(len(ids)).at[at].set(real / real.sum())
    change = jnp.linalg.norm((fresh[1] - stale[1]).astype(jnp.float32), axis=-1)  # [L, K, S]
    _, (attention, deviation) = read_rows(weights, cfg, ids, positions, fresh, row_weights, _weigh, change)
    influence, kl = _influence(weights, cfg, ids, positions, at, real, stale, fresh, teaching.points)
    scores = {"attention": attention[jnp.array(chosen)].mean(0), "deviation": deviation[jnp.array(chosen)].mean(0),
              "influence": jnp.maximum(influence, 0)}
    return Verdict({name: jnp.where(packed.context, s, 0) for name, s in scores.items()}, kl, answer)


def greedy(weights: Stacked, cfg: ModelConfig, packed: Packed, cache: Cache, eos: Int[Array, "E"], tokens: int
           ) -> tuple[Int[Array, "T"], Int[Array, "T"], Int[Array, "A"], Bool[Array, "A"]]:
    """The rows of question and greedy answer (ids and positions), the answer with -1 after its end, and which of its
    tokens are real, the one that ends it included. All rows run again for each token: few rows cost about as much as
    one.
    """
    row = jnp.arange(len(packed.rows))
    positions = jnp.where(row < packed.count + tokens, packed.positions[0] + row, -1)

    def extend(i, ids):
        logits = _predict(weights, cfg, ids, positions, cache, packed.count - 1 + i, 1)[0]
        return ids.at[packed.count + i].set(jnp.argmax(logits).astype(ids.dtype))

    ids = jax.lax.fori_loop(0, tokens, extend, packed.rows)
    answer = jax.lax.dynamic_slice_in_dim(ids, packed.count, tokens)
    ends = jnp.isin(answer, eos)
    real = jnp.cumsum(ends) - ends == 0
    return ids, positions, jnp.where(real, answer, -1), real


def _predict(weights, cfg, ids, positions, cache, start, count) -> Float[Array, "A V"]:
    """Next-token logits of `count` rows from `start` on."""
    x, _ = read_rows(weights, cfg, ids, positions, cache, jnp.zeros(len(ids)), lambda seen, _: None, None)
    return decoder.logits(weights.top, cfg, jax.lax.dynamic_slice_in_dim(x, start, count))


def _weigh(seen: Float[Array, "N S"], change: Float[Array, "K S"]) -> tuple[Float[Array, "S"], Float[Array, "S"]]:
    """A layer's part of attention and deviation."""
    return seen.mean(0), (seen.reshape(len(change), -1, seen.shape[1]).mean(1) * change).sum(0)


def _influence(weights, cfg, ids, positions, at, real, stale: Cache, fresh: Cache, points: int
               ) -> tuple[Float[Array, "S"], Float[Array, ""]]:
    known = jax.nn.log_softmax(_predict(weights, cfg, ids, positions, fresh, at[0], len(at)))

    def divergence(cache):
        guess = jax.nn.log_softmax(_predict(weights, cfg, ids, positions, cache, at[0], len(at)))
        return jnp.sum(jnp.where(real[:, None], jnp.exp(known) * (known - guess), 0))

    def between(t):
        return jax.tree.map(lambda a, b: (a + t * (b.astype(jnp.float32) - a)).astype(a.dtype), stale, fresh)

    def share(total, t):
        slopes = jax.grad(divergence)(between(t))
        return total - sum(jnp.sum(g.astype(jnp.float32) * (b.astype(jnp.float32) - a), axis=(0, 1, 3))
                           for g, a, b in zip(slopes, stale, fresh, strict=True)), None

    steps = (jnp.arange(points) + 0.5) / points
    total, _ = jax.lax.scan(share, jnp.zeros(stale[0].shape[2]), steps)
    return total / points, divergence(stale)
