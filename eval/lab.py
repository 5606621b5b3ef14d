"""The laboratory: one sample's chunk caches, made and kept on the device, offered to methods as the engine offers them.

Nothing is stored and nothing travels, so what a method costs here is its computation. Shapes take few values for all
samples of a length, since a program takes longer to compile than a thousand answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int

from cacheclip_jax.assemble import Placement
from cacheclip_jax.bucket import bucket
from cacheclip_jax.caches import replicated
from cacheclip_jax.encode import BATCH_TOKENS, BATCH_TOKENS_ACCELERATOR, encode, no_prefix
from cacheclip_jax.errors import BadInput, ContextTooLong
from cacheclip_jax.model.adapter import Adapter, load_adapter
from cacheclip_jax.model.load import Model, load_model
from cacheclip_jax.model.pull import MODELS, pull
from cacheclip_jax.model.tokenizer import Tokenizer, nfc
from cacheclip_jax.plan import Behind
from cacheclip_jax.prompt import Prompt, PromptFormat
from cacheclip_jax.recompute import SPAN
from cacheclip_jax.request import Request
from cacheclip_jax.side import Stage
from eval.tasks import Sample

FRAME_SLACK = 4  # tokens by which a template's and a text's may differ where they meet
# Smallest number of rows, and sizes per doubling. Few: compiling for another size takes as long as hundreds of answers.
Sizes = Mapping[Stage, tuple[int, int]]
FEW_SIZES: Sizes = {"question": (128, 2), "repair": (256, 2), "prefill": (512, 8)}
MANY_SIZES: Sizes = {"question": (32, 4), "repair": (32, 4), "prefill": (512, 8)}  # for hundreds of repairs


def located(model: str) -> str:
    """A model's directory or file; those that `cacheclip pull` knows are fetched."""
    return str(pull(model).path) if model in MODELS else model


def format_of(sample: Sample) -> PromptFormat:
    """How a sample's parts become a prompt: as they are, in the chat template unless its benchmark leaves that out."""
    return PromptFormat(instructions=sample.instructions, chunk="{text}", question="{question}",
                        answer=sample.answer_prefix, chat=sample.meta.get("chat", True), strip=False)


def prompt_of(sample: Sample, tokenizer: Tokenizer) -> Prompt:
    """A sample's prompt in a model's tokens."""
    words = format_of(sample)
    return Prompt(prefix=words.prefix_ids(tokenizer), chunks=tuple(tokenizer.encode(nfc(c)) for c in sample.context),
                  question=words.question_ids(tokenizer, sample.question))


def frame_tokens(tokenizer: Tokenizer) -> int:
    """Tokens to keep free for a chat template when samples are made to a length."""
    words = PromptFormat(instructions="", chunk="{text}", question="{question}")
    return len(words.prefix_ids(tokenizer)) + len(words.question_ids(tokenizer, "?")) + FRAME_SLACK


@dataclass(frozen=True)
class Lab:
    """A primary and, for methods that need one, an aux model, beside it perhaps as finetuning changed it; all on the
    device. Programs are compiled for numbers of rows of these `sizes`."""

    primary: Model
    aux: Model | None
    adapted: Model | None = None
    sizes: Sizes = field(default_factory=lambda: FEW_SIZES)

    def sides(self, sample: Sample, slots: int, room: int) -> Sides:
        """What the models bring to requests about a sample. Caches of the primary have `slots`, at least `room` of
        them for the answer.

        Raises ContextTooLong when the prompt and that room don't fit.
        """
        primary = ResidentSide(self.primary, prompt_of(sample, self.primary.tokenizer), slots, self.sizes)
        _check(primary, sample, room)
        if self.aux is None:
            return Sides(primary)
        prompt = prompt_of(sample, self.aux.tokenizer)
        slots = slots if len(prompt.ids) <= slots else bucket(len(prompt.ids), 1024)
        aux = ResidentSide(self.aux, prompt, slots, self.sizes)
        _check(aux, sample, 0)
        adapted = None if self.adapted is None else ResidentSide(self.adapted, prompt, slots, self.sizes)
        return Sides(primary, aux, adapted)


@dataclass(frozen=True)
class Sides:
    """The models' parts in a sample, as far as there are such models."""

    primary: ResidentSide
    aux: ResidentSide | None = None
    adapted: ResidentSide | None = None

    def behind(self, lead_in: str) -> Sides:
        """The same with chunks encoded behind a lead-in, "" for none."""
        if not lead_in:
            return self
        return Sides(self.primary.behind(lead_in), self.aux and self.aux.behind(lead_in),
                     self.adapted and self.adapted.behind(lead_in))


def request(sides: Sides, adapted: bool = False) -> Request:
    """A request over a sample's caches, with the aux model or with the `adapted` one; its signals are computed once,
    for all methods that are given it."""
    aux = sides.adapted if adapted else sides.aux

    def existing() -> ResidentSide:
        if aux is None:
            raise BadInput("a method here needs an aux model: name one with --config.aux, or leave the method out")
        return aux

    return Request(sides.primary, existing)


def _check(side: ResidentSide, sample: Sample, room: int) -> None:
    limit, total = min(side.slots, side.model.config.max_positions), len(side.prompt.ids) + room
    if total > limit:
        raise ContextTooLong(f"{sample.id}: prompt and answer take {total} tokens of {side.model.name}, the limit is "
                             f"{limit} (slots {side.slots}, positions {side.model.config.max_positions}): make shorter "
                             "samples")


def load_lab(primary: str, aux: str, dtype: str, adapter: Adapter | None) -> Lab:
    """The models by name or path ("": no aux model), and the one that an adapter makes of the aux model."""
    big = load_model(located(primary), dtype=dtype)
    if not aux:
        return Lab(big, None)
    small = big if aux == primary else load_model(located(aux), dtype=dtype)
    return Lab(big, small, None if adapter is None else adapter.adapted(small))


def adapter_of(directory: str, aux: str) -> Adapter | None:
    """What finetuning wrote to a directory ("": nothing). Raises BadInput where there is no aux model to change."""
    if not directory:
        return None
    adapter = load_adapter(directory)
    if not aux:
        raise BadInput(f"aux_adapter={directory} belongs to {adapter.base_name}: name that as the aux model")
    return adapter


class ResidentSide:
    """A `Side` whose chunk caches are encoded when first asked for and stay on the device."""

    def __init__(self, model: Model, prompt: Prompt, slots: int, sizes: Sizes):
        self.model, self.prompt, self.slots, self._sizes = model, prompt, slots, sizes
        self._feeds: dict[Behind, ResidentFeed] = {}

    def behind(self, lead_in: str) -> ResidentSide:
        """The same with chunks encoded behind a lead-in."""
        ids = _lead_in_ids(self.model.tokenizer, lead_in)
        return ResidentSide(self.model, replace(self.prompt, lead_in=ids), self.slots, self._sizes)

    @property
    def sharding(self) -> Sharding:
        """Whole on every device of the model."""
        return replicated(self.model.params.embed.sharding)

    def feed(self, behind: Behind, depth: int, wanted: Sequence[bool] | None = None) -> ResidentFeed:
        """The caches of all layers and chunks, whatever is wanted."""
        del depth, wanted
        if behind not in self._feeds:
            where = _placement(self.prompt.question_start, self.slots)
            self._feeds[behind] = ResidentFeed(_encoded(self.model, self.prompt, behind, self.slots),
                                               jax.device_put(where, self.sharding))
        return self._feeds[behind]

    def begin(self) -> None:
        """Nothing is loaded here."""

    def release(self) -> None:
        """Nothing is held back here."""

    def rows(self, count: int, stage: Stage) -> int:
        """The size that holds `count` rows."""
        return bucket(count, *self._sizes[stage])

    def watch(self, stage: str, array: jax.Array, since: float | str | None = None) -> None:
        """No stages are timed here."""


@lru_cache(maxsize=8)
def _lead_in_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return PromptFormat(lead_in=text).lead_in_ids(tokenizer)


class ResidentFeed:
    """A `LayerFeed` of caches that are there."""

    def __init__(self, rows: Sequence[Float[Array, "B R H"]], where: Placement):
        self._rows, self.where = rows, where
        ends = np.cumsum([len(r) for r in rows])
        self.blocks = [range(int(end) - len(r), int(end)) for end, r in zip(ends, rows, strict=True)]

    def take(self, number: int) -> jax.Array:
        """The rows of a block of layers."""
        return self._rows[number]

    def computed(self, mark: jax.Array) -> None:
        """Nothing waits for it here."""

    def then(self, do: Callable[[], None]) -> None:
        """At once."""
        do()

    def stop(self) -> None:
        """Nothing runs here."""


def _placement(tokens: int, slots: int) -> Placement:
    """Rows in the order of the slots: [2, K, slots, H] a layer."""
    slot = np.arange(slots, dtype=np.int32)
    return Placement(np.stack([np.where(slot < tokens, slot, -1), np.full(slots, slots, np.int32)]))


def _encoded(model: Model, prompt: Prompt, behind: Behind, slots: int) -> list[Float[Array, "l R H"]]:
    """The caches of prefix and chunks in the order of their slots, for each span of layers.

    A chunk behind the prefix is encoded as prefix, lead-in and chunk in one sequence, so that no program depends on the
    prefix's length; the prefix's own rows come from the first of them where there is no lead-in.
    """
    head = (*prompt.prefix, *prompt.lead_in) if behind == "shared" else ()
    sequences = [(*head, *c.ids) for c in prompt.chunks]
    starts = np.cumsum([len(prompt.prefix), *prompt.chunk_lengths])
    # (sequence, its first kept token, its first slot): what goes where.
    pieces = [(i, len(head), start) for i, start in enumerate(starts[:-1])]
    if head and not prompt.lead_in:
        pieces[0] = (0, 0, 0)
    elif prompt.prefix:
        pieces.append((len(sequences), 0, 0))
        sequences.append(prompt.prefix)
    cfg, how = model.config, model.attention.name
    limit = BATCH_TOKENS if how == "blocked" else BATCH_TOKENS_ACCELERATOR
    packed: list[jax.Array] | None = None
    for ids, source in _batches(sequences, pieces, limit, slots):
        spans = encode(model.params, cfg, ids, no_prefix(model.params, cfg), how)
        packed = _zeros(spans, slots) if packed is None else packed
        packed = [_pack(rows, kv, source) for rows, kv in zip(packed, spans, strict=True)]
    assert packed is not None and len(packed) == -(-cfg.num_layers // SPAN)
    return [rows.reshape(len(rows), -1, cfg.head_dim) for rows in packed]


def _batches(sequences: Sequence[Sequence[int]], pieces: Sequence[tuple[int, int, int]], limit: int, slots: int
             ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sequences in batches [B, W] of about `limit` tokens, of few shapes: and for each slot the place in the flattened
    batch that its token has, or -1."""
    remaining = sorted(pieces, key=lambda piece: -len(sequences[piece[0]]))
    while remaining:
        width = bucket(len(sequences[remaining[0][0]]), 128)
        most = 1 << max(limit // width, 1).bit_length() - 1
        rows = most if len(remaining) > most // 4 else max(most // 4, 1)
        ids, source = np.zeros((rows, width), np.int32), np.full(slots, -1, np.int32)
        for row, (index, kept, slot) in enumerate(remaining[:rows]):
            tokens = sequences[index]
            ids[row, : len(tokens)] = tokens
            source[slot : slot + len(tokens) - kept] = row * width + np.arange(kept, len(tokens))
        yield ids, source
        remaining = remaining[rows:]


def _zeros(spans: Sequence[jax.Array], slots: int) -> list[jax.Array]:
    return [jnp.zeros((kv.shape[1], 2, kv.shape[3], slots, kv.shape[5]), kv.dtype, device=kv.sharding) for kv in spans]


@partial(jax.jit, donate_argnames="rows")
def _pack(rows: Float[Array, "l 2 K S H"], kv: Float[Array, "B l 2 K C H"], source: Int[Array, "S"]
          ) -> Float[Array, "l 2 K S H"]:
    """Put a batch's tokens into their slots."""
    flat = kv.transpose(1, 2, 3, 0, 4, 5).reshape(*rows.shape[:3], -1, rows.shape[-1])
    taken = flat[:, :, :, jnp.maximum(source, 0)]
    return jnp.where((source >= 0)[:, None], taken, rows)
