"""A side of random tokens and a tiny model whose chunk caches lie in memory, for tests of what methods see."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheclip_jax.assemble import join, placement
from cacheclip_jax.encode import encode_many, encode_prefix, no_prefix
from cacheclip_jax.model import decoder
from cacheclip_jax.model.rope import rotate
from cacheclip_jax.model.tokenizer import Encoded
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.request import Request
from cacheclip_jax.side import bucketed
from tests.conftest import random_prompt

SLOTS = 128


@dataclass
class ResidentFeed:
    """Every layer's rows in blocks of two layers, as often as they are asked for."""

    layers: list[np.ndarray]
    where: Any

    @property
    def blocks(self) -> list[range]:
        return [range(i, min(i + 2, len(self.layers))) for i in range(0, len(self.layers), 2)]

    def take(self, number: int) -> jax.Array:
        return jnp.stack([jnp.asarray(self.layers[i]) for i in self.blocks[number]])

    def computed(self, mark: jax.Array) -> None:
        mark.block_until_ready()

    def then(self, do) -> None:
        do()

    def stop(self) -> None:
        pass


class ResidentSide:
    """A tiny model's part in a request of random tokens."""

    def __init__(self, model: tuple[Any, Any], lengths=(5, 24, 17, 30, 9), stop_ids=(), seed: int = 0):
        cfg, params = model
        self.model = SimpleNamespace(params=params, asking=params, config=cfg, name="tiny",
                                     attention=SimpleNamespace(name="blocked"),
                                     tokenizer=SimpleNamespace(identity="tiny", eos_ids=stop_ids))
        prefix, *chunks, question = random_prompt(cfg, lengths, seed)
        spans = [tuple((i, i + 1) for i in range(len(c))) for c in chunks]
        self.prompt = Prompt(tuple(map(int, prefix)), tuple(Encoded(tuple(map(int, c)), s, "x" * len(c)) for c, s in
                                                            zip(chunks, spans, strict=True)), tuple(map(int, question)))
        self.slots, self.sharding = SLOTS, params.embed.sharding
        self.watched: list[str] = []

    def feed(self, behind, depth, wanted=None) -> ResidentFeed:
        cfg, params = self.model.config, self.model.params
        prefix = encode_prefix(params, cfg, self.prompt.prefix)
        anchor = prefix if behind == "shared" else no_prefix(params, cfg)
        kv = dict(encode_many(params, cfg, [c.ids for c in self.prompt.chunks], anchor))
        parts = [prefix, *(kv[i] for i in range(len(kv)))]
        return ResidentFeed(join(cfg, self.slots, parts, np.float32), jax.tree.map(jnp.asarray, placement(
            cfg, self.slots, [p.shape[3] for p in parts])))

    def begin(self) -> None:
        pass

    def release(self) -> None:
        pass

    def rows(self, count: int, stage: str) -> int:
        return bucketed(count, stage)

    def watch(self, stage, array, since=None) -> None:
        self.watched.append(stage)


def request(model, aux=None, **options) -> Request:
    """A request over a resident primary, and an aux model with the same prompt (the primary itself by default)."""
    side = ResidentSide(model, **options)
    return Request(side, lambda: side if aux is None else ResidentSide(aux, **options))


def of_context(request: Request, scores) -> np.ndarray:
    """A signal's numbers of the context tokens."""
    return np.asarray(scores)[: request.prompt.context_tokens]


@jax.default_matmul_precision("highest")
def by_hand(params, cfg, ids, positions=None):
    """A forward pass of whole sequences, written with dense masks: per layer the rows that enter it, rotated queries
    [T, N, H] and keys [T, K, H], values [T, K, H] and attention [T, N, T]; and the logits [T, V]. Rows are `positions`
    apart where these are given, and see all rows before them."""
    positions = jnp.arange(len(ids)) if positions is None else jnp.asarray(positions)
    x, out, group = decoder.embed(params, jnp.asarray(ids)), [], cfg.num_heads // cfg.num_kv_heads
    for layer in params.layers:
        q, k, v = decoder.project(x, layer, cfg)
        q, k = (rotate(y.swapaxes(0, 1), positions, cfg.rope).swapaxes(0, 1) for y in (q, k))
        s = jnp.einsum("tnh,snh->tns", q, jnp.repeat(k, group, 1)) * cfg.head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(len(ids), dtype=bool)[:, None], s, -jnp.inf), -1)
        out.append(SimpleNamespace(x=x, q=q, k=k, v=v, weights=weights))
        x = decoder.finish(x, jnp.einsum("tns,snh->tnh", weights, jnp.repeat(v, group, 1)), layer, cfg)
    return out, decoder.logits(params, cfg, x)
