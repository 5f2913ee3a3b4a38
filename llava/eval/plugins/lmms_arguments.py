"""Values of lmms-eval's `--model_args`, `--device` and `--batch_size`, checked before loading."""

from __future__ import annotations

import argparse
from typing import Any

from llava.command_line import device_name
from llava.utils import UserInputError

DTYPES = ("float16", "bfloat16", "float32")


def batch_size_of(value: Any) -> int:
    """A whole number of at least 1, perhaps written as text. Raises UserInputError otherwise."""
    try:
        size = int(value)
        right = size >= 1 and size == float(value)
    except (TypeError, ValueError, OverflowError):  # auto, None, inf
        right = False
    if not right:
        raise UserInputError(
            f"batch_size must be a whole number of at least 1, got {value!r}; llava_pruned does "
            "not choose one by itself"
        )
    return size


def dtype_of(value: Any) -> str | None:
    """The name of a precision; None, and also for `auto`, leaves it to the loader.

    Raises UserInputError for another value.
    """
    if value is None or value == "auto":
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UserInputError(f"unknown dtype {value!r}; use auto, {', '.join(DTYPES)}")
    return name


def device_of(value: Any) -> str:
    """A device that torch can use here; None is `auto`. Raises UserInputError otherwise."""
    try:
        return device_name("auto" if value is None else str(value))
    except argparse.ArgumentTypeError as error:
        raise UserInputError(str(error)) from error
