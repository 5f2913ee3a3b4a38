"""Share a number of tokens out in proportion to sizes, in whole numbers."""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction


def share_in_proportion(total: int, sizes: Sequence[int], most: Sequence[int]) -> list[int]:
    """Share `total` in proportion to `sizes`, at least 1 and at most `most[i]` each.

    All parts that are neither held up nor held down are the same multiple of their sizes. What
    rounding down leaves goes to the largest remainders, to the first of equal ones.

    Args:
        total: at least the number of parts; what is above the sum of `most` is left over.
        sizes: of every part, at least 1.
        most: the limit of every part; below 1 it also takes the place of the least.

    Returns:
        Whole numbers that sum to min(total, sum(most)).
    """

    def parts(level: Fraction) -> list[Fraction]:
        bounds = zip(sizes, most, strict=True)
        return [min(max(level * size, Fraction(1)), Fraction(limit)) for size, limit in bounds]

    def spent(level: Fraction) -> Fraction:
        return sum(parts(level), Fraction())

    total = min(total, sum(most))
    # Between neighbouring bends, where a part meets a bound, what is spent grows linearly.
    ends = zip(sizes, most, strict=True)
    bends = sorted({Fraction(end, size) for size, limit in ends for end in (1, max(limit, 0))})
    above = bisect_left(bends, Fraction(total), key=spent)
    level = bends[above]
    if above > 0 and spent(level) > total:
        low = bends[above - 1]
        level = low + (total - spent(low)) * (level - low) / (spent(level) - spent(low))
    exact = parts(level)
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    return shares
