"""8-bit and 4-bit weights of the language model, through bitsandbytes."""

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from llava.utils import UserInputError

# Full names of what stays as it is. Names are matched from their start (or as a suffix), so that
# "mm_projector" alone would miss "model.mm_projector.0". Pruning also needs the projector in full.
KEPT_MODULES = ("model.mm_projector", "model.vision_tower", "lm_head")


def quantization_config(
    load_8bit: bool, load_4bit: bool, device: str = "cuda"
) -> BitsAndBytesConfig | None:
    """What ``from_pretrained`` needs to quantize as LLaVA does; None if nothing was asked for.

    4-bit is NF4 with double quantization that computes in float16. Only linear layers of the
    language model are quantized; projector, vision tower and output layer keep their precision.

    Raises:
        UserInputError: both were asked for, or bitsandbytes or CUDA is missing.
    """
    if not (load_8bit or load_4bit):
        return None
    if load_8bit and load_4bit:
        raise UserInputError("load_8bit and load_4bit exclude each other; choose one of them")
    if find_spec("bitsandbytes") is None:
        raise UserInputError(
            "8-bit and 4-bit loading need bitsandbytes, which is not installed; run "
            "pip install bitsandbytes, or load without load_8bit and load_4bit"
        )
    on_cuda = device == "auto" or torch.device(device).type == "cuda"
    if not (on_cuda and torch.cuda.is_available()):
        raise UserInputError(
            "8-bit and 4-bit loading need a CUDA device; use one, or load without load_8bit and "
            "load_4bit"
        )
    return bits_and_bytes(4 if load_4bit else 8)


def bits_and_bytes(bits: int) -> BitsAndBytesConfig:
    """The settings for 4 or 8 bits, whether or not this machine can use them."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT_MODULES))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list(KEPT_MODULES),
    )
