"""Small helpers shared by the whole package."""

from typing import Any

import torch


class UserInputError(ValueError):
    """Something the user gave cannot be used.

    The message says what is wrong and what would put it right, so command-line programs may print
    it as it is, without a traceback.
    """


def describe_value(value: Any) -> str:
    """What was given instead of a tensor of the right kind: `int64 tensor [4]`, or a type."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    return type(value).__name__


def disable_torch_init() -> None:
    """Do nothing; kept because LLaVA scripts call it before loading a model.

    It used to skip the costly default initialisation of layers. Loading now builds the model
    without allocating weights at all, so there is nothing left to skip.
    """
