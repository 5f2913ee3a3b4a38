"""Load a LLaVA model the way LLaVA users do."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaTokenizer

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
)
from llava.model.checkpoint import local_checkpoint, read_config
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM, describes
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.pruning.config import PruningConfig
from llava.utils import UserInputError

logger = logging.getLogger(__name__)

# What LLaVA reports when the config does not say; released checkpoints rely on it.
DEFAULT_CONTEXT_LENGTH = 2048
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


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
) -> tuple[Any, LlavaLlamaForCausalLM | LlavaMistralForCausalLM, Any, int]:
    """Load a checkpoint in LLaVA's own format.

    What a folder holds is read from its config.json, never guessed from its name.

    Args:
        model_path: checkpoint folder or hub name.
        model_base: base model of a LoRA or projector-only folder (not supported yet).
        model_name: accepted for LLaVA's signature.
        device_map: as in transformers; used while ``device`` is CUDA.
        device: ``"cuda"``, ``"cpu"``, ``"mps"``, ... or ``"auto"``. Without CUDA, ``"cuda"`` and
            ``"auto"`` mean the CPU.
        use_flash_attn: use flash attention 2.
        pruning: settings that override those saved in the checkpoint; None keeps the saved ones.
        **kwargs: for ``from_pretrained``; ``dtype`` is float16, on the CPU float32, by default.
            Keys of the config override it, such as ``mm_next_protocol``.

    Returns:
        (tokenizer, model, image_processor, context_len). The tokenizer is None if the folder
        holds no tokenizer file; the image processor is None for a model without a vision tower.

    Raises:
        UserInputError: names what is wrong and what to do.
    """
    folder = local_checkpoint(model_path, kwargs.get("revision"))
    _refuse_partial(folder, model_base, load_8bit or load_4bit)
    # lmms-eval passes this to every loader.
    kwargs.pop("multimodal", None)
    placement, dtype = _placement(device, device_map)
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", None) or dtype)
    if use_flash_attn:
        kwargs["attn_implementation"] = "flash_attention_2"
    model = _model_class(folder).from_pretrained(folder, device_map=placement, **kwargs)
    if pruning is not None:
        model.pruning = pruning

    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        _match_tokenizer(model, tokenizer)
    image_processor = None
    tower = model.get_vision_tower()
    if tower is not None:
        tower.load_model(device_map={"": model.device}, dtype=model.dtype)
        image_processor = tower.image_processor
    context_len = getattr(model.config, "max_sequence_length", DEFAULT_CONTEXT_LENGTH)
    return tokenizer, model, image_processor, context_len


def _model_class(folder: Path) -> type[LlavaLlamaForCausalLM] | type[LlavaMistralForCausalLM]:
    config = read_config(folder)
    mistral = describes(config, LlavaMistralForCausalLM)
    return LlavaMistralForCausalLM if mistral else LlavaLlamaForCausalLM


def _refuse_partial(folder: Path, model_base: str | None, quantized: bool) -> None:
    if quantized:
        raise UserInputError(
            "8-bit and 4-bit loading are not supported yet; load without load_8bit and load_4bit"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserInputError(
            f"{str(folder)!r} holds a LoRA adapter, which is not supported yet; merge it into its "
            "base model and give the merged folder"
        )
    if model_base is not None:
        raise UserInputError(
            "model_base is for LoRA and projector-only folders, which are not supported yet; "
            "give a complete checkpoint as model_path and leave model_base out"
        )
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if (folder / "mm_projector.bin").is_file() and not weights:
        raise UserInputError(
            f"{str(folder)!r} holds only a projector, which is not supported yet; "
            "give a complete checkpoint"
        )
    config = read_config(folder)
    if "mm_vision_tower" not in config and config.get("model_type") in ("llama", "mistral"):
        raise UserInputError(
            f"{str(folder)!r} is a plain language model without a vision tower; "
            "give a LLaVA checkpoint"
        )


def _placement(device: str, device_map: Any) -> tuple[Any, torch.dtype]:
    """Device map and default dtype for a requested device."""
    if device in ("auto", "cuda") and not torch.cuda.is_available():
        if device == "cuda":
            logger.warning("CUDA is not available; the model is loaded on the CPU in float32")
        return {"": "cpu"}, torch.float32
    if device not in ("auto", "cuda"):
        device_map = {"": device}
        if torch.device(device).type == "cpu":
            return device_map, torch.float32
    return device_map, torch.float16


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder; None if the folder holds no tokenizer file.

    The class is chosen from tokenizer_config.json alone. transformers' AutoTokenizer also looks at
    config.json, takes the ``llava`` of released checkpoints for its own model, and then splits
    words in another way than the checkpoint was trained with.

    Raises:
        UserInputError: the files cannot be read.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if settings.get("tokenizer_class") not in (None, "LlamaTokenizer", "LlamaTokenizerFast"):
            return AutoTokenizer.from_pretrained(str(folder), use_fast=False)
        # LLaVA's prompts begin with BOS also where the file does not say so.
        bos = {} if "add_bos_token" in settings else {"add_bos_token": True}
        return LlamaTokenizer.from_pretrained(str(folder), use_fast=False, **bos)
    except Exception as error:  # readers of model files raise errors without a common base
        raise UserInputError(
            f"the tokenizer in {str(folder)!r} cannot be read ({error}); download it again"
        ) from error


def _match_tokenizer(model: Any, tokenizer: Any) -> None:
    """Add the image tokens the config asks for and give every token a row of embeddings."""
    if getattr(model.config, "mm_use_im_patch_token", True):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    if len(tokenizer) != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
