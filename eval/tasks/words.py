"""Random keys and values for needles, and the word lists of the package `wonderwords`, which RULER draws from."""

from __future__ import annotations

import random
import uuid
from functools import cache
from typing import Literal

from cacheclip_jax.errors import BadInput

Kind = Literal["numbers", "words", "uuids"]


@cache
def word_list(*parts: str) -> tuple[str, ...]:
    """The distinct words of some parts of speech ("noun", "adjective", "verb"), sorted.

    Raises BadInput when `wonderwords` isn't installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise BadInput("RULER's words come from the package wonderwords: pip install 'cacheclip-jax[eval]'") from None
    return tuple(sorted({w for part in parts for w in RandomWord().filter(include_categories=[part])}))


def draw(rng: random.Random, kind: Kind, taken: set[str]) -> str:
    """A random number of 7 digits, an adjective-noun or a UUID4 that isn't in `taken`, which it joins."""
    while (value := _draw(rng, kind)) in taken:
        pass
    taken.add(value)
    return value


def _draw(rng: random.Random, kind: Kind) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    raise BadInput(f"{kind!r} is no kind of needle: choose numbers, words or uuids")
