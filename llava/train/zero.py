"""Training with DeepSpeed: what must be set before it starts, and what ZeRO-3 needs.

Under ZeRO-3 weights are split among processes, and whole only where they are asked for.
"""

import json
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

from llava.train.launch import join_alone
from llava.utils import UserInputError
from llava.value_rules import one_line

_EXAMPLE = "scripts/zero2.json"
# The operation for shared memory, which a CPU would compile when a run starts.
_SHARED_MEMORY = "deepspeed_shm_comm"


def zero_stage() -> int:
    """Return the stage of ZeRO that this process trains with; 0 without DeepSpeed."""
    config = deepspeed_config()
    return 0 if config is None else int(config.get("zero_optimization", {}).get("stage", 0))


def gathered(
    parameters: Iterable[nn.Parameter], write: bool = False
) -> AbstractContextManager[object]:
    """Make parameters whole inside the block; nothing happens without ZeRO-3.

    All processes must enter it together.

    Args:
        parameters: of the model.
        write: they are changed inside, by all processes alike.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # `deepspeed.zero` is an attribute, not a module

    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(split, modifier_rank=0 if write else None)


def prepare_deepspeed(given: str | dict[str, Any], on_cpu: bool) -> None:
    """Check a config of DeepSpeed, and make this process ready to start DeepSpeed with it.

    Args:
        given: `--deepspeed`: a file, JSON, or what either holds.
        on_cpu: the run uses no GPU although there may be one.

    Raises:
        UserInputError: DeepSpeed is not installed; a config that cannot be read, or that DeepSpeed
            refuses.
    """
    if find_spec("deepspeed") is None:
        raise UserInputError(
            "--deepspeed needs the package deepspeed, which is not installed; run pip install "
            "deepspeed, or leave --deepspeed out"
        )
    config = read_deepspeed(given)
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    join_alone()
    _check_zero(config, given)
    if on_cpu or not torch.cuda.is_available():
        _leave_out_shared_memory()


def read_deepspeed(given: str | dict[str, Any]) -> dict[str, Any]:
    """Read a config of DeepSpeed.

    Raises:
        UserInputError: there is no such file, or it holds no JSON object with a stage of ZeRO.
    """
    where = f"--deepspeed {given}"
    config: Any = given
    if isinstance(given, str):
        try:
            is_text = given.lstrip().startswith("{")
            config = json.loads(given if is_text else Path(given).read_text("utf-8"))
        except OSError as error:
            raise UserInputError(
                f"cannot read {where} ({error.strerror}); give a file such as {_EXAMPLE}"
            ) from error
        except ValueError as error:
            raise UserInputError(
                f"{where} is not JSON ({one_line(error)}); correct it, or give {_EXAMPLE}"
            ) from error
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserInputError(
            f"{where} holds no settings of DeepSpeed: give a JSON object whose zero_optimization "
            f"has a stage from 0 to 3, such as {_EXAMPLE}"
        )
    return config


def join_deepspeed() -> None:
    """Tell DeepSpeed of the processes that torch has joined.

    ZeRO-3 asks for their number when a model is loaded, before DeepSpeed starts.
    """
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(verbose=False)


def check_agreement(training: Any) -> None:
    """Refuse a config of DeepSpeed that says something else than the arguments.

    Raises:
        UserInputError: names each value.
    """
    zero = getattr(training, "hf_deepspeed_config", None)
    if zero is None or not zero.mismatches:
        return
    differing = "; ".join(text.removeprefix("- ") for text in zero.mismatches)
    raise UserInputError(
        f"--deepspeed {training.deepspeed} and the arguments differ ({differing}); write 'auto' "
        "for these values there"
    )


def _check_zero(config: dict[str, Any], given: str | dict[str, Any]) -> None:
    """Refuse settings of ZeRO that DeepSpeed does not know, before a model is loaded."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**config.get("zero_optimization", {}))
    except ValueError as error:
        raise UserInputError(
            f"DeepSpeed refuses zero_optimization of --deepspeed {given}: {one_line(error)}"
        ) from error


def _leave_out_shared_memory() -> None:
    """Have processes on a CPU talk through gloo.

    Their operation for shared memory needs a compiler, and a process that is killed while it
    compiles leaves a lock for which all later ones wait.
    """
    import deepspeed

    # A name of DeepSpeed's own, without which nothing is compiled either.
    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict):
        table[_SHARED_MEMORY] = False
