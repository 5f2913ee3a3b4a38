"""From the plain data of a config.json to transformers' config: values read, or refused in a line.

Checkpoints of many years and programs hold null for "not set", -1 for "no such token", settings of
the machine that saved them, and what was simply mistyped. transformers refuses the first three with
the traceback of a validator and takes some of the last as they are.
"""

import copy
import dataclasses
import logging
import types
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from transformers import GenerationConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava.anyres import NEXT_PROTOCOLS
from llava.utils import UserInputError
from llava.value_rules import (
    FLAG,
    TEXT,
    library_errors,
    list_of,
    number,
    one_of,
    read_values,
    short_repr,
    unfit,
    whole,
)

logger = logging.getLogger(__name__)

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

DTYPES = ("float16", "bfloat16", "float32", "float64")
# Far above every model; a model of more layers would not be built in reasonable time.
_MAX_LAYERS = 1024
_MAX_SIZE = 2**24
_OR_REMOVE = ", or remove it for the default"
_SIZE = whole(1, _MAX_SIZE)
_SCALE = number(0, above=True)
# Of a language model or a tower; what is not of its kind is not in its config.
_MODEL_RULES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), _SIZE),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "sliding_window"), _SIZE),
    **dict.fromkeys(("image_size", "patch_size"), whole(1, 2**14)),
    "num_hidden_layers": whole(1, _MAX_LAYERS),
    "num_channels": whole(3, 3),
    "rms_norm_eps": number(0, 1e-3),
    "layer_norm_eps": number(0, 1e-3),
    "rope_theta": number(1, above=True),
    "hidden_act": one_of(tuple(ACT2FN)),
}
_LLAVA_RULES = {
    "mm_vision_tower": TEXT._replace(wanted="the name or folder of a vision tower"),
    "mm_hidden_size": _SIZE,
    "mm_patch_merge_type": TEXT._replace(wanted="one of flat, spatial, spatial_unpad"),
    "mm_next_protocol": TEXT._replace(wanted=f"one of {', '.join(NEXT_PROTOCOLS)}"),
    "mm_use_im_start_end": FLAG,
    "mm_use_im_patch_token": FLAG,
    "unfreeze_mm_vision_tower": FLAG,
    "max_sequence_length": whole(1),
}
# Keys for which null means what a missing key does; for others it is a value.
_NULL_IS_DEFAULT = (
    "image_size",
    "patch_size",
    "rope_theta",
    "mm_hidden_size",
    "mm_projector_type",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "mm_next_protocol",
    "tokenizer_padding_side",
    "max_sequence_length",
)
# What the program that saved a checkpoint was told about its own machine and call, and settings of
# answers (see `generation`).
_OF_A_RUN = (set(GenerationConfig().to_dict()) - {"use_cache", *TOKENS}) | {
    "attn_implementation",
    "_attn_implementation",
    "return_dict",
    "use_return_dict",
    "output_attentions",
    "output_hidden_states",
    "torchscript",
    "transformers_version",
}
# What caches read of every model's config, though only some models have such layers.
_OF_SOME = {"sliding_window", "use_sliding_window", "attention_chunk_size", "layer_types"}
_ROPE_RULES = {
    "rope_theta": number(1, above=True),
    **dict.fromkeys(("factor", "original_max_position_embeddings"), number(1)),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "attention_factor"), _SCALE),
    **dict.fromkeys(("beta_fast", "beta_slow"), _SCALE),
    **dict.fromkeys(("short_factor", "long_factor"), list_of(_SCALE)),
}


def build_config(
    cls: type[PretrainedConfig], raw: Mapping[str, Any], place: str, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Make a config of transformers from plain data.

    Args:
        cls: of the language model or the tower.
        raw: what config.json holds; it is not changed.
        place: what errors call the file, such as "in config.json".
        **kwargs: attributes that override those of the file, and others.

    Returns:
        The config, and the keyword arguments that are not attributes of it.

    Raises:
        UserInputError: a value that cannot be used; names its key, and what it can be.
    """
    values = clean_values(cls, raw, place)
    # The config would keep the precision that is asked for, "auto" included, for a file's own.
    asked = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
    # Validators of transformers raise errors without a common base class.
    with library_errors(
        f"the settings {place} cannot be used", "correct them, or download the file again"
    ):
        config, rest = cls.from_dict(values, return_unused_kwargs=True, **kwargs)
        config.validate()
        _check_heads(config, place)
        if getattr(config, "rope_parameters", None):
            _check_rope(config, place)
    return config, {**rest, **asked}


def clean_values(cls: type[PretrainedConfig], raw: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Copy `raw`, with values of the types that `cls` takes.

    null is taken out where `cls` has a default instead, and tokens that no vocabulary holds are no
    tokens.

    Raises:
        UserInputError: a value that cannot be used.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {k: copy.deepcopy(v) for k, v in raw.items() if _has_part(k, cls, k in fields)}
    for name in _NULL_IS_DEFAULT:
        if values.get(name, ...) is None:
            del values[name]
    values = read_values(values, {**_MODEL_RULES, **_LLAVA_RULES}, place, _OR_REMOVE)
    names = values.get("architectures", [])  # of a part; read_config checks those of the whole
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        del values["architectures"]
    longest = values.get("max_position_embeddings")
    if type(longest) is int and longest < 1:  # as others write "no limit"
        del values["max_position_embeddings"]
    for name in fields.keys() & values.keys():
        _fit_type(values, name, _kinds(fields[name].type), place)
    for name in ("dtype", "torch_dtype"):
        if name in values and as_dtype(values[name]) is None:
            del values[name]
    _clean_rope(values, place)
    vocabulary = values.get("vocab_size") or getattr(cls, "vocab_size", None)
    for name in TOKENS:
        if vocabulary is not None and name in values:
            values[name] = known_tokens(name, values[name], vocabulary, place)
    return values


def _has_part(name: str, cls: type[PretrainedConfig], is_field: bool) -> bool:
    """Whether a key can say something about a model of the class, field of it or not."""
    inner = callable(getattr(cls, name, None)) or name.startswith("base_model_")
    return name not in _OF_A_RUN and (is_field or not (inner or name in _OF_SOME))


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """List the types of a field: `int | None` has two."""
    return get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _fit_type(values: dict[str, Any], name: str, kinds: tuple[Any, ...], place: str) -> None:
    """Make a value the one type of its field, where JSON writes it as another."""
    value = values[name]
    if value is None and not set(kinds) & {type(None), Any}:
        del values[name]
    elif kinds == (bool,):
        values.update(read_values({name: value}, {name: FLAG}, place, _OR_REMOVE))
    elif kinds == (float,) and type(value) is int:
        values[name] = float(value)
    elif int in kinds and float not in kinds and isinstance(value, float) and value.is_integer():
        values[name] = int(value)


def _clean_rope(values: dict[str, Any], place: str) -> None:
    """Check how positions are rotated: `rope_parameters`, or older files' `rope_scaling`."""
    for name in ("rope_scaling", "rope_parameters"):
        given = values.get(name)
        if not given and given in (None, {}):
            values.pop(name, None)
            continue
        kind = given.get("rope_type", given.get("type")) if isinstance(given, Mapping) else None
        alone = isinstance(given, Mapping) and set(given) == {"rope_theta"}
        if not isinstance(kind, str) and not alone:
            example = "{'rope_type': 'linear', 'factor': 2.0}"
            raise unfit(name, given, place, f"give a mapping such as {example}, or remove it")
        values[name] = read_values(given, _ROPE_RULES, f"of {name} {place}")
        if values[name].get("rope_theta", ...) is None:
            del values[name]["rope_theta"]
        inner, outer = values[name].get("rope_theta"), values.get("rope_theta")
        if inner is not None and outer is not None and inner != outer:
            raise unfit("rope_theta", outer, place, f"{name} says {inner}; remove one of the two")


def known_tokens(name: str, value: Any, vocabulary: int, place: str) -> Any:
    """Return a token id, or a list of them, without those beyond the vocabulary; None for none.

    Raises:
        UserInputError: no id; only ends of an answer can be a list of them.
    """
    several = isinstance(value, list | tuple) and "eos" in name
    rule = whole(-(2**63), 2**63 - 1)
    try:
        ids = [] if value is None else [rule.read(i) for i in (value if several else [value])]
    except (ValueError, TypeError) as error:
        raise unfit(name, value, place, "give the id of a token, or null for none") from error
    known = [i for i in ids if 0 <= i < vocabulary]
    if len(known) < len(ids) and any(i >= vocabulary for i in ids):
        logger.warning(
            f"{name} {place} is {short_repr(value)}, which is beyond the vocabulary of "
            f"{vocabulary} tokens and left out"
        )
    if not known:
        return None
    return known if several else known[0]


def _check_heads(config: Any, place: str) -> None:
    heads = getattr(config, "num_attention_heads", None) or 1
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        remedy = f"give a divisor of num_attention_heads, which is {heads}"
        raise unfit("num_key_value_heads", groups, place, remedy)


def _check_rope(config: Any, place: str) -> None:
    """Make the frequencies once: what they are made of differs from kind to kind."""
    given = short_repr(dict(config.rope_parameters))
    what = f"rope_scaling {place} is {given}, which cannot be used"
    with library_errors(what, "correct it, or remove it for the default"):
        with torch.device("cpu"):
            frequencies = LlamaRotaryEmbedding(config).inv_freq
        if not bool(torch.isfinite(frequencies).all()):
            raise ValueError("its frequencies are not finite")


def as_dtype(value: Any) -> torch.dtype | None:
    """Return a precision that models run in, from torch's or its name; None for anything else."""
    name = str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else ""
    dtype = getattr(torch, {"half": "float16", "float": "float32"}.get(name, name), None)
    return dtype if name and str(dtype).removeprefix("torch.") in DTYPES else None


def choose_dtype(given: Any, config: Any, stored: Iterable[torch.dtype]) -> torch.dtype:
    """Choose the precision that a model is loaded in.

    Args:
        given: a dtype or its name; "auto" or None for the checkpoint's own.
        config: of the checkpoint; it may say its precision.
        stored: precisions of the weights, in their order.

    Raises:
        UserInputError: none of these.
    """
    if given is None or given == "auto":
        own = as_dtype(getattr(config, "dtype", None))
        floating = (as_dtype(dtype) for dtype in stored)
        return own or next((dtype for dtype in floating if dtype), torch.float32)
    dtype = as_dtype(given)
    if dtype is None:
        raise UserInputError(
            f"unknown dtype {short_repr(given)}; use 'auto' for the checkpoint's own, or one of "
            f"{', '.join(DTYPES)}"
        )
    return dtype
