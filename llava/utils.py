"""Small helpers shared by the whole package."""

import os
import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any


class UserInputError(ValueError):
    """Something the user gave cannot be used.

    The message says what is wrong and what would put it right, so command-line programs may print
    it as it is, without a traceback.
    """


def describe_value(value: Any) -> str:
    """Say what was given instead of a tensor of the right kind: `int64 tensor [4]`, or a type."""
    import torch  # here, so that `llava --help` does not wait for it

    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    return type(value).__name__


def user_path(path: str | Path) -> Path:
    """Replace a `~` at the start of a path by the home folder.

    A shell does so only for words that begin with `~`: not in `--flag=~/x`, in a notebook or in a
    config file. A home folder that does not exist is left as it is written.
    """
    return Path(os.path.expanduser(path))


def once(function: Callable[[], None]) -> Callable[[], None]:
    """Run the decorated function at its first call and never again.

    Other threads that call it meanwhile wait until it is done; a call from inside itself returns
    at once. If it raises, the next call tries again.
    """
    lock = threading.RLock()
    called = False

    @wraps(function)
    def run() -> None:
        nonlocal called
        with lock:
            if called:
                return
            called = True
            try:
                function()
            except BaseException:
                called = False
                raise

    return run


def disable_torch_init() -> None:
    """Do nothing; kept because LLaVA scripts call it before loading a model.

    It used to skip the costly default initialisation of layers. Loading now builds the model
    without allocating weights at all, so there is nothing left to skip.
    """
