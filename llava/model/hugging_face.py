"""Hugging Face's own LLaVA checkpoints (llava-hf): their config in LLaVA's words, and back.

Weights need no translation beyond their names, see `checkpoint.KEY_MAPPING`. Only
`config.json` is read here; the sizes it leaves out are transformers' defaults.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, SiglipVisionConfig
from transformers import LlavaConfig as HuggingFaceLlavaConfig
from transformers import LlavaNextConfig as HuggingFaceLlavaNextConfig

from llava.anyres import canvas_choices, next_protocol, parse_pinpoints, tile_side
from llava.model.config_values import build_config, clean_values
from llava.utils import UserInputError
from llava.value_rules import short_repr

_READERS = {"llava": HuggingFaceLlavaConfig, "llava_next": HuggingFaceLlavaNextConfig}
_MODELS = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}
# Part of the config -> model type -> class of its settings; the first one where no type is given.
_PARTS = {
    "text_config": {"llama": LlamaConfig, "mistral": MistralConfig},
    "vision_config": {
        "clip_vision_model": CLIPVisionConfig,
        "siglip_vision_model": SiglipVisionConfig,
    },
}
# Language model -> (architecture, model type) of the LLaVA that has it.
_LANGUAGE_MODELS = {
    "llama": ("LlavaLlamaForCausalLM", "llava_llama"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
}
# Vision tower -> what vision_feature_select_strategy means for it. "default" drops the first token,
# which is a patch where there is no class token.
_SELECT_FEATURE = {
    "clip_vision_model": {"default": "patch", "full": "cls_patch"},
    "siglip_vision_model": {"full": "patch"},
}
# The tower LLaVA was trained with, by the sizes that tell it from other CLIP models. The original
# code can read a saved model only if the config names a tower that it finds.
_STOCK_TOWER = "openai/clip-vit-large-patch14-336"
_STOCK_SIZES = {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}
_OWN_TOWER = "vision_tower"
# Of LLaVA's settings, Hugging Face's form has its own words for these.
_TRANSLATED = (
    "mm_vision_tower",
    "mm_hidden_size",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_projector_type",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
)
# In Hugging Face's form, the size of the vocabulary before the mark of images was added to it.
OWN_VOCABULARY = "mm_vocab_size"
# It has none for the others, and keeps those under LLaVA's names that start with one of these.
_KEPT = ("mm_", "tokenizer_", "image_aspect_ratio", "max_sequence_length", "use_mm_proj")
# What config.json says about itself rather than about the language model.
_NOT_OF_THE_MODEL = ("architectures", "model_type", "_name_or_path", "transformers_version")


def is_hugging_face(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in Hugging Face's form: both calls itself `llava`."""
    return config.get("model_type") in _READERS and {"text_config", "vision_config"} <= set(config)


def native_form(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Bring a config.json into LLaVA's form; one that is not Hugging Face's stays as it is.

    The vision tower is part of these checkpoints, so `unfreeze_mm_vision_tower` is set: whoever
    reads a saved model must take the tower's weights from it. Images are padded to a square, as
    LLaVA-1.5 was trained and evaluated; Hugging Face's processor crops them by default. Settings
    that only LLaVA has are read under LLaVA's names, as `hugging_face_form` writes them.

    Raises:
        UserInputError: settings that no LLaVA of this package has.
    """
    if not is_hugging_face(config):
        return config
    config = _clean(config, where)
    parsed, _ = build_config(_READERS[config["model_type"]], config, f"in config.json of {where!r}")
    text, vision = parsed.text_config, parsed.vision_config
    found = _faults(parsed)
    if found:
        raise UserInputError(
            f"{where!r} is a checkpoint in Hugging Face's format that this package cannot hold: "
            f"{', '.join(found)}; use a LLaVA with a CLIP or SigLIP tower on Llama or Mistral, "
            "such as llava-hf/llava-1.5-7b-hf, or load this one with transformers"
        )
    architecture, model_type = _LANGUAGE_MODELS[text.model_type]
    language = {k: v for k, v in text.to_dict().items() if k not in _NOT_OF_THE_MODEL}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"):
        if config.get(key) is not None:
            language[key] = config[key]
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {
        **language,
        **({"dtype": dtype} if dtype else {}),
        "architectures": [architecture],
        "model_type": model_type,
        "mm_vision_tower": tower_name(vision),
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_select_layer": parsed.vision_feature_layer,
        "mm_vision_select_feature": _SELECT_FEATURE[vision.model_type][
            parsed.vision_feature_select_strategy
        ],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "unfreeze_mm_vision_tower": True,
        **_aspect(config, parsed),
        **{key: value for key, value in config.items() if key != OWN_VOCABULARY and _is_kept(key)},
    }


def has_native_form(config: dict[str, Any], where: str) -> bool:
    """Whether the classes of this package hold a LLaVA whose config.json is Hugging Face's.

    Raises:
        UserInputError: values that no model has.
    """
    config = _clean(config, where)
    parsed, _ = build_config(_READERS[config["model_type"]], config, f"in config.json of {where!r}")
    return not _faults(parsed)


def hugging_face_form(
    config: Any, vision: Any, processor: Any, where: str, *, rows: int, image_token: int
) -> Any:
    """Make Hugging Face's config of a LLaVA of this package.

    Args:
        config: of the LLaVA; `name_or_path` and the like are left out.
        vision: transformers' config of its vision tower.
        processor: the tower's image processor.
        where: what errors call the checkpoint.
        rows: embeddings that the converted language model has.
        image_token: id of the mark that stands for a token of an image.

    Returns:
        transformers' `LlavaConfig`, or `LlavaNextConfig` where images are cut into tiles.

    Raises:
        UserInputError: a model that transformers' classes would not run as this package does.
    """
    tiled = getattr(config, "image_aspect_ratio", None) == "anyres"
    _check_for_hugging_face(config, processor, tiled, where)
    kind = config.model_type.removeprefix("llava_")
    cls, own = _PARTS["text_config"][kind], config.to_dict()
    known = {field.name for field in fields(cls)} - {*_NOT_OF_THE_MODEL, "dtype"}
    words = {ours: theirs for theirs, ours in _SELECT_FEATURE[vision.model_type].items()}
    selected = getattr(config, "mm_vision_select_feature", "patch")
    strategy = words.get(selected, "full")  # without a class token there is nothing to drop
    patches = (vision.image_size // vision.patch_size) ** 2
    settings: dict[str, Any] = {
        "text_config": {
            **{key: value for key, value in own.items() if key in known},
            "model_type": kind,
            "vocab_size": rows,
        },
        "vision_config": {k: v for k, v in vision.to_dict().items() if k != "dtype"},
        "image_token_index": image_token,
        "image_seq_length": patches + int(strategy == "full" and "default" in words.values()),
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": getattr(config, "mm_vision_select_layer", -2),
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": own.get("dtype"),
        **{key: value for key, value in own.items() if _is_kept(key)},
        "image_aspect_ratio": getattr(config, "image_aspect_ratio", None) or "square",
    }
    if tiled:
        canvases = canvas_choices(config, tile_side(processor))
        settings["image_grid_pinpoints"] = [[height, width] for width, height in canvases]
    if rows > config.vocab_size:
        settings[OWN_VOCABULARY] = config.vocab_size
    model_type = "llava_next" if tiled else "llava"
    theirs = _READERS[model_type](**settings)
    theirs.architectures = [_MODELS[model_type]]
    return theirs


def _is_kept(key: str) -> bool:
    return key.startswith(_KEPT) and key not in _TRANSLATED


def _clean(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read the values of both parts of a config; a part of an unknown kind stays as it is."""
    cleaned = dict(config)
    for part, kinds in _PARTS.items():
        given = config[part]
        if not isinstance(given, dict):
            raise UserInputError(
                f"config.json of {where!r} cannot be understood ({part} is {short_repr(given)}, "
                "not the settings of a model); download it again"
            )
        kind = given.get("model_type")
        if kind is None:
            given = {key: value for key, value in given.items() if key != "model_type"}
        cls = kinds.get(kind if isinstance(kind, str) else next(iter(kinds)))
        if cls is not None:
            place = f"in {part} of config.json of {where!r}"
            cleaned[part] = clean_values(cls, given, place)
    return cleaned


def _aspect(config: Mapping[str, Any], parsed: Any) -> dict[str, Any]:
    if config["model_type"] == "llava":
        return {"image_aspect_ratio": "pad"}
    # Hugging Face writes (height, width), LLaVA (width, height).
    points = [[width, height] for height, width in parse_pinpoints(parsed.image_grid_pinpoints)]
    return {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": points,
    }


def tower_name(vision: Any) -> str:
    """Return the name of LLaVA's own tower for a vision config of its sizes, else a folder's."""
    return stock_tower(vision) or _OWN_TOWER


def stock_tower(vision: Any) -> str | None:
    """Return the name of LLaVA's own tower for a vision config of its sizes, else None."""
    stock = all(getattr(vision, key) == size for key, size in _STOCK_SIZES.items())
    return _STOCK_TOWER if stock else None


def _faults(parsed: Any) -> list[str]:
    """Return what this package would run differently than Hugging Face does."""
    text, vision = parsed.text_config.model_type, parsed.vision_config.model_type
    layer, strategy = parsed.vision_feature_layer, parsed.vision_feature_select_strategy
    faults = {
        f"its language model is of type {text!r}": text not in _LANGUAGE_MODELS,
        f"its vision tower is of type {vision!r}": vision not in _SELECT_FEATURE,
        f"vision_feature_layer is {layer!r}": not isinstance(layer, int),
        f"vision_feature_select_strategy is {strategy!r}": (
            strategy not in _SELECT_FEATURE.get(vision, {strategy})
        ),
        f"projector_hidden_act is {parsed.projector_hidden_act!r}": (
            parsed.projector_hidden_act != "gelu"
        ),
        "its projector has no bias": not parsed.multimodal_projector_bias,
    }
    return [fault for fault, present in faults.items() if present]


def _check_for_hugging_face(config: Any, processor: Any, tiled: bool, where: str) -> None:
    """Refuse what transformers' classes would run differently than this package does."""
    projector = getattr(config, "mm_projector_type", "linear")
    merge = getattr(config, "mm_patch_merge_type", None) or "flat"
    protocol = next_protocol(config)
    faults = {
        f"its projector is of type {projector!r}": projector != "mlp2x_gelu",
        "its prompts put marks around images (mm_use_im_start_end)": bool(
            getattr(config, "mm_use_im_start_end", False)
        ),
        f"mm_patch_merge_type is {merge!r}": ("unpad" in merge) != tiled,
        f"mm_next_protocol is {protocol!r}": protocol != "native",
        "its tiles are not scaled bicubically": tiled and int(processor.resample) != 3,
    }
    found = [fault for fault, present in faults.items() if present]
    if found:
        raise UserInputError(
            f"{where!r} cannot be put into Hugging Face's format: {', '.join(found)}; its LLaVA "
            "would answer differently, so use this checkpoint as it is"
        )
