"""The pool: repaired caches of any method gathered until there are enough to decode them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from cacheclip_jax.assemble import KVCache
from cacheclip_jax.bucket import bucket
from cacheclip_jax.caches import replicated
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.load import Model
from cacheclip_jax.online import Repaired
from eval.batch_decode import Answers, Reference, Start, decode_batch, empty_batch, put


@dataclass(frozen=True)
class Answer:
    """One sequence's answer, and what was kept with it; see `Answers`. top1 is the share of full attention's first
    tokens that this one would choose too."""

    ids: tuple[int, ...]
    kl_first_token: float
    kl: float
    top1: float
    mask: np.ndarray  # of recomputed context tokens, one or more False behind them


class Pool[T]:
    """Up to `size` sequences with caches of equal size, decoded when they are complete.

    `report` hears of every answer with the tag that came with it, in order, while the next ones are gathered.
    """

    def __init__(self, model: Model, size: int, report: Callable[[T, Answer], None]):
        if size < 1:
            raise BadInput(f"batch={size} is out of range: 1 or more")
        self._model, self._size, self._report = model, size, report
        self._sharding = replicated(model.params.embed.sharding)
        self._stop_ids = np.array(model.tokenizer.eos_ids, np.int32)
        self._batch: KVCache | None = None
        self._slots = 0
        self._tags: list[T] = []
        self._starts: list[Start] = []
        self._masks: list[jax.Array | np.ndarray] = []
        self._decoding: tuple[list[T], Answers, list[jax.Array | np.ndarray]] | None = None

    def add(self, tag: T, repaired: Repaired, limit: int, reference: Reference, mask: jax.Array | np.ndarray) -> None:
        """Take a sequence whose answer has at most `limit` tokens; `mask` says which context tokens were recomputed."""
        slots = repaired.cache.slots
        if self._tags and slots != self._slots:
            self._decode()
        if slots != self._slots:
            self._batch = None
            self._hand_out()  # waits until the batch of the other size is decoded: memory needn't hold both
            dtype = repaired.cache.k[0].dtype
            self._batch = empty_batch(self._model.config, self._size, slots, dtype, self._sharding)
            self._slots = slots
        assert self._batch is not None
        self._batch = put(self._batch, repaired.cache, np.int32(len(self._tags)))
        self._tags.append(tag)
        start = Start(repaired.logits, repaired.tail.whole(slots), np.int32(limit), reference)
        # All on the device: a mixture would be another program for every order in which methods come.
        self._starts.append(jax.device_put(start, self._sharding))
        self._masks.append(mask)
        if len(self._tags) == self._size:
            self._decode()

    def finish(self) -> None:
        """Decode what is there, and report everything."""
        if self._tags:
            self._decode()
        self._hand_out()

    def wait(self) -> None:
        """Wait until the device has done what was asked of it here."""
        jax.block_until_ready(self._batch)

    def _decode(self) -> None:
        """Dispatch the batch; the one before, which is ready by now or soon, is handed out meanwhile."""
        unused = dataclasses.replace(self._starts[0], limit=jax.device_put(np.int32(0), self._sharding))
        starts = [*self._starts, *[unused] * (self._size - len(self._starts))]
        longest = bucket(max(int(s.limit) for s in starts), 128)
        assert self._batch is not None
        answers, self._batch = decode_batch(self._model.params, self._model.config, _stack(starts), self._batch,
                                            self._stop_ids, longest)
        before, self._decoding = self._decoding, (self._tags, answers, self._masks)
        self._tags, self._starts, self._masks = [], [], []
        if before is not None:
            self._fetch(*before)

    def _hand_out(self) -> None:
        if self._decoding is not None:
            decoding, self._decoding = self._decoding, None
            self._fetch(*decoding)

    def _fetch(self, tags: list[T], answers: Answers, masks: list[jax.Array | np.ndarray]) -> None:
        """One transfer for all of it."""
        told, fetched = jax.device_get((answers, masks))
        for row, (tag, mask) in enumerate(zip(tags, fetched, strict=True)):
            judged = told.counted[row]
            self._report(tag, Answer(tuple(int(t) for t in told.tokens[row] if t >= 0), float(told.kl[row, 0]),
                                     float(told.kl[row][judged].mean()), float(told.same[row][judged].mean()), mask))


@jax.jit
def _stack(starts: list[Start]) -> Start:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
