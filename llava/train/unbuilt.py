"""Arguments of LLaVA's and transformers' trainers that are read but not built yet.

LLaVA's own scripts name many of them with the value that changes nothing; any other value is
refused rather than ignored.
"""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from llava.utils import UserInputError

_NOT_BUILT = "not built yet"
# Arguments of transformers' trainer that this one cannot honour, and what they ask for.
_OF_TRANSFORMERS = {
    "deepspeed": "DeepSpeed",
    "fsdp": "FSDP",
    "label_smoothing_factor": "label smoothing",
    "do_eval": "evaluation during training",
    "do_predict": "prediction",
    "eval_strategy": "evaluation during training",
    "load_best_model_at_end": "evaluation during training",
    "remove_unused_columns": "dropping columns of the data",
}


def _unbuilt(default: Any, what: str) -> Any:
    return field(default=default, metadata={"help": f"{_NOT_BUILT}: {what}"})


@dataclass
class UnbuiltArguments:
    """LLaVA's arguments for what this trainer lacks; only the defaults are accepted."""

    bits: int = _unbuilt(16, "training of 4-bit or 8-bit weights")
    double_quant: bool | None = _unbuilt(None, "training of 4-bit or 8-bit weights")
    quant_type: str | None = _unbuilt(None, "training of 4-bit or 8-bit weights")
    lora_enable: bool = _unbuilt(False, "LoRA")
    lora_r: int | None = _unbuilt(None, "LoRA")
    lora_alpha: int | None = _unbuilt(None, "LoRA")
    lora_dropout: float | None = _unbuilt(None, "LoRA")
    lora_weight_path: str | None = _unbuilt(None, "LoRA")
    lora_bias: str | None = _unbuilt(None, "LoRA")
    group_by_modality_length: bool = _unbuilt(False, "batches of one modality")
    mm_use_im_start_end: bool = _unbuilt(False, "marks around images")
    mm_use_im_patch_token: bool = _unbuilt(False, "a token for patches")
    mpt_attn_impl: str | None = _unbuilt(None, "MPT language models")
    cache_dir: str | None = _unbuilt(None, "another cache; set HF_HOME instead")
    lazy_preprocess: bool = _unbuilt(True, "samples prepared ahead")
    is_multimodal: bool = _unbuilt(True, "training without images")


def check_built(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse arguments that would be ignored, all of them in one line.

    Args:
        given: what the parser read of a command line.
        parser: knows the defaults.

    Raises:
        UserInputError: names each argument and what it asks for.
    """
    own = {f.name: f.metadata["help"].split(": ")[1] for f in fields(UnbuiltArguments)}
    found = [
        f"--{name} {getattr(given, name)} ({what})"
        for name, what in (own | _OF_TRANSFORMERS).items()
        if getattr(given, name) != parser.get_default(name)
    ]
    if found:
        raise UserInputError(f"{_NOT_BUILT}: {', '.join(found)}; leave out what is named here")
