"""Checkpoints of the families: which family a folder belongs to, and how it is loaded.

Model, tokenizer, image processor and chat template are the checkpoint's own, in transformers'
classes. No package beyond transformers' own needs is imported, torchvision least of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from llava.families.family import Family
from llava.families.loaded import FamilyModel
from llava.model.builder import (
    MODEL_CLASSES,
    check_attention,
    placement,
    quantization_config,
)
from llava.model.checkpoint import check_loading, read_json_object
from llava.model.checks import check_weights
from llava.model.config_values import as_dtype
from llava.model.hugging_face import has_native_form, is_hugging_face
from llava.model.language_model.llava_causal_lm import describes
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.lookup import FAMILIES
from llava.utils import UserInputError
from llava.value_rules import library_errors

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEMPLATE, _OLD_TEMPLATE = "chat_template.jinja", "chat_template.json"
_TOKENIZER_SETTINGS = "tokenizer_config.json"


def family_of_config(config: Mapping[str, Any], where: str) -> type[Family] | None:
    """Return the family that a config.json belongs to; None for what the native classes load.

    LLaVAs in Hugging Face's format belong to a family only where the native classes cannot hold
    them, as with a Qwen2 language model.

    Args:
        config: as `llava.model.checkpoint.read_config` returns it.
        where: what errors call the checkpoint.

    Raises:
        UserInputError: values that no model has.
    """
    if any(describes(config, native) for native in MODEL_CLASSES):
        return None
    if is_hugging_face(config) and has_native_form(dict(config), where):
        return None
    wanted = _class_names(config)
    for family in FAMILIES.entries().values():
        if wanted & set(family.classes):
            return cast(type[Family], family)
    return None


def _class_names(config: Mapping[str, Any]) -> set[str]:
    """Return the model classes that a config.json names, by its type where it names none."""
    named = config.get("architectures")
    if named:
        return set(named)
    kind = config.get("model_type")
    if kind in ("llava", "llava_next") and not is_hugging_face(config):
        return set()  # early checkpoints in LLaVA's own format
    known = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(str(kind))
    return {known} if isinstance(known, str) else set(known or ())


def load_checkpoint(
    family: type[Family],
    folder: Path,
    config: Mapping[str, Any],
    *,
    name: str = "",
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    attn_implementation: str | None = None,
) -> FamilyModel:
    """Load a checkpoint of a family, with pruning switched off.

    Args:
        family: as `family_of_config` returns it.
        folder: of the checkpoint.
        config: its config.json.
        name: what the model is called.
        device, load_8bit, load_4bit: as in `llava.model.builder.load_pretrained_model`; 8 and 4
            bits are for the language model alone.
        dtype: by default that of the checkpoint where it has 16 bits, else float16; on the CPU
            float32.
        attn_implementation: as in transformers.

    Raises:
        UserInputError: names what is missing or wrong, and what to do.
    """
    where = str(folder)
    if family.unasked is not None:
        raise UserInputError(f"{where!r} cannot be loaded here: {family.refusal()}")
    model_class = _model_class(family, config, where)
    tokenizer = _load_tokenizer(folder)
    processor = _load_processor(folder)
    template = chat_template(folder) or tokenizer.chat_template
    if not template:
        raise UserInputError(
            f"{where!r} has no chat template ({_TEMPLATE}, {_OLD_TEMPLATE}, or chat_template in "
            f"{_TOKENIZER_SETTINGS}); put that of the released checkpoint into the folder"
        )
    check_attention(attn_implementation)
    place, usual = placement(device, "auto")
    with library_errors(f"{where!r} cannot be loaded", "correct its config.json"):
        settings = model_class.config_class.from_pretrained(where)
        kept = _outside_language_model(family, model_class, settings)
    quantization = quantization_config(load_8bit, load_4bit, device, kept)
    own = as_dtype(config.get("dtype") or config.get("torch_dtype"))
    if dtype is None:
        half = usual == torch.float16 and own in (torch.float16, torch.bfloat16)
        dtype = own if half else usual
    more: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    if attn_implementation is not None:
        more["attn_implementation"] = attn_implementation
    remedy = "correct its config.json, or the arguments it is loaded with"
    with library_errors(f"{where!r} cannot be loaded", remedy):
        model, info = model_class.from_pretrained(
            where,
            config=settings,
            dtype=dtype,
            device_map=place,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **more,
        )
    check_loading(info, folder)
    projector = family().projector(model)
    weights = {key: own for key, own in projector.named_parameters() if not own.is_meta}
    check_weights(weights, f"the projector of {where!r}")
    model.text_tokenizer = tokenizer
    saved = _saved_pruning(family, model)
    return FamilyModel(family(), model.eval(), tokenizer, processor, template, saved, name)


def chat_template(folder: Path) -> str | None:
    """Return the chat template of a checkpoint folder; None if its files have none.

    Raises:
        UserInputError: a file that cannot be read.
    """
    if (folder / _TEMPLATE).is_file():
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    for name in (_OLD_TEMPLATE, _TOKENIZER_SETTINGS):
        if (folder / name).is_file():
            found = read_json_object(folder / name).get("chat_template")
            if isinstance(found, str):
                return found
    return None


def template_word(folder: Path) -> str:
    """Return what run keys and plans call the chat template of a checkpoint."""
    text = chat_template(folder) or ""
    return f"chat template {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _model_class(family: type[Family], config: Mapping[str, Any], where: str) -> Any:
    """Return the class of the model.

    Raises:
        UserInputError: the installed transformers does not have it.
    """
    (name, *_) = [own for own in family.classes if own in _class_names(config)]
    found = getattr(transformers, name, None)
    if found is None:
        raise UserInputError(
            f"{where!r} needs {name}, which transformers {transformers.__version__} does not have; "
            "install a later one: pip install -U transformers"
        )
    return found


def _load_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UserInputError(
            f"{str(folder)!r} has no tokenizer ({' or '.join(_TOKENIZERS)}), so it cannot read a "
            "question; put those files of the released checkpoint into the folder"
        )
    with library_errors(f"the tokenizer in {str(folder)!r} cannot be read", "download it again"):
        return AutoTokenizer.from_pretrained(str(folder))


def _load_processor(folder: Path) -> Any:
    """Load the image processor in the class that computes with PIL.

    Raises:
        UserInputError: it is missing, or transformers does not have it for PIL.
    """
    file = next((folder / name for name in _PROCESSORS if (folder / name).is_file()), None)
    if file is None:
        raise UserInputError(
            f"{str(folder)!r} has no image processor ({' or '.join(_PROCESSORS)}), so it cannot "
            "see a picture; put that file of the released checkpoint into the folder"
        )
    settings = read_json_object(file)
    settings = settings.get("image_processor") or settings
    name = str(settings.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    found = getattr(transformers, f"{name}Pil", None)
    if found is None:
        raise UserInputError(
            f"image_processor_type in {str(file)!r} is {name!r}, which transformers "
            f"{transformers.__version__} does not have for PIL; use the file of the released "
            "checkpoint"
        )
    what = f"the image processor in {str(folder)!r} cannot be read"
    with library_errors(what, "download it again"):
        return found.from_pretrained(str(folder))


def _outside_language_model(family: type[Family], model_class: Any, config: Any) -> list[str]:
    """Return the names of the modules that are no part of the language model's layers."""
    with torch.device("meta"):
        empty = model_class(config)
    inner = family().language_model(empty)
    parts = [f"model.{name}" for name, own in empty.model.named_children() if own is not inner]
    return [*parts, "lm_head"]


def _saved_pruning(family: type[Family], model: Any) -> PruningConfig | None:
    try:
        return family.attachment(model).saved_pruning
    except PruningError as error:
        raise UserInputError(
            f"mm_token_pruning in config.json cannot be used: {error}; correct or remove it"
        ) from error
