"""Hugging Face's own LLaVA checkpoints (llava-hf): their config in LLaVA's words.

Weights need no translation beyond their names, see `checkpoint.KEY_MAPPING`. Only
`config.json` is read here; the sizes it leaves out are transformers' defaults.
"""

from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, SiglipVisionConfig
from transformers import LlavaConfig as HuggingFaceLlavaConfig
from transformers import LlavaNextConfig as HuggingFaceLlavaNextConfig

from llava.anyres import parse_pinpoints
from llava.model.config_values import build_config, clean_values
from llava.utils import UserInputError
from llava.value_rules import short_repr

_READERS = {"llava": HuggingFaceLlavaConfig, "llava_next": HuggingFaceLlavaNextConfig}
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
# What config.json says about itself rather than about the language model.
_NOT_OF_THE_MODEL = ("architectures", "model_type", "_name_or_path", "transformers_version")


def is_hugging_face(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is in Hugging Face's form: both calls itself `llava`."""
    return config.get("model_type") in _READERS and {"text_config", "vision_config"} <= set(config)


def native_form(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Bring a config.json into LLaVA's form; one that is not Hugging Face's stays as it is.

    The vision tower is part of these checkpoints, so `unfreeze_mm_vision_tower` is set: whoever
    reads a saved model must take the tower's weights from it. Images are padded to a square, as
    LLaVA-1.5 was trained and evaluated; Hugging Face's processor crops them by default.

    Raises:
        UserInputError: settings that no LLaVA of this package has.
    """
    if not is_hugging_face(config):
        return config
    config = _clean(config, where)
    parsed, _ = build_config(_READERS[config["model_type"]], config, f"in config.json of {where!r}")
    text, vision = parsed.text_config, parsed.vision_config
    _check(config, parsed, where)
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
        "mm_vision_tower": _tower_name(vision),
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
    }


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


def _tower_name(vision: Any) -> str:
    stock = all(getattr(vision, key) == size for key, size in _STOCK_SIZES.items())
    return _STOCK_TOWER if stock else _OWN_TOWER


def _check(config: Mapping[str, Any], parsed: Any, where: str) -> None:
    """Refuse what this package would run differently than Hugging Face does."""
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
    found = [fault for fault, present in faults.items() if present]
    if found:
        raise UserInputError(
            f"{where!r} is a checkpoint in Hugging Face's format that this package cannot hold: "
            f"{', '.join(found)}; use a LLaVA with a CLIP or SigLIP tower on Llama or Mistral, "
            "such as llava-hf/llava-1.5-7b-hf, or load this one with transformers"
        )
