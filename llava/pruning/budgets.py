"""Budgets as users write them, checked."""

import math
import operator
from typing import Any

from llava.pruning.errors import PruningError

BUDGETS = ("keep_tokens", "keep_ratio")


def check_count(value: Any, name: str = "keep_tokens") -> int:
    """Return a number of tokens.

    Raises:
        PruningError: it is not a whole number of at least 1.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise PruningError(f"{name} must be a whole number of at least 1, got {value!r}")
    return count


def check_share(name: str, value: Any, removed: bool = False) -> float:
    """Return a share of tokens.

    Args:
        name: what it is called.
        value: the share.
        removed: whether it says what goes, so that it may be 0 and not 1.

    Raises:
        PruningError: it is outside its interval.
    """
    try:
        share = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        share = math.nan
    inside = 0.0 <= share < 1.0 if removed else 0.0 < share <= 1.0
    if not inside:
        interval = "[0, 1)" if removed else "(0, 1]"
        raise PruningError(f"{name} must be a share in {interval}, got {value!r}")
    return share
