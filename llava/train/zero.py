"""What ZeRO-3 needs: weights are split among processes, and whole only where they are asked for."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled


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
    from deepspeed.zero import GatheredParameters

    split = [p for p in parameters if hasattr(p, "ds_id")]
    return GatheredParameters(split, modifier_rank=0 if write else None) if split else nullcontext()
