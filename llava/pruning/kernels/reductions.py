"""What the kernels of selections share."""

import triton
import triton.language as tl


def warps(block: int) -> int:
    """Return the warps of a program over `block` tokens: 8 numbers a thread, at most 1024 threads.

    Fewer would read a row in more turns, more would wait for each other longer in every reduction.
    """
    return min(max(block // 256, 1), 32)


@triton.jit
def _better(best, index, second, other_best, other_index, other_second):
    """Join two (highest, its index, second highest): of equal ones the lowest index is first."""
    first = (best > other_best) | ((best == other_best) & (index < other_index))
    loser = tl.where(first, other_best, best)
    runner_up = tl.where(second > other_second, second, other_second)
    return (
        tl.where(first, best, other_best),
        tl.where(first, index, other_index),
        tl.where(loser > runner_up, loser, runner_up),
    )


@triton.jit
def top_two(values, tokens):
    """Return the highest of `values` [BLOCK], its index, the lowest of several, and the next value.

    All in one reduction. `values` must not be NaN.
    """
    nothing = tl.full(values.shape, float("-inf"), tl.float32)
    return tl.reduce((values, tokens, nothing), 0, _better)
