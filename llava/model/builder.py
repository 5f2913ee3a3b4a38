"""Load a LLaVA model the way LLaVA users do."""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
)
from llava.model.adapters import PartialCheckpoint, read_partial
from llava.model.checkpoint import local_checkpoint, read_config, read_json_object
from llava.model.checks import check_config, check_weights
from llava.model.hugging_face import native_form
from llava.model.language_model.llava_causal_lm import LlavaCausalLM, describes, native_config
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.tokenizer import LlamaTokenizer
from llava.pruning.config import PruningConfig
from llava.utils import UserInputError
from llava.value_rules import library_errors

logger = logging.getLogger(__name__)

# A LLaVA on another language model is one entry here.
MODEL_CLASSES: tuple[type[LlavaCausalLM], ...] = (LlavaLlamaForCausalLM, LlavaMistralForCausalLM)
# What LLaVA reports when the config does not say; released checkpoints rely on it.
DEFAULT_CONTEXT_LENGTH = 2048
# Full names of what stays as it is. Names are matched from their start (or as a suffix), so that
# "mm_projector" alone would miss "model.mm_projector.0". Pruning also needs the projector in full.
KEPT_MODULES = ("model.mm_projector", "model.vision_tower", "lm_head")
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
_TOKENIZER_SETTINGS = "tokenizer_config.json"


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    *,
    pruning: PruningConfig | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, LlavaCausalLM, Any, int]:
    """Load a LLaVA: a whole checkpoint, or a LoRA or projector-only folder over a base model.

    What a folder holds is read from its files, never guessed from its name: LLaVA's own format,
    Hugging Face's (`llava-hf/...`, turned into LLaVA's), an adapter (merged), a projector.

    Args:
        model_path: checkpoint folder or hub name.
        model_base: folder or hub name of the model that a LoRA or projector-only folder belongs
            to: a LLaVA, or the plain language model. Its tokenizer is used.
        model_name: accepted for LLaVA's signature.
        load_8bit: quantize the language model to 8 bits; needs bitsandbytes and CUDA.
        load_4bit: the same with 4 bits (NF4).
        device_map: as in transformers; used while `device` is CUDA.
        device: `"cuda"`, `"cpu"`, `"mps"`, ... or `"auto"`. Without CUDA, `"cuda"` and
            `"auto"` mean the CPU.
        use_flash_attn: use flash attention 2 in the language model.
        pruning: settings that override those saved in the checkpoint; None keeps the saved ones.
        **kwargs: for `from_pretrained`, such as `attn_implementation`; `dtype`, one of
            torch's or its name, is float16, on the CPU float32, by default, and "auto" is the
            checkpoint's own. Keys of the config override it, such as `mm_next_protocol`.

    Returns:
        (tokenizer, model, image_processor, context_len). The tokenizer is None if the folder
        has no tokenizer file; the image processor is None for a model without a vision tower.

    Raises:
        UserInputError: names what is wrong and what to do.
    """
    folder = local_checkpoint(model_path, kwargs.get("revision"))
    part = read_partial(folder, model_base)
    base = folder if part is None else local_checkpoint(str(model_base))
    # lmms-eval passes this to every loader.
    kwargs.pop("multimodal", None)
    place, dtype = placement(device, device_map)
    torch_dtype = kwargs.pop("torch_dtype", None)  # its older name
    kwargs["dtype"] = kwargs.pop("dtype", None) or torch_dtype or dtype
    if use_flash_attn:
        kwargs["attn_implementation"] = "flash_attention_2"
    check_attention(kwargs.get("attn_implementation"))
    quantization = quantization_config(load_8bit, load_4bit, device)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    model = _load_model(folder, base, part, device_map=place, **kwargs)
    if pruning is not None:
        model.pruning = PruningConfig.read(pruning)
    check_config(model)

    tokenizer = load_tokenizer(base)
    if tokenizer is None and part is not None:
        tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        attach_tokenizer(model, tokenizer)
    tower = model.get_vision_tower()
    image_processor = None if tower is None else tower.image_processor
    context_len = getattr(model.config, "max_sequence_length", DEFAULT_CONTEXT_LENGTH)
    return tokenizer, model, image_processor, context_len


def model_class(config: Mapping[str, Any]) -> type[LlavaCausalLM]:
    """Return the class that a config.json in LLaVA's form asks for.

    A config that describes none of `MODEL_CLASSES` goes to the Llama, which says what is wrong.
    """
    return next((cls for cls in MODEL_CLASSES if describes(config, cls)), LlavaLlamaForCausalLM)


def _load_model(
    folder: Path, base: Path, part: PartialCheckpoint | None, **kwargs: Any
) -> LlavaCausalLM:
    """Load the model to its device, its tower, and what `part` adds to `base`."""
    raw = native_form(read_config(folder), str(folder))
    if "mm_vision_tower" not in raw and raw.get("model_type") in ("llama", "mistral"):
        raise UserInputError(
            f"{str(folder)!r} is a plain language model without a vision tower; "
            "give a LLaVA checkpoint"
        )
    quantized = kwargs.get("quantization_config") is not None
    if quantized and part is not None and part.factors:
        raise UserInputError(
            "an adapter cannot be merged into 8-bit or 4-bit weights; load it without "
            "load_8bit and load_4bit, save the merged model, and load that quantized"
        )
    cls = model_class(raw)
    if part is None:
        model = cls.from_pretrained(base, **kwargs)
    else:
        native_config(base, cls)  # refuses a base of another kind
        config, kwargs = native_config(folder, cls, **kwargs)
        model = cls.from_pretrained(base, config=config, supplied=set(part.weights), **kwargs)
    tower = model.get_vision_tower()
    if tower is not None:
        tower.load_model(device_map={"": model.device}, dtype=model.dtype)
    if part is not None:
        part.apply(model)
    _check_projector(model, base if part is None else folder)
    return model


def _check_projector(model: LlavaCausalLM, folder: Path) -> None:
    """Refuse NaN and inf in what was trained first, and is small enough to look at.

    A tower with such weights is found by the first image.
    """
    small = {
        name: value
        for name, value in model.get_model().named_parameters()
        if name.startswith(("mm_projector.", "image_newline"))
    }
    check_weights(small, repr(str(folder)))


def quantization_config(
    load_8bit: bool,
    load_4bit: bool,
    device: str = "cuda",
    kept: Sequence[str] = KEPT_MODULES,
) -> BitsAndBytesConfig | None:
    """Return what `from_pretrained` needs to quantize as LLaVA does; None if nothing was asked for.

    4-bit is NF4 with double quantization that computes in float16. Only linear layers of the
    language model are quantized; projector, vision tower and output layer keep their precision.

    Args:
        load_8bit, load_4bit, device: as in `load_pretrained_model`.
        kept: full names of the modules that keep their precision.

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
    return bits_and_bytes(4 if load_4bit else 8, kept)


def bits_and_bytes(bits: int, kept: Sequence[str] = KEPT_MODULES) -> BitsAndBytesConfig:
    """Return the settings for 4 or 8 bits, whether or not this machine can use them."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(kept))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=list(kept),
    )


def check_attention(implementation: str | None) -> None:
    """Refuse attention that does not exist here.

    Raises:
        UserInputError: an unknown name, or a package that is missing.
    """
    if implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserInputError(
            "flash attention 2 needs CUDA and the package flash-attn; install it, or use "
            "attn_implementation='sdpa', the default"
        )
    known = ("eager", "sdpa", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    # A slash names a kernel on the hub.
    if implementation is not None and implementation not in known and "/" not in implementation:
        raise UserInputError(
            f"unknown attn_implementation {implementation!r}; use 'sdpa', 'eager' or "
            "'flash_attention_2'"
        )


def placement(device: str, device_map: Any) -> tuple[Any, torch.dtype]:
    """Return device map and default dtype for a requested device.

    Raises:
        UserInputError: no name of a device, or one that is not here.
    """
    if device in ("auto", "cuda") and not torch.cuda.is_available():
        if device == "cuda":
            logger.warning("CUDA is not available; the model is loaded on the CPU in float32")
        return {"": "cpu"}, torch.float32
    if device in ("auto", "cuda"):
        return device_map, torch.float16
    return {"": device}, torch.float32 if _device_type(device) == "cpu" else torch.float16


def _device_type(device: str) -> str:
    """Return `cpu`, `cuda`, ... of a device that this machine has.

    Raises:
        UserInputError: no name of a device, or one that is not here.
    """
    try:
        named = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserInputError(
            f"unknown device {device!r}; use 'auto', 'cuda', 'cuda:1', 'cpu' or 'mps'"
        ) from error
    absent = f"device {device!r} was asked for, but"
    if named.type == "cuda":
        # Asked without touching the device: that would take memory on it.
        if not torch.cuda.is_available():
            raise UserInputError(f"{absent} CUDA is not available here; use 'auto' or 'cpu'")
        if (named.index or 0) >= torch.cuda.device_count():
            raise UserInputError(
                f"{absent} the number of CUDA devices is {torch.cuda.device_count()}; use 'cuda'"
            )
        return named.type
    try:
        torch.empty(0, device=named)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserInputError(
            f"{absent} this machine or this build of torch does not have it; use 'auto' or 'cpu'"
        ) from error
    return named.type


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a checkpoint folder; None if the folder has no tokenizer file.

    The class is chosen from tokenizer_config.json alone. transformers' AutoTokenizer also looks at
    config.json, takes the `llava` of released checkpoints for its own model, and then splits
    words in another way than the checkpoint was trained with.

    Raises:
        UserInputError: the files cannot be read, or only the settings of a tokenizer are there.
    """
    file = folder / _TOKENIZER_SETTINGS
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        if file.is_file():
            raise UserInputError(
                f"{str(folder)!r} holds {_TOKENIZER_SETTINGS} but no tokenizer "
                f"({' or '.join(_TOKENIZER_FILES)}); download the missing file"
            )
        return None
    # Readers of model files raise errors without a common base class.
    with library_errors(f"the tokenizer in {str(folder)!r} cannot be read", "download it again"):
        settings = read_json_object(file) if file.is_file() else {}
        if settings.get("tokenizer_class") not in (None, "LlamaTokenizer", "LlamaTokenizerFast"):
            return AutoTokenizer.from_pretrained(str(folder), use_fast=False)
        # LLaVA's prompts begin with BOS also where the file does not say so.
        bos: dict[str, Any] = {} if "add_bos_token" in settings else {"add_bos_token": True}
        return LlamaTokenizer.from_pretrained(str(folder), use_fast=False, **bos)


def attach_tokenizer(model: LlavaCausalLM, tokenizer: Any) -> None:
    """Add the image tokens the config asks for and give every token a row of embeddings."""
    model.text_tokenizer = tokenizer
    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) == known:
        return
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # transformers draws new rows at random
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            table[known:] = table[:known].float().mean(dim=0).to(table.dtype)
