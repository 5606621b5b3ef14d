"""Decoding over a repaired cache: sampling and stop conditions on device, text and stop strings on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from cacheclip_jax.assemble import KVCache
from cacheclip_jax.errors import BadInput, UnsupportedModel
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.params import Params
from cacheclip_jax.plan import Tail
from cacheclip_jax.recompute import attend_and_finish

MAX_STOP_IDS = 8


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy at temperature 0, else from the softmax, cut to the `top_k` best (0: all)
    and to the smallest set that holds the share `top_p`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise BadInput(f"temperature={self.temperature} is out of range: it must be 0 (greedy) or more")
        if not 0 <= self.top_k < 2**31:
            raise BadInput(f"top_k={self.top_k} is out of range: it must be 0 (all) or more, and below 2**31")
        if not -(2**63) <= self.seed < 2**63:
            raise BadInput(f"seed={self.seed} is out of range: it must fit 64 bits")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p={self.top_p} is out of range: it must be above 0 and at most 1")


@struct.dataclass
class DecodeState:
    """Where a generation stands: the last token, the slot that it goes to (which is its position unless a tail says
    otherwise; it isn't in the cache yet), the random key, if it ended."""

    token: Int[Array, ""]
    slot: Int[Array, ""]
    key: Array
    done: Bool[Array, ""]


@partial(jax.jit, static_argnames="greedy")
def sample(logits: Float[Array, "V"], key: Array, temperature: Float[Array, ""], top_k: Int[Array, ""],
           top_p: Float[Array, ""], greedy: bool) -> Int[Array, ""]:
    """One token from logits. `greedy` is static, so that greedy decoding never sorts the vocabulary."""
    if greedy:
        return jnp.argmax(logits)
    order = jnp.argsort(-logits)
    ranked = logits[order] / temperature
    p = jax.nn.softmax(ranked)
    rank = jnp.arange(logits.shape[0])
    # The token that crosses top_p belongs to the set; the best token always does.
    keep = ((jnp.cumsum(p) - p < top_p) & ((top_k == 0) | (rank < top_k))) | (rank == 0)
    return order[jax.random.categorical(key, jnp.where(keep, ranked, -jnp.inf))]


@partial(jax.jit, static_argnames="greedy")
def first_token(logits: Float[Array, "V"], slot: Int[Array, ""], key: Array, temperature: Float[Array, ""],
                top_k: Int[Array, ""], top_p: Float[Array, ""], stop_ids: Int[Array, "M"], greedy: bool) -> DecodeState:
    """The state after a prompt whose last row gave `logits`; `slot` is where the first new token goes."""
    now, key = jax.random.split(key)
    token = sample(logits, now, temperature, top_k, top_p, greedy)
    return DecodeState(token=token, slot=slot, key=key, done=(token == stop_ids).any())


@partial(jax.jit, static_argnames=("cfg", "steps", "greedy", "how"), donate_argnames="cache")
def decode(params: Params, cfg: ModelConfig, state: DecodeState, cache: KVCache, temperature: Float[Array, ""],
           top_k: Int[Array, ""], top_p: Float[Array, ""], stop_ids: Int[Array, "M"], steps: int, greedy: bool,
           how: str = "blocked", tail: Tail | None = None) -> tuple[Int[Array, "steps"], DecodeState, KVCache]:
    """Up to `steps` further tokens in one compiled loop that ends at a stop token; -1 where it ended before.

    `stop_ids` are padded with -1. The cache is donated. A `tail` is for caches whose plan isn't plain.
    """
    def going(carry):
        i, state, _, _ = carry
        return (i < steps) & ~state.done

    def step(carry):
        i, state, cache, tokens = carry
        x = decoder.embed(params, state.token[None])
        keys, values = [], []
        for layer, kv in zip(params.layers, zip(cache.k, cache.v, strict=True), strict=True):
            x, (k, v) = attend_and_finish(x, layer, cfg, state.slot[None], kv, how, tail=tail)
            keys.append(k)
            values.append(v)
        cache = KVCache(tuple(keys), tuple(values))
        state = first_token(decoder.logits(params, cfg, x)[0], state.slot + 1, state.key, temperature, top_k, top_p,
                            stop_ids, greedy)
        return i + 1, state, cache, tokens.at[i].set(state.token)

    tokens = jnp.full(steps, -1, jnp.int32)
    _, state, cache, tokens = jax.lax.while_loop(going, step, (jnp.int32(0), state, cache, tokens))
    return tokens, state, cache


def padded_stop_ids(model: Model) -> Int[np.ndarray, "M"]:
    """A model's end tokens, padded with -1. Raises UnsupportedModel for more than MAX_STOP_IDS of them."""
    ids = model.tokenizer.eos_ids
    if len(ids) > MAX_STOP_IDS:
        raise UnsupportedModel(f"{model.name} has {len(ids)} end tokens, more than {MAX_STOP_IDS}")
    return np.array([*ids, *[-1] * (MAX_STOP_IDS - len(ids))], np.int32)


class TextStream:
    """Token ids in, text pieces out: whole characters only, and never a part of a stop string."""

    def __init__(self, decode_ids: Callable[[Sequence[int]], str], stop: Sequence[str]):
        if any(not s for s in stop):
            raise BadInput("an empty stop string would end every answer: leave it out")
        self._decode, self._stop = decode_ids, tuple(stop)
        self._ids: list[int] = []
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; returns the new text that is certain by now. Sets `stopped` at a stop string."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        self.text = self._decode(self._ids)
        cut = min((at for s in self._stop if (at := self.text.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.text, self.stopped = self.text[:cut], True
            return self._send(len(self.text))
        # Hold back what may still change: an unfinished character, or the beginning of a stop string.
        certain = len(self.text.rstrip("\ufffd"))
        for s in self._stop:
            for n in range(min(len(s) - 1, certain), 0, -1):
                if self.text[:certain].endswith(s[:n]):
                    certain -= n
                    break
        return self._send(certain)

    def finish(self) -> str:
        """The text that was held back, at the end of a generation."""
        return "" if self.stopped else self._send(len(self.text))

    def _send(self, end: int) -> str:
        piece = self.text[self._sent:end]
        self._sent = max(self._sent, end)
        return piece
