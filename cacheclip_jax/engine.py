"""CacheClip: load a model pair and a store, index documents, answer questions from repaired caches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from cacheclip_jax import compiles
from cacheclip_jax.answer import Result
from cacheclip_jax.assemble import KVCache
from cacheclip_jax.bucket import bucket
from cacheclip_jax.caches import ChunkCaches, Fetched
from cacheclip_jax.clock import Clock
from cacheclip_jax.decode import Sampling, TextStream
from cacheclip_jax.documents import Document
from cacheclip_jax.errors import BadInput, ContextTooLong
from cacheclip_jax.index import IndexReport, index_documents
from cacheclip_jax.methods import Method, make, takes_budget
from cacheclip_jax.model.adapter import Adapter, load_adapter
from cacheclip_jax.model.load import Model, load_model
from cacheclip_jax.model.tokenizer import nfc
from cacheclip_jax.online import execute, padded
from cacheclip_jax.plan import Plan, Tail
from cacheclip_jax.prompt import LEAD_IN, Prompt, PromptFormat
from cacheclip_jax.recompute import continuation_logits, recompute
from cacheclip_jax.request import Request
from cacheclip_jax.retrieve import Retriever
from cacheclip_jax.score import Scoring
from cacheclip_jax.select import Budget
from cacheclip_jax.store import ChunkStore, Passage, is_chunk_id
from cacheclip_jax.store_side import StoreSide
from cacheclip_jax.stream import DECODE_STEPS, AnswerStream
from cacheclip_jax.tier import Tier

HOST_BYTES = 4 << 30
Chunk = str | Passage


@dataclass
class Prefill:
    """A prompt whose cache is ready to decode from: the repaired cache and the last row's logits."""

    prompt: Prompt
    passages: tuple[Passage, ...]
    method: str
    planned: Plan  # may still be under way on the device
    logits: jax.Array  # [V]
    cache: KVCache
    tail: Tail
    fetched: Fetched
    clock: Clock
    compiled_before: int

    @cached_property
    def plan(self) -> Plan:
        """Which context tokens are recomputed, and why; waits for the device."""
        return self.planned.fetched(self.prompt.context_tokens)

    @property
    def decode_tail(self) -> Tail | None:
        """The tail, where decoding needs one."""
        return None if self.planned.plain else self.tail


class CacheClip:
    """KV-cache reuse for RAG: encode passages once, answer by recomputing the few tokens that matter.

        clip = CacheClip.load("qwen2.5-coder-0.5b", aux="smollm2-135m", store="./store")
        clip.index(["...a document...", "...another..."])
        print(clip.ask("Who keeps the north light?").text)
    """

    def __init__(self, primary: Model, aux: Model | None, store: ChunkStore, *,
                 prompt_format: PromptFormat = PromptFormat(), max_context: int | None = None,  # noqa: B008 (frozen)
                 host_bytes: int = HOST_BYTES, device_bytes: int = 0, aux_adapter: Adapter | None = None):
        self.store = store
        self.primary = ChunkCaches(primary, store, prompt_format)
        self.scoring = Scoring() if aux_adapter is None else aux_adapter.scoring  # of methods given by name
        if aux_adapter is not None:
            if aux is None:
                raise BadInput(f"the adapter of {aux_adapter.base_name} needs that aux model: load it with aux=...")
            aux = aux_adapter.adapted(aux)
        self.aux = ChunkCaches(aux, store, prompt_format) if aux is not None else None
        self._pool = ThreadPoolExecutor(64, thread_name_prefix="cacheclip")
        host: Tier | None = Tier(host_bytes) if host_bytes else None
        device: Tier | None = Tier(device_bytes) if device_bytes else None
        for caches in (pair := self._models()):
            caches.pair = pair
        for caches in [self.primary] if self.aux is None else [self.primary, self.aux]:
            caches.host, caches.device = host, device
        limit = primary.config.max_positions
        if max_context is not None and not 1 <= max_context <= limit:
            raise BadInput(f"max_context={max_context} is out of range: {primary.name} has {limit} positions")
        self.max_context = max_context or limit
        self._retriever: tuple[list[str], Retriever] | None = None

    @classmethod
    def load(cls, primary: str | Path, aux: str | Path | None = None,
             store: str | Path | ChunkStore = "cacheclip-store", *, dtype: str = "bfloat16",
             aux_device: Literal["default", "cpu"] = "default", mesh: Mesh | None = None,
             prompt_format: PromptFormat = PromptFormat(lead_in=LEAD_IN),  # noqa: B008
             max_context: int | None = None, host_bytes: int = HOST_BYTES, device_bytes: int = 0,
             aux_adapter: str | Path | None = None) -> CacheClip:
        """Load both models and open (or make) a store.

        Args:
          primary, aux: a name that `cacheclip pull` knows, a Hugging Face directory or hub id, or a .gguf file. Without
            an aux model every method but `cacheclip` and `specprefill` works.
          store: a path, or any URL that TensorStore takes (memory://, s3://, gs://); or an open ChunkStore.
          dtype: of weights and caches, float32, bfloat16 or float16.
          aux_device: "cpu" runs the aux model on the host's CPU, beside the accelerator.
          mesh: splits the primary over its axis "model".
          host_bytes: how many bytes of chunk caches stay in host memory, for both models; 0 reads every one from the
            store.
          device_bytes: how many bytes of chunk caches stay on the device, for both models; none by default.
          aux_adapter: a directory that finetuning wrote (docs/finetune.md): changes of the aux model and how it scores.

        Raises UnsupportedModel, BadModelFile or StoreError, each saying what to do.
        """
        if dtype not in ("float32", "bfloat16", "float16"):
            raise BadInput(f"dtype {dtype!r} isn't supported: choose float32, bfloat16 or float16")
        enable_compilation_cache()
        opened = store if isinstance(store, ChunkStore) else ChunkStore.open(store)
        big = load_model(primary, dtype=dtype, mesh=mesh)
        small = None
        if aux is not None:
            cpu = aux_device == "cpu" and jax.default_backend() != "cpu"
            small_mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("model",)) if cpu else mesh
            same = str(aux) == str(primary) and small_mesh is mesh
            small = big if same else load_model(aux, dtype=dtype, mesh=small_mesh)
        return cls(big, small, opened, prompt_format=prompt_format, max_context=max_context, host_bytes=host_bytes,
                   device_bytes=device_bytes, aux_adapter=None if aux_adapter is None else load_adapter(aux_adapter))

    # ---------------------------------------------------------------- index

    def index(self, items: Iterable[str | Document | Passage], *, chunk_tokens: int = 256, overlap: int = 0,
              replace: bool = False, progress: Callable[[str, int], None] | None = None) -> IndexReport:
        """Split documents into passages, encode them with both models, store the caches.

        Texts and documents are split to `chunk_tokens` tokens of the primary; a Passage is taken as it is. What is in
        the store already is found, not made again, so an interrupted call resumes. `progress(kind, n)` hears of
        "documents", "tokens", "bytes". With `replace`, each document's passages take the place of those that an
        earlier call stored under the same document name, in one step for readers; else they are added to them.

        Raises BadInput when there is nothing to index.
        """
        report = index_documents(self.store, self._models(), items, chunk_tokens, overlap, replace, progress)
        self._retriever = None
        return report

    def _models(self) -> list[ChunkCaches]:
        one = self.aux is None or self.aux.model is self.primary.model
        return [self.primary] if one else [self.primary, self.aux]  # type: ignore[list-item]

    # ---------------------------------------------------------------- ask

    def retrieve(self, question: str, k: int = 8) -> list[Passage]:
        """The store's k best passages for a question by BM25, the best one last."""
        stored = self.store.passage_ids()
        if self._retriever is None or self._retriever[0] != stored:
            self._retriever = (stored, Retriever(self.store.passages()))
        return self._retriever[1].top(question, k)

    def ask(self, question: str, chunks: Sequence[Chunk] | None = None, **options: Any) -> Result:
        """Answer a question from chunks; see `stream` for the options."""
        stream = self.stream(question, chunks, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(self, question: str, chunks: Sequence[Chunk] | None = None, *, method: str | Method = "cacheclip",
               ratio: float | None = None, budget: Budget | None = None, passages: int = 8,
               sampling: Sampling = Sampling(), max_new_tokens: int = 128,  # noqa: B008 (frozen)
               stop: Sequence[str] = ()) -> AnswerStream:
        """Answer a question piece by piece: returns when the first token is there; iterate for text, then read
        `.result`.

        Args:
          chunks: ids of stored passages, Passages, or texts, in the order of the prompt; None retrieves `passages` of
            them by BM25. What the store doesn't hold is encoded on the fly, and the result says so.
          method: a name ("cacheclip", "full", "prefix", "naive", "naive-none", "random", "cacheblend", "epic", "ape",
            "prophetkv", "fusionrag", "a3", "specprefill", "oracle") or a configured Method.
          ratio: share of context tokens to recompute (specprefill: to keep), 0 to 1, by default 0.2 (epic: 32 tokens a
            chunk); or `budget` for a token count or a share of the score mass.

        Raises BadInput for an empty question, an unknown chunk id or a ratio outside 0..1, ContextTooLong with the
        numbers when prompt and answer don't fit.
        """
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens={max_new_tokens} is out of range: it must be 1 or more")
        text = TextStream(self.primary.model.tokenizer.decode, stop)  # refuses bad stop strings before any work
        prefill = self.prefill(question, chunks, method=method, ratio=ratio, budget=budget, passages=passages,
                               reserve=max_new_tokens)
        return AnswerStream(self.primary.model, prefill, text, sampling, max_new_tokens)

    def prefill(self, question: str, chunks: Sequence[Chunk] | None = None, *, method: str | Method = "cacheclip",
                ratio: float | None = None, budget: Budget | None = None, passages: int = 8, reserve: int = 0
                ) -> Prefill:
        """Everything up to the first token's logits: score, load, assemble, recompute.

        `reserve` slots are kept free in the cache for tokens that will be decoded. See `stream` for the rest.
        """
        clock = Clock(self._pool)
        compiled = compiles.count()
        unused = [n for n, v in (("ratio", ratio), ("budget", budget))
                  if v is not None and isinstance(method, str) and not takes_budget(method)]
        method = self._method(method, ratio, budget)
        with clock("retrieve"):
            chosen = self._passages(question, chunks, passages)
        prompt = self.primary.prompt(chosen, question)
        _check_length(prompt, reserve, self.max_context, self.primary.model.name)
        slots = bucket(len(prompt.ids) + reserve + DECODE_STEPS, 256)
        fetched = Fetched(warnings=[f"{n} wasn't used: the method {method.name} recomputes a fixed share"
                                    for n in unused])
        primary = StoreSide(self.primary, chosen, prompt, slots, self._pool, clock, fetched, method.caches)
        sides = [primary]

        def aux() -> StoreSide:
            sides.append(self._aux_side(method.name, chosen, question, clock, fetched))
            return sides[-1]

        request = Request(primary, aux, self._pool)
        try:
            plan = method.plan(request)
            done = execute(request, plan, method.caches)
        finally:
            for side in sides:
                side.stop()
        clock.watch("recompute", done.logits, "select")
        return Prefill(prompt, tuple(chosen), method.name, plan, done.logits, done.cache, done.tail, fetched, clock,
                       compiled)

    def greedy(self, prefill: Prefill, max_new_tokens: int) -> tuple[int, ...]:
        """The most likely answer's token ids after a prefill; uses its cache up, so it works once."""
        if prefill.cache.k[0].is_deleted():
            raise BadInput("this prefill was decoded from already: prefill again")
        text = TextStream(self.primary.model.tokenizer.decode, ())
        stream = AnswerStream(self.primary.model, prefill, text, Sampling(), max_new_tokens)
        for _ in stream:
            pass
        return stream.result.token_ids

    def warmup(self, question: str, chunks: Sequence[Chunk] | None = None, **options: Any) -> tuple[str, ...]:
        """Compile what a request of this size needs (see `stream` for the options), so that the next one doesn't.

        Chunks that are missing or damaged are made now; the warnings about them are returned.
        """
        stream = self.stream(question, chunks, **options)
        stream.step()  # also where the first token ends the answer: another question's may not
        return stream.warnings

    def continuation(self, prefill: Prefill, ids: Sequence[int]) -> np.ndarray:
        """Logits [len(ids), V] after each of `ids`, fed as the answer so far; the prefill stays as it is."""
        start = int(prefill.tail.slot)
        if start + len(ids) > prefill.cache.slots:
            raise BadInput(f"{len(ids)} tokens don't fit the cache: prefill with reserve={len(ids)} or more")
        rows, positions = padded(ids, start + np.arange(len(ids)), bucket(len(ids), 16))
        model = self.primary.model
        return np.asarray(continuation_logits(model.params, model.config, rows, positions, prefill.cache,
                                              model.attention.name, prefill.decode_tail))[: len(ids)]

    def _method(self, method: str | Method, ratio: float | None, budget: Budget | None) -> Method:
        if ratio is not None and budget is not None:
            raise BadInput("give a ratio or a budget, not both")
        if ratio is not None:
            budget = Budget(ratio=ratio)
        if isinstance(method, str):
            return make(method, budget if takes_budget(method) else None,
                        **{"scoring": self.scoring} if method == "cacheclip" else {})
        if budget is not None:
            raise BadInput(f"the method {method.name} is configured already: set its budget there, not beside it")
        return method

    def _passages(self, question: str, chunks: Sequence[Chunk] | None, k: int) -> list[Passage]:
        if chunks is None:
            return self.retrieve(question, k)
        if isinstance(chunks, str) or not chunks:
            raise BadInput("chunks must be a non-empty list of chunk ids, passages or texts")
        return [c if isinstance(c, Passage) else self._passage(c) for c in chunks]

    def _passage(self, id_or_text: str) -> Passage:
        """The stored chunk, for what looks like an id or its beginning (4 to 16 hex digits); else the text itself."""
        if not is_chunk_id(id_or_text):
            return Passage.make(nfc(id_or_text))
        try:
            return self.store.passage(id_or_text)
        except BadInput as e:
            raise BadInput(f"{e} If {id_or_text!r} is a text, pass Passage.make({id_or_text!r}).") from None

    def _aux_side(self, method: str, passages: Sequence[Passage], question: str, clock: Clock, accounting: Fetched
                  ) -> StoreSide:
        if self.aux is None:
            raise BadInput(f"the method {method} needs an aux model: load one with aux=..., or choose another method")
        model, prompt = self.aux.model, self.aux.prompt(passages, question)
        _check_length(prompt, 0, model.config.max_positions, f"the aux model {model.name}")
        return StoreSide(self.aux, passages, prompt, bucket(len(prompt.ids), 256), self._pool, clock, accounting)

    @staticmethod
    def rows(model: Model, ids: np.ndarray, positions: np.ndarray, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Rows at sorted positions through a model, padded to their bucket; the last row's logits, the new cache."""
        padded_ids, padded_positions = padded(ids, positions, bucket(len(ids), 32))
        return recompute(model.params, model.config, padded_ids, padded_positions, np.int32(len(ids) - 1), cache,
                         model.attention.name)


def _check_length(prompt: Prompt, reserve: int, limit: int, who: str) -> None:
    total = len(prompt.ids) + reserve
    if total > limit:
        raise ContextTooLong(
            f"the prompt doesn't fit {who}: prefix {len(prompt.prefix)} + {len(prompt.chunks)} chunks "
            f"{prompt.context_tokens} + question {len(prompt.question)} + answer {reserve} = {total} tokens, "
            f"the limit is {limit}. Take fewer or shorter chunks, or a shorter answer.")


def compilation_cache() -> str:
    """Where compiled programs are kept: where JAX is configured to, else in the user's cache directory."""
    if (configured := jax.config.jax_compilation_cache_dir) is not None:
        return configured
    return str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cacheclip" / "xla")


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk between processes, unless JAX is configured already."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", compilation_cache())
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
