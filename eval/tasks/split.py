"""What is tuned on and what is reported on, apart for good: a hash of each question, and ranges of seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

from cacheclip_jax.errors import BadInput
from eval.tasks.sample import Split, nfc

# Generated samples: every seed number belongs to one half. A seed of `make` owns SAMPLES_PER_SEED numbers.
SAMPLES_PER_SEED = 10_000
SEEDS = {"tune": range(0, 1_000_000), "report": range(1_000_000, 2_000_000)}


def half(question: str) -> Literal["tune", "report"]:
    """The half that a question belongs to, whatever file, order or version of this code it is found in.

    Case, white space and Unicode form don't count.
    """
    words = " ".join(nfc(question).casefold().split())
    return "tune" if _digest(f"half:{words}")[0] % 2 == 0 else "report"


def choose[T](items: Sequence[T], question: Callable[[T], str], split: Split, seed: int, count: int | None) -> list[T]:
    """`count` items of a half (None: all of them), in an order that `seed` fixes and the items' own order doesn't.

    Raises BadInput when the half holds fewer.
    """
    mine = [item for item in items if split == "all" or half(question(item)) == split]
    mine.sort(key=lambda item: (_digest(f"{seed}:{question(item)}"), repr(item)))  # one question may stand twice
    if count is not None and count > len(mine):
        raise BadInput(f"count={count} is too many: the data has {len(mine)} questions in split {split!r} "
                       f"of {len(items)} in all")
    return mine[:count]


def seed_numbers(split: Split, seed: int, count: int | None) -> range:
    """The seed numbers of `count` generated samples; two halves or two seeds never share one."""
    if split == "all":
        raise BadInput("split='all' isn't for generated tasks: choose tune or report")
    if count is None or count > SAMPLES_PER_SEED:
        raise BadInput(f"count={count}: a generated task needs a count of 1 to {SAMPLES_PER_SEED}")
    numbers = SEEDS[split]
    seeds = len(numbers) // SAMPLES_PER_SEED
    if not 0 <= seed < seeds:
        raise BadInput(f"seed={seed} is out of range: 0 to {seeds - 1}")
    first = numbers.start + seed * SAMPLES_PER_SEED
    return range(first, first + count)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
