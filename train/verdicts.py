"""The teacher's verdicts on disk: computed once for each prompt, kept in shards of half-precision scores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh
from jaxtyping import Float
from rich.progress import Progress
from safetensors.numpy import save_file

from cacheclip_jax.decode import padded_stop_ids
from cacheclip_jax.errors import BadInput
from cacheclip_jax.model.load import Model
from cacheclip_jax.prompt import Prompt
from train.devices import check_divides, replicate, spread
from train.forward import kernel, stack_layers
from train.packed import pack, stack
from train.teach import TARGETS, Target, Teaching, teach

SHARD = 64  # prompts in a file: what an interruption loses at most


@dataclass(frozen=True)
class Kept:
    """A verdict as it is kept: scores of the context's tokens for each target, their largest 1; D(stale) in nats; the
    answer's ids."""

    scores: Float[np.ndarray, "3 C"]
    kl: float
    answer: tuple[int, ...]

    def of(self, target: Target) -> Float[np.ndarray, "C"]:
        """The scores of one target, float32."""
        return self.scores[TARGETS.index(target)].astype(np.float32)


def key_of(prompt: Prompt) -> str:
    """What a prompt's verdict is called: a hash of its ids and where they are cut."""
    cut = json.dumps([len(prompt.prefix), prompt.chunk_lengths])
    return hashlib.sha256(prompt.ids.tobytes() + cut.encode()).hexdigest()[:20]


def judge(prompts: Sequence[tuple[Prompt, int]], load: Callable[[], Model], teaching: Teaching, folder: Path,
          mesh: Mesh, *, rows: int, batch: int) -> int:
    """Compute and keep the verdicts that are missing; returns how many those were. Interrupted, it goes on from the
    last whole shard.

    prompts: each with the slots that it is packed in. load: gives the primary, where it is needed at all. rows: of
    question and answer. batch: prompts computed at once.
    Raises BadInput where the folder holds the verdicts of another teacher.
    """
    check_divides(batch, mesh)
    folder.mkdir(parents=True, exist_ok=True)
    known = set(read_verdicts(folder))
    missing = list({key_of(p): (p, slots) for p, slots in prompts if key_of(p) not in known}.values())
    if not missing:
        return 0
    primary = load()
    _claim(folder / "teacher.json", primary, teaching)
    missing.sort(key=lambda item: item[1])
    weights, number = replicate(stack_layers(primary.params), mesh), len(list(folder.glob("*.safetensors")))
    with Progress() as progress:
        bar = progress.add_task("teacher's verdicts", total=len(missing))
        for shard in batched(missing, SHARD):
            done = {}
            for prompt, kept in _verdicts(shard, weights, primary, teaching, mesh, rows, batch):
                done[key_of(prompt)] = kept
                progress.advance(bar)
            _write(folder / f"{number:05}.safetensors", done)
            number += 1
    return len(missing)


def _verdicts(shard, weights, primary: Model, teaching: Teaching, mesh: Mesh, rows: int, batch: int
              ) -> Iterator[tuple[Prompt, Kept]]:
    eos = replicate(jnp.array(padded_stop_ids(primary)), mesh)
    by_size: dict[int, list[Prompt]] = {}
    for prompt, slots in shard:
        by_size.setdefault(slots, []).append(prompt)
    running: list[tuple] = []
    for slots, prompts in by_size.items():
        for group in batched(prompts, batch):
            whole = [*group, *(group[-1] for _ in range(batch - len(group)))]  # one size, one program
            packed = spread(stack([pack(p, slots, rows, teaching.answer_tokens) for p in whole]), mesh)
            running.append((group, teach(weights, primary.config, packed, eos, teaching, kernel(primary))))
            if len(running) > 1:  # the device computes the next batch while this one is fetched
                yield from _fetched(*running.pop(0))
    for group, verdict in running:
        yield from _fetched(group, verdict)


def _fetched(group: tuple[Prompt, ...], verdict) -> Iterator[tuple[Prompt, Kept]]:
    scores = np.stack([np.asarray(verdict.scores[target]) for target in TARGETS], axis=1)
    rest = np.asarray(verdict.kl), np.asarray(verdict.answer)
    for prompt, each, kl, answer in zip(group, scores, *rest, strict=False):  # what filled the batch up is dropped
        each = each[:, len(prompt.prefix) : prompt.question_start]
        top = each.max(axis=1, keepdims=True)
        yield prompt, Kept((each / np.where(top > 0, top, 1)).astype(np.float16), float(kl),
                           tuple(int(i) for i in answer if i >= 0))


def read_verdicts(folder: Path) -> dict[str, Kept]:
    """All verdicts of a folder by key. Raises BadInput for a damaged shard."""
    out: dict[str, Kept] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(file, framework="np") as shard:
                index = json.loads(shard.metadata()["index"])
                out |= {key: Kept(shard.get_tensor(key), row["kl"], tuple(row["answer"])) for key, row in index.items()}
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
            raise BadInput(f"{file} is damaged ({e}): delete it, and its verdicts are computed again") from None
    return out


def _write(file: Path, done: dict[str, Kept]) -> None:
    index = {key: {"kl": kept.kl, "answer": kept.answer} for key, kept in done.items()}
    partial = file.with_suffix(".part")
    save_file({key: kept.scores for key, kept in done.items()}, partial, metadata={"index": json.dumps(index)})
    partial.replace(file)


def _claim(file: Path, primary: Model, teaching: Teaching) -> None:
    mine = json.loads(json.dumps({"primary": primary.fingerprint, "name": primary.name,
                                  "dtype": str(primary.params.embed.dtype), **dataclasses.asdict(teaching)}))
    if not file.exists():
        file.write_text(json.dumps(mine), encoding="utf-8")
    elif (theirs := json.loads(file.read_text(encoding="utf-8"))) != mine:
        differs = [f"{n} {theirs.get(n)!r} instead of {mine[n]!r}" for n in mine if theirs.get(n) != mine[n]]
        raise BadInput(f"{file.parent} holds the verdicts of another teacher ({', '.join(differs)}): use another "
                       "--config.out, or delete that folder")
