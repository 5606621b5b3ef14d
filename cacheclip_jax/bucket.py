"""Bucket sizes: every shape that depends on a request is padded to one of few, so that compiled programs are reused."""


def bucket(n: int, minimum: int = 64, steps: int = 8) -> int:
    """The smallest bucket that holds n: multiples of `minimum`, then `steps` sizes per power of two.

    With 8 steps the padding is at most 1/8 of n; a size is a multiple of `minimum` throughout.
    """
    if n < 0:
        raise ValueError(f"a size can't be negative: {n}")
    step = minimum
    while step * 2 * steps <= n:
        step *= 2
    return max(minimum, -(-n // step) * step)
