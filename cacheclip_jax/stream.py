"""AnswerStream: text pieces of one answer as they are decoded, then its result."""

from __future__ import annotations

import time
from collections.abc import Iterator

import jax
import numpy as np

from cacheclip_jax import compiles
from cacheclip_jax.answer import Result, Selection, Times
from cacheclip_jax.assemble import KVCache
from cacheclip_jax.decode import Sampling, TextStream, decode, first_token, padded_stop_ids
from cacheclip_jax.model.load import Model

DECODE_STEPS = 4  # tokens per compiled decode call, and so per streamed piece


class AnswerStream:
    """Iterate for text; `result` is there at the end. The first token is on the host when the constructor returns."""

    def __init__(self, model: Model, prefill, text: TextStream, sampling: Sampling, max_new_tokens: int):
        self._model, self._prefill, self._text, self._limit = model, prefill, text, max_new_tokens
        self._sampling = (np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p),
                          padded_stop_ids(model))
        self._greedy = sampling.temperature == 0
        self._state = first_token(prefill.logits, prefill.tail.slot, jax.random.key(sampling.seed),
                                  *self._sampling, greedy=self._greedy)
        self._state.token.copy_to_host_async()  # queued behind the program, not asked for when that is seen to be done
        self._first = int(self._state.token)
        self._ttft = prefill.clock.stop()
        self._cache: KVCache | None = prefill.cache
        self._result: Result | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What went wrong with stored chunks on the way to the first token, and was put right."""
        return tuple(self._prefill.fetched.warnings)

    @property
    def result(self) -> Result:
        """The whole answer. Raises RuntimeError before the stream has been read to its end."""
        if self._result is None:
            raise RuntimeError("the answer isn't finished: iterate over the stream first")
        return self._result

    def step(self) -> jax.Array:
        """Start to compute the next DECODE_STEPS tokens, -1 after the end."""
        tokens, self._state, self._cache = decode(
            self._model.params, self._model.config, self._state, self._cache, *self._sampling, steps=DECODE_STEPS,
            greedy=self._greedy, how=self._model.attention.name, tail=self._prefill.decode_tail)
        return tokens

    def __iter__(self) -> Iterator[str]:
        if self._cache is None:
            raise RuntimeError("this stream was read already: ask again")
        started = time.perf_counter()
        ids: list[int] = []
        block, ended = [self._first], False
        # One call runs while the last one's tokens are read; after the end it does nothing.
        ahead = self.step() if self._limit > 1 else None
        while True:
            fresh: list[int] = []
            for token in block:
                ended = token in self._model.tokenizer.eos_ids
                if ended or len(ids) + len(fresh) == self._limit:
                    break
                fresh.append(token)
            ids += fresh
            if piece := self._text.push(fresh):
                yield piece
            if self._text.stopped or ended or len(ids) == self._limit or ahead is None:
                break
            computed, ahead = ahead, self.step() if len(ids) + DECODE_STEPS < self._limit else None
            block = [int(t) for t in np.asarray(computed) if t >= 0]
        if piece := self._text.finish():
            yield piece
        self._cache = None
        reason = "stop_string" if self._text.stopped else "stop" if ended else "length"
        self._finish(ids, reason, time.perf_counter() - started)

    def _finish(self, ids: list[int], reason, decode_seconds: float) -> None:
        p = self._prefill
        recomputed = int(p.plan.recompute.sum())
        self._result = Result(
            text=self._text.text, token_ids=tuple(ids), finish_reason=reason, method=p.method,
            realised_ratio=recomputed / p.prompt.context_tokens, context_tokens=p.prompt.context_tokens,
            prefix_tokens=len(p.prompt.prefix), question_tokens=len(p.prompt.question),
            reused_tokens=0 if p.planned.drop else p.prompt.context_tokens - recomputed, recomputed_tokens=recomputed,
            hits=p.fetched.hits, misses=p.fetched.misses, encoded=tuple(p.fetched.encoded),
            repaired=tuple(p.fetched.repaired), warnings=self.warnings,
            compiles=compiles.count() - p.compiled_before,
            times=Times(**p.clock.stages(), ttft=self._ttft, decode=decode_seconds),
            passages=p.passages, selection=Selection(p.plan.recompute, p.plan.scores, p.plan.ranked))
