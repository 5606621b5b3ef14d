"""Side: what one model brings to a request, wherever its chunk caches lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from cacheclip_jax.assemble import Placement
from cacheclip_jax.bucket import bucket
from cacheclip_jax.model.load import Model
from cacheclip_jax.plan import Behind
from cacheclip_jax.prompt import Prompt

Stage = Literal["question", "repair", "prefill"]


class LayerFeed(Protocol):
    """The rows of a request's prefix and chunks, a block of layers after another, and where in them each slot's lie."""

    @property
    def blocks(self) -> Sequence[range]: ...

    @property
    def where(self) -> Placement: ...

    def take(self, number: int) -> jax.Array:
        """The rows [B, R, H] of the layers `blocks[number]`; blocks are taken in order."""

    def computed(self, mark: jax.Array) -> None:
        """Hear that the next block was dispatched; `mark` is ready when it's done, and no later program is given it."""

    def then(self, do: Callable[[], None]) -> None:
        """Call `do`, from any thread, when the last block is on the device."""

    def stop(self) -> None:
        """Hear that nothing more will be taken."""


class Side(Protocol):
    """One model's part in a request: its weights, the prompt in its tokens, and its chunk caches.

    `slots` is how many an assembled cache has, with room for the answer; `sharding` where small inputs go.
    """

    @property
    def model(self) -> Model: ...

    @property
    def prompt(self) -> Prompt: ...

    @property
    def slots(self) -> int: ...

    @property
    def sharding(self) -> Sharding: ...

    def feed(self, behind: Behind, depth: int, wanted: Sequence[bool] | None = None) -> LayerFeed:
        """The caches of at least the first `depth` layers; a chunk that isn't `wanted` may be left out."""

    def begin(self) -> None:
        """Hear that a feed of this side will be asked for, so that it may start to load to the host."""

    def release(self) -> None:
        """Hear that small inputs, which would wait behind caches, are on their way: these may follow to the device."""

    def rows(self, count: int, stage: Stage) -> int:
        """How many rows, padding included, a program for `count` rows has."""

    def watch(self, stage: str, array: jax.Array, since: float | str | None = None) -> None:
        """Count the time until `array` is there to `stage`, without waiting; see `Clock.watch`."""


def up_to(blocks: Sequence[range], depth: int) -> list[range]:
    """Blocks of layers as far as the first `depth` layers go."""
    return [range(block.start, min(block.stop, depth)) for block in blocks if block.start < depth]


_SIZES = {"question": (16, 8), "repair": (64, 32), "prefill": (64, 32)}  # smallest, and sizes per doubling


def bucketed(count: int, stage: Stage) -> int:
    """Rows in sizes that cost at most 1/8 of padding for a question, and 1/32 for a long prompt."""
    return bucket(count, *_SIZES[stage])


class Kept:
    """A feed whose blocks stay on the device, so that a second pass over them loads nothing."""

    def __init__(self, feed: LayerFeed) -> None:
        self.blocks, self.where, self.then, self.stop = feed.blocks, feed.where, feed.then, feed.stop
        self._feed = feed
        self._rows: list[jax.Array] = []
        self._at = self._computed = 0

    def take(self, number: int) -> jax.Array:
        """The rows of a block; of those never taken before, the next one only."""
        if number == len(self._rows):
            self._rows.append(jnp.copy(self._feed.take(number)))  # whose memory may be used again for a later block
        self._at = number
        return self._rows[number]

    def computed(self, mark: jax.Array) -> None:
        """Pass on that a block was dispatched, the first time that it was."""
        if self._at == self._computed:
            self._computed += 1
            self._feed.computed(mark)
