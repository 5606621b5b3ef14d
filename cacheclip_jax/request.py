"""Request: what a method may look at to choose which tokens to recompute, each signal computed once, when asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from cacheclip_jax.bucket import bucket
from cacheclip_jax.decode import padded_stop_ids
from cacheclip_jax.early import early_attention, value_deviation
from cacheclip_jax.errors import BadInput
from cacheclip_jax.lookahead import lookahead_scores
from cacheclip_jax.online import Asked, ask, first_layers, prefill, question_scores
from cacheclip_jax.plan import Behind, Scores
from cacheclip_jax.prompt import Prompt
from cacheclip_jax.recompute import LayerCache
from cacheclip_jax.score import Scoring, context_scores, map_scores
from cacheclip_jax.side import Kept, LayerFeed, Side

AskedAux = tuple[float, LayerFeed | None, Asked]  # when, and what `question_scores` takes


class Request:
    """The primary's prompt, and signals of both models over it.

    A signal is one number per context token of `prompt`; on device there may be more after them. Nothing waits for the
    device, except to map scores between tokenizers. What the primary has loaded for a signal stays on the device for
    what follows.
    """

    def __init__(self, primary: Side, aux: Callable[[], Side], pool: ThreadPoolExecutor | None = None):
        """`aux` gives the aux model's side, or raises what is wrong with it; it is called when first needed. `pool`
        gives threads for what may be prepared aside."""
        self.primary = primary
        self._pool = pool
        self._make_aux = aux
        self._signals: dict[Hashable, Any] = {}
        self._kept: dict[Behind, Kept] = {}

    @property
    def prompt(self) -> Prompt:
        """The primary's prompt."""
        return self.primary.prompt

    @cached_property
    def aux(self) -> Side:
        """The aux model's side."""
        return self._make_aux()

    def aux_scores(self, scoring: Scoring) -> Scores:
        """Attention of the question in the aux model. The primary's caches start to load at the same time, to the
        device when the aux model's are there."""
        return self.once(("aux_scores", scoring), lambda: self._aux_scores(scoring))

    def ask_aux(self, scoring: Scoring) -> AskedAux:
        """Send the question to the aux model, its caches behind it. `aux_scores` does so too; who calls this before
        prepares what comes after the scores while these caches are on their way."""
        return self.once(("ask_aux", scoring), lambda: self._ask_aux(scoring))

    def aux_lookahead(self, steps: int, pool: int) -> Scores:
        """Attention of `steps` tokens that the aux model drafts after a full prefill of its own; see `lookahead.py`."""
        return self.once(("aux_lookahead", steps, pool), lambda: self._aux_lookahead(steps, pool))

    def primary_scores(self, scoring: Scoring, behind: Behind) -> Scores:
        """Attention of the question in the primary itself, over its chunk caches encoded `behind` the shared prefix or
        nothing. `scoring.context="joint"` costs a full prefill."""
        return self.once(("primary_scores", scoring, behind), lambda: self._primary_scores(scoring, behind))

    def value_deviation(self, layer: int, behind: Behind) -> Scores:
        """How far each context token's cached value is from a fresh one at a layer of the primary; see `early.py`. It
        costs the layers before it for the whole prompt."""
        return self.once(("value_deviation", layer, behind), lambda: self._value_deviation(layer, behind))

    def early_scores(self, layer: int) -> Scores:
        """Attention of the question to each context token at a layer of the primary, with the layers before it computed
        for the whole prompt; see `early.py`."""
        return self.once(("early_scores", layer), lambda: self._early_scores(layer))

    def early(self, depth: int) -> tuple[jax.Array, jax.Array, list[LayerCache]]:
        """The whole prompt after the primary's first `depth` layers: rows, positions (padding: -1), and caches of these
        layers, which whoever gives them away must copy."""
        return self.once(("early", depth), lambda: first_layers(
            self.primary.model, self.prompt.ids, depth, self.primary.slots,
            self.primary.rows(len(self.prompt.ids), "prefill")))

    def feed(self, behind: Behind, wanted: Sequence[bool] | None = None) -> LayerFeed:
        """The primary's chunk caches: those that a signal has loaded already, else on their way."""
        if behind in self._kept:
            return self._kept[behind]
        return self.primary.feed(behind, self.primary.model.config.num_layers, wanted)

    def aside[T](self, make: Callable[[], T]) -> Callable[[], T]:
        """Begin to make something in another thread, where there are any, while the calling one launches programs. What
        this gives waits for the result."""
        if self._pool is None:
            made = make()
            return lambda: made
        return self._pool.submit(make).result

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, computed when first asked for; for signals of methods' own too, under a key of theirs."""
        if key not in self._signals:
            self._signals[key] = make()
        return self._signals[key]

    def _keep(self, behind: Behind) -> Kept:
        if behind not in self._kept:
            self._kept[behind] = Kept(self.feed(behind))
        return self._kept[behind]

    def _ask_aux(self, scoring: Scoring) -> AskedAux:
        started, aux = time.perf_counter(), self.aux
        depth = scoring.layers_run(aux.model.config.num_layers)
        feed = aux.feed("shared", depth) if scoring.context != "joint" else None
        return started, feed, ask(aux, scoring, feed)

    def _aux_scores(self, scoring: Scoring) -> Scores:
        started, feed, asked = self.ask_aux(scoring)
        begun = self.aside(self.primary.begin)
        if feed is not None and not scoring.further:
            feed.then(self.primary.release)
        try:
            scores = question_scores(self.aux, scoring, asked, feed)
        finally:
            begun()
        self.primary.release()  # where scoring sent more until now
        return self._for_context(self.aux, scores, started)

    def _aux_lookahead(self, steps: int, pool: int) -> Scores:
        started, aux = time.perf_counter(), self.aux
        logits, cache = prefill(aux, spare=steps)
        context = np.array([len(aux.prompt.prefix), aux.prompt.question_start], np.int32)
        scores = lookahead_scores(aux.model.params, aux.model.config, logits, cache, np.int32(len(aux.prompt.ids)),
                                  context, padded_stop_ids(aux.model), steps, pool)
        return self._for_context(aux, _of_context(aux, scores), started)

    def _primary_scores(self, scoring: Scoring, behind: Behind) -> Scores:
        started = time.perf_counter()
        feed = self._keep(behind) if scoring.context != "joint" else None
        scores = question_scores(self.primary, scoring, ask(self.primary, scoring, feed), feed)
        return self._for_context(self.primary, scores, started)

    def _value_deviation(self, layer: int, behind: Behind) -> Scores:
        started, model, feed = time.perf_counter(), self.primary.model, self._keep(behind)
        _check_layer(layer, model.config.num_layers)
        x, _, _ = self.early(layer)
        for number, block in enumerate(feed.blocks):
            rows = feed.take(number)
            if layer in block:
                off = value_deviation(x, model.params.layers[layer], model.config, rows, feed.where,
                                      layer - block.start)
                feed.computed(off)
                return self._for_context(self.primary, _of_context(self.primary, off), started)
            feed.computed(x)
        raise AssertionError("every layer is in a block")

    def _early_scores(self, layer: int) -> Scores:
        started, model, prompt = time.perf_counter(), self.primary.model, self.prompt
        _check_layer(layer, model.config.num_layers)
        x, positions, _ = self.early(layer)
        scores = early_attention(x, model.params.layers[layer], model.config, positions,
                                 np.int32(prompt.question_start), np.int32(len(prompt.ids)),
                                 self.primary.rows(len(prompt.question), "question"))
        return self._for_context(self.primary, _of_context(self.primary, scores), started)

    def _for_context(self, side: Side, scores: jax.Array, started: float) -> Scores:
        """A number per context token of a side's prompt -> one per context token of the primary's."""
        side.watch("score", scores, started)
        own, ours = side.prompt, self.prompt
        if side.model.tokenizer.identity == self.primary.model.tokenizer.identity:
            return scores
        return scores_between(np.asarray(scores), own, ours)


def scores_between(scores: Float[np.ndarray, "C"], own: Prompt, target: Prompt) -> Float[np.ndarray, "C"]:
    """A number per context token of a prompt, anything after them -> one per context token of the same prompt in
    another tokenizer; see `map_scores`."""
    parts = np.split(scores[: own.context_tokens], np.cumsum(own.chunk_lengths)[:-1])
    return np.concatenate([map_scores(part, theirs.spans, chunk.spans)
                           for part, theirs, chunk in zip(parts, own.chunks, target.chunks, strict=True)])


def _of_context(side: Side, scores: Float[jax.Array, "S"]) -> Float[jax.Array, "C"]:
    return context_scores(scores, np.int32(len(side.prompt.prefix)), bucket(side.prompt.context_tokens))


def _check_layer(layer: int, num_layers: int) -> None:
    if not 0 <= layer < num_layers:
        raise BadInput(f"layer={layer} is out of range: the model has layers 0 to {num_layers - 1}")
