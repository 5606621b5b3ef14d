"""What a method decides for one request, and what decoding needs to know of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from cacheclip_jax.errors import BadInput

if TYPE_CHECKING:
    from cacheclip_jax.prompt import Prompt

Behind = Literal["shared", "none"]
Caches = Behind | None
Scores = np.ndarray | jax.Array


@dataclass(frozen=True)
class Reshape:
    """How rows after the context attend to it where nothing is recomputed (APE, arXiv 2502.05431): the context's logits
    are divided by `temperature` T, and its log-sum-exp counts `scale * T` times where it meets that of all other
    slots. 1 and 1 are the plain softmax.
    """

    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise BadInput(f"{name}={value} is out of range: it must be above 0 and finite")


@struct.dataclass
class Discount:
    """How much less stale tokens count: `nats` are subtracted from every attention logit of a slot from `start` to
    `end` that isn't recomputed, in all layers and heads, for recomputed rows, the question and the answer."""

    start: Int[Any, ""]
    end: Int[Any, ""]
    nats: Float[Any, ""]

    @classmethod
    def of(cls, prompt: Prompt, behind: Behind, nats: float) -> Discount | None:
        """The discount for chunks that were encoded `behind` the shared prefix or nothing; None for 0 nats."""
        if not nats:
            return None
        return cls(np.int32(prompt.exact_tokens(behind)), np.int32(prompt.question_start), np.float32(nats))

    def bias(self, row_of_slot: Int[Array, "S"]) -> Float[Array, "S"]:
        """What is added to each slot's logits; `row_of_slot` is -1 where nothing is recomputed."""
        slot = jax.numpy.arange(row_of_slot.shape[0])
        return jax.numpy.where((row_of_slot < 0) & (slot >= self.start) & (slot < self.end), -self.nats, 0)


@dataclass(frozen=True)
class Plan:
    """Which context tokens are recomputed (boolean, one per context token; on device more may follow, all False), and
    the scores behind it, if any. `at_most` bounds how many, where the device knows the selection and the host not yet.

    The others come from their chunk caches as they are, unless one of these says otherwise:
      dense_layers: in the first n layers the K and V of every token are fresh. Beyond the recomputed rows that costs
        n - 1 full layers of the whole prompt and the projections of another one, from whose attention on only these
        rows go on.
      drop: the others aren't in the cache at all; the kept ones stay at their positions in the whole prompt.
      reshape: every chunk begins where the first one does, the question after the longest, and attends as `Reshape`
        says; nothing is recomputed.
      discount: they count less.

    `rows` are those to recompute and the question's (see `choose_rows`), where the program that selected them made them
    too. Carrying the plan out uses them up, so it works once. `ranked` is what groups were ranked by, where that isn't
    the scores.
    """

    recompute: np.ndarray | jax.Array
    scores: Scores | None = None
    at_most: int | None = None
    dense_layers: int = 0
    drop: bool = False
    reshape: Reshape | None = None
    discount: Discount | None = None
    rows: tuple[Float[Array, "T D"], Int[Array, "T"], Int[Array, ""]] | None = None
    ranked: Scores | None = None

    def __post_init__(self) -> None:
        if (self.dense_layers > 0) + self.drop + (self.reshape is not None) + (self.discount is not None) > 1:
            raise ValueError("a plan has one of dense_layers, drop, reshape and discount")

    @property
    def plain(self) -> bool:
        """Whether decoding is as after a full prefill: a slot is a position, attention a softmax over all slots."""
        return not self.drop and self.reshape is None and self.discount is None

    def count(self) -> int:
        """Tokens to recompute, or what bounds them; waits for the device only where nothing does."""
        return int(np.asarray(self.recompute).sum()) if self.at_most is None else self.at_most

    def fetched(self, context_tokens: int) -> Plan:
        """The plan on the host, one entry per context token; `ranked` are the scores where nothing else is."""
        scores = None if self.scores is None else np.asarray(self.scores)[:context_tokens]
        ranked = scores if self.ranked is None else np.asarray(self.ranked)[:context_tokens]
        mask = np.asarray(self.recompute)[:context_tokens]
        return dataclasses.replace(self, recompute=mask, scores=scores, ranked=ranked, rows=None)


@struct.dataclass
class Context:
    """The slots from `start` to `end`, attention to which is reshaped (see `Reshape`)."""

    start: Int[Any, ""]
    end: Int[Any, ""]
    temperature: Float[Any, ""]
    scale: Float[Any, ""]

    @classmethod
    def of(cls, start: int, end: int, reshape: Reshape) -> Context:
        """The slots and how they are reshaped, as arrays."""
        return cls(np.int32(start), np.int32(end), np.float32(reshape.temperature), np.float32(reshape.scale))


@struct.dataclass
class Tail:
    """Where a cache ends, and how tokens behind it attend.

    The next token's K and V go to `slot`, rotated to `position`; later tokens follow in both. `bias` is what a discount
    adds to each slot's logits, `context` what is reshaped; None where there is none.
    """

    slot: Int[Any, ""]
    position: Int[Any, ""]
    bias: Float[Any, "S"] | None = None
    context: Context | None = None

    def whole(self, slots: int) -> Tail:
        """The same with every part there, so that tails of all kinds are one kind of pytree."""
        return Tail(self.slot, self.position, np.zeros(slots, np.float32) if self.bias is None else self.bias,
                    self.context or Context.of(0, 0, Reshape(1.0, 1.0)))

    def positions(self, slots: Int[Array, "T"]) -> Int[Array, "T"]:
        """The positions of tokens in slots behind the cache; padding (slot -1) stays -1."""
        return jax.numpy.where(slots < 0, -1, slots + (self.position - self.slot))
