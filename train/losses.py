"""Losses: how far scores are from the teacher's, over groups of context tokens, since groups are what is selected."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cacheclip_jax.errors import BadInput
from train.packed import GROUP, Packed

_TINY = 1e-9


@dataclass(frozen=True)
class Loss:
    """A weighted sum of three losses; a weight of 0 leaves one out.

    kl: KL divergence of the scores from the teacher's, both normalised over the context.
    ranking: ListNet (Cao et al. 2007, equation 4: cross entropy of top-one probabilities) of the logarithms of the
      scores at `temperature`: above 1 what lies below the very best counts for more.
    recall: 1 - the soft recall of the teacher's top tokens, mean over `budgets` (shares of the context): a group is in
      by the sigmoid of how far the logarithm of its score is above the edge of what the budget takes, over `softness`.
    """

    kl: float = 1.0
    ranking: float = 0.0
    recall: float = 1.0
    temperature: float = 2.0
    budgets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    softness: float = 0.3

    def __post_init__(self) -> None:
        if min(self.kl, self.ranking, self.recall) < 0 or self.kl + self.ranking + self.recall == 0:
            raise BadInput(f"kl={self.kl}, ranking={self.ranking}, recall={self.recall}: 0 or more each, not all 0")
        if self.temperature <= 0 or self.softness <= 0 or not self.budgets or not all(0 < b < 1 for b in self.budgets):
            raise BadInput(f"temperature={self.temperature}, softness={self.softness}, budgets={self.budgets}: all are "
                           "above 0, and budgets below 1")

    def __call__(self, scores: Float[Array, "S"], target: Float[Array, "S"], packed: Packed
                 ) -> dict[str, Float[Array, ""]]:
        """The losses of one prompt by name, and "loss", their weighted sum."""
        real, within = packed.sizes > 0, _members(packed)
        log_p, log_q = (_log_shares(_sums(each, within), real) for each in (scores, target))
        parts = {"kl": jnp.sum(jnp.where(real, jnp.exp(log_q) * (log_q - log_p), 0)),
                 "ranking": -jnp.sum(jnp.where(real, jnp.exp(_tempered(log_q, real, self.temperature))
                                               * _tempered(log_p, real, self.temperature), 0)),
                 "recall": 1 - soft_recall(log_p, target, packed, self.budgets, self.softness)}
        total = self.kl * parts["kl"] + self.ranking * parts["ranking"] + self.recall * parts["recall"]
        return {**parts, "loss": total}


def soft_recall(log_p: Float[Array, "G"], target: Float[Array, "S"], packed: Packed, budgets: tuple[float, ...],
                softness: float) -> Float[Array, ""]:
    """The mean over budgets of the soft share of the teacher's top tokens that lie in groups which are taken."""
    real, total = packed.sizes > 0, packed.sizes.sum()
    order = jnp.argsort(jnp.where(real, -log_p, jnp.inf))
    before = jnp.cumsum(packed.sizes[order]) - packed.sizes[order]
    rank = jnp.argsort(jnp.argsort(jnp.where(packed.context, -target, jnp.inf)))
    found = []
    for budget in budgets:
        tokens = jnp.round(budget * total)
        last = jnp.maximum(jnp.sum((before < tokens) & real[order]) - 1, 0)
        edge = jax.lax.stop_gradient(log_p[order[jnp.array([last, jnp.minimum(last + 1, real.sum() - 1)])]].mean())
        taken = jax.nn.sigmoid((log_p - edge) / softness)
        wanted = _sums(jnp.where((rank < tokens) & (target > 0), 1.0, 0.0), _members(packed))
        found.append(jnp.sum(taken * wanted) / jnp.maximum(wanted.sum(), 1))
    return jnp.stack(found).mean()


def _members(packed: Packed) -> tuple[Array, Array]:
    """For each group the slots of up to GROUP tokens, and which of them are its own. Gathered, not scattered: sums come
    out the same every time."""
    within = jnp.arange(GROUP)
    slots = jnp.minimum(packed.starts[:, None] + within, len(packed.ids) - 1)
    return slots, within < packed.sizes[:, None]


def _sums(values: Float[Array, "S"], members: tuple[Array, Array]) -> Float[Array, "G"]:
    slots, own = members
    return jnp.where(own, values[slots], 0).sum(1)


def _log_shares(sums: Float[Array, "G"], real: Bool[Array, "G"]) -> Float[Array, "G"]:
    """Logarithms of shares; what is no group has a very small one."""
    shares = sums / jnp.maximum(sums.sum(), 1e-30)
    return jnp.log(jnp.where(real, shares, 0) + _TINY)


def _tempered(log_p: Float[Array, "G"], real: Bool[Array, "G"], temperature: float) -> Float[Array, "G"]:
    return jax.nn.log_softmax(jnp.where(real, log_p / temperature, -1e9))
