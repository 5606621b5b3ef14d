"""Packed: a prompt as arrays of one size, so that all prompts of a length share a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Bool, Int

from cacheclip_jax.errors import ContextTooLong
from cacheclip_jax.groups import Groups
from cacheclip_jax.prompt import Prompt

GROUP = 8  # context tokens that are selected together: what methods do by default


@struct.dataclass
class Packed:
    """One prompt, or with a leading axis B several. S slots hold prefix and chunks one after another, T rows the
    question; what is left over is padding.

    ids, part: of each slot, its token and whose it is: 0 the prefix's, 1 and up a chunk's, -1 padding. local: the
    position at which the slot's token is encoded, behind the prefix. rows, positions: the question's tokens and their
    absolute positions, -1 padding. count: how many rows are real. context: which slots are the context's. starts,
    sizes: first slot and tokens of each group of context tokens, size 0 for padding.
    """

    ids: Int[Any, "*B S"]
    part: Int[Any, "*B S"]
    local: Int[Any, "*B S"]
    rows: Int[Any, "*B T"]
    positions: Int[Any, "*B T"]
    count: Int[Any, "*B"]
    context: Bool[Any, "*B S"]
    starts: Int[Any, "*B S"]
    sizes: Int[Any, "*B S"]


def pack(prompt: Prompt, slots: int, rows: int, answer: int = 0) -> Packed:
    """A prompt in `slots` slots and `rows` rows, of which `answer` stay free after the question.

    Raises ContextTooLong with the numbers where it doesn't fit.
    """
    P, Q, end = len(prompt.prefix), len(prompt.question), prompt.question_start
    if Q + answer > rows or len(prompt.ids) + answer > slots:
        raise ContextTooLong(f"a prompt of {len(prompt.ids)} tokens, {Q} of them the question's, and {answer} answer "
                             f"tokens don't fit {slots} slots and {rows} rows: give larger sizes")
    lengths = prompt.chunk_lengths
    ids, part, local = np.zeros(slots, np.int32), np.full(slots, -1, np.int32), np.zeros(slots, np.int32)
    ids[:end] = prompt.ids[:end]
    part[:end] = np.repeat(np.arange(1 + len(lengths)), (P, *lengths))
    local[:end] = np.concatenate([np.arange(P), *(P + np.arange(n) for n in lengths)])
    row_ids, positions = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    row_ids[:Q], positions[:Q] = prompt.question, end + np.arange(Q)
    groups = Groups(GROUP).sizes(lengths, prompt.chunks)
    starts, sizes = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    starts[: len(groups)], sizes[: len(groups)] = P + np.cumsum(groups) - groups, groups
    return Packed(ids, part, local, row_ids, positions, np.int32(Q), part > 0, starts, sizes)


def stack(items: Sequence[Packed]) -> Packed:
    """Several prompts of one size as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)
