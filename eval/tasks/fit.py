"""The largest sample that fits: how much haystack a length holds."""

from __future__ import annotations

from collections.abc import Callable

from cacheclip_jax.errors import BadInput


def largest_fit[T](build: Callable[[int], T], tokens: Callable[[T], int], limit: int, low: int = 1,
                   high: int | None = None) -> T:
    """`build(n)` for an n in low..high with at most `limit` tokens, of which n+1 has more (or n is high).

    Tokens should grow with n; where they wobble, the result still fits. Unlike RULER, which searches once and takes
    steps of 25 or 500 back for later samples, this is exact for every sample. Raises BadInput when build(low) doesn't
    fit, with both numbers.
    """
    best = build(low)
    best_tokens = tokens(best)
    if best_tokens > limit:
        raise BadInput(f"the shortest sample has {best_tokens} tokens, answer included, and the limit is {limit}: "
                       "give a larger length or fewer facts")
    good, bad = low, None if high is None else high + 1
    slope, turn = float(max(best_tokens, 1)), 0
    while bad is None or bad - good > 1:
        turn += 1
        if bad is not None and turn % 2 == 0:
            n = (good + bad) // 2
        else:  # interpolation gets near in two or three steps, halving makes sure
            n = good + max(1, int((limit - best_tokens) / max(slope, 1e-3)))
            n = min(n, 2 * good + 64) if bad is None else min(n, bad - 1)
        made = build(n)
        size = tokens(made)
        if n > good and size > best_tokens:
            slope = (size - best_tokens) / (n - good)
        if size <= limit:
            good, best, best_tokens = n, made, size
        else:
            bad = n
    return best
