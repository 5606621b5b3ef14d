"""Greedy decoding of many sequences at once, each judged on the beginning of full attention's answer before."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float, Int

from cacheclip_jax.assemble import KVCache
from cacheclip_jax.model import decoder
from cacheclip_jax.model.config import ModelConfig
from cacheclip_jax.model.load import Model
from cacheclip_jax.model.params import Params
from cacheclip_jax.plan import Tail
from cacheclip_jax.recompute import attend_and_finish, continuation_logits


@struct.dataclass
class Reference:
    """The first n tokens of full attention's answer and the logits that chose them; those behind the token that ends
    the answer aren't `counted`."""

    ids: Int[Array, "n"]
    logits: Float[Array, "n V"]
    counted: Bool[Array, "n"]


@struct.dataclass
class Start:
    """Where B sequences begin: the logits of their prompts' last rows, where their caches end, how many tokens they may
    answer (0: a row not in use), and what they are judged on."""

    logits: Float[Array, "B V"]
    tail: Tail  # of [B]
    limit: Int[Any, "B"]
    reference: Reference  # of [B n] and [B n V]


@struct.dataclass
class Answers:
    """Answers without the token that ended them, padded with -1.

    kl: KL divergence in nats of a sequence's distribution from full attention's (KL(full || this)), token by token of
      full attention's answer. same: whether both would choose the same token there. counted: as in `Reference`.
    """

    tokens: Int[Array, "B M"]
    kl: Float[Array, "B n"]
    same: Bool[Array, "B n"]
    counted: Bool[Array, "B n"]


def empty_batch(cfg: ModelConfig, B: int, slots: int, dtype: Any, sharding: Sharding) -> KVCache:
    """The caches of B sequences, [B K S H] a layer, of zeros."""
    shape = (B, cfg.num_kv_heads, slots, cfg.head_dim)
    return KVCache(*(tuple(jnp.zeros(shape, dtype, device=sharding) for _ in range(cfg.num_layers)) for _ in range(2)))


@partial(jax.jit, donate_argnames="batch")
def put(batch: KVCache, cache: KVCache, row: Int[Array, ""]) -> KVCache:
    """The batch, donated, with a sequence's cache in one of its rows."""
    return jax.tree.map(lambda many, one: jax.lax.dynamic_update_slice(many, one[None], (row, 0, 0, 0)), batch, cache)


def first_tokens(model: Model, logits: Float[Array, "V"], slot: int, cache: KVCache, count: int) -> Reference:
    """The `count` most likely first tokens behind a full prefill's cache, which stays as it is; nothing waits."""
    rows, stop_ids = np.arange(count - 1), np.array(model.tokenizer.eos_ids, np.int32)
    unknown = jnp.zeros((count - 1, len(logits)), logits.dtype, device=logits.sharding)
    reference = _reference(logits, unknown, stop_ids)
    for done in range(1, count):  # all rows each time, so that it is one program: those not known yet are padding
        further = continuation_logits(model.params, model.config, reference.ids[:-1],
                                      np.where(rows < done, slot + rows, -1), cache, model.attention.name)
        reference = _reference(logits, further, stop_ids)
    return reference


@jax.jit
def _reference(first: Float[Array, "V"], further: Float[Array, "m V"], stop_ids: Int[Array, "M"]) -> Reference:
    logits = jnp.concatenate([first[None], further])
    ids = logits.argmax(-1)
    stops = (ids[:, None] == stop_ids).any(-1)
    return Reference(ids, logits, jnp.cumsum(stops) - stops == 0)


@partial(jax.jit, static_argnames=("cfg", "longest"), donate_argnames="cache")
def decode_batch(params: Params, cfg: ModelConfig, start: Start, cache: KVCache, stop_ids: Int[Array, "M"],
                 longest: int) -> tuple[Answers, KVCache]:
    """Judge and answer, in one loop that ends when every sequence has: first the reference's tokens are fed, then, over
    the same slots, each sequence's own. No answer is longer than `longest`. The cache, [B K S H] a layer, is donated.
    """
    reference, tail = start.reference, start.tail
    judged = reference.ids.shape[1] - 1  # steps that feed the reference: its last token isn't fed

    def stops(token):
        return (token[:, None] == stop_ids).any(-1)

    def judge(answers, at, logits):
        theirs = jax.nn.log_softmax(reference.logits[:, at])
        kl = (jnp.exp(theirs) * (theirs - jax.nn.log_softmax(logits))).sum(-1)
        return answers.replace(kl=answers.kl.at[:, at].set(jnp.maximum(kl, 0)),  # rounding, where both are the same
                               same=answers.same.at[:, at].set(logits.argmax(-1) == reference.ids[:, at]))

    def answer(answers, at, token, done):
        done |= stops(token) | (at >= start.limit)
        return answers.replace(tokens=answers.tokens.at[:, at].set(jnp.where(done, -1, token))), done

    def step(carry):
        i, token, done, answers, cache = carry
        judging = i < judged
        at = jnp.where(judging, i, i - judged)  # how many tokens stand between the prompt and the one that is fed
        fed = jnp.where(judging, reference.ids[:, at], token)
        logits, cache = _forward(params, cfg, fed, tail.slot + at, tail, cache)
        answers = jax.lax.cond(judging, judge, lambda answers, *_: answers, answers, at + 1, logits)
        best = jnp.where(judging, token, logits.argmax(-1))
        told, ended = answer(answers, at + 1, best, done)
        answers, done = jax.tree.map(lambda new, old: jnp.where(judging, old, new), (told, ended), (answers, done))
        return i + 1, best, done, answers, cache

    B, n = reference.ids.shape
    answers = Answers(jnp.full((B, longest), -1, jnp.int32), jnp.zeros((B, n)), jnp.zeros((B, n), bool),
                      reference.counted)
    token = start.logits.argmax(-1)
    answers, done = answer(judge(answers, 0, start.logits), 0, token, start.limit < 1)
    carry = jnp.int32(0), token, done, answers, cache
    *_, answers, cache = jax.lax.while_loop(lambda c: (c[0] < judged) | ~c[2].all(), step, carry)
    return answers, cache


def _forward(params, cfg, tokens, slots, tail, cache):
    """Logits [B V] of a token each, put into its slot of its sequence's cache."""
    x, kvs = decoder.embed(params, tokens)[:, None], []
    for layer, kv in zip(params.layers, zip(cache.k, cache.v, strict=True), strict=True):
        def one(x, kv, slot, tail, layer=layer):
            return attend_and_finish(x, layer, cfg, slot[None], kv, "dense", tail=tail)

        x, kv = jax.vmap(one)(x, kv, slots, tail)
        kvs.append(kv)
    return decoder.logits(params, cfg, x[:, 0]), KVCache(*zip(*kvs, strict=True))
