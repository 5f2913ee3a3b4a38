"""Folders that have a part of a model, a LoRA adapter or a projector, and need a base model.

A merged weight is W + s B A with s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA
(arXiv 2106.09685, 2312.03732). Modules are found by their full names, so that adapters which also
hit the vision tower (leaf names such as `q_proj` fit CLIP too) end up where they were trained.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llava.model.checkpoint import (
    TOWER_PREFIX,
    name_in_memory,
    read_json_object,
    read_weights,
    weight_file,
)
from llava.pruning import forget
from llava.utils import UserInputError

if TYPE_CHECKING:
    from llava.model.language_model.llava_causal_lm import LlavaCausalLM

_PROJECTOR = "mm_projector"
_PROJECTOR_PREFIX = f"model.{_PROJECTOR}."
# Words in the keys of a projector's file -> how the names in memory begin.
_PARTS = {
    f"{_PROJECTOR}.": _PROJECTOR_PREFIX,
    "embed_tokens.": "model.embed_tokens.",
    "image_newline": "model.image_newline",
    "lm_head.": "lm_head.",
}
_REST = "non_lora_trainables"
CONFIG_FILE = "adapter_config.json"
_STEM = "adapter_model"
# PEFT wraps the model twice and may write the adapter's name into the keys.
_WRAPPER = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_WRAPPED_PART = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
# Start values of A and B that leave the base weights alone; others (PiSSA, OLoRA, LoftQ, ...)
# change them, and the adapter belongs to the changed ones.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
# Variants that are more than W + s B A. The weights of most would be refused as unknown too.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)

# Name of a weight [out, in] -> (A [r, in], B [out, r], s).
_Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]


@dataclass(frozen=True)
class PartialCheckpoint:
    """What a folder adds to a base model, weights under the names the model has in memory.

    Attributes:
        folder: where it was read.
        weights: weights that replace those of the base: trained as they are, as biases and PEFT's
            `modules_to_save` are.
        factors: of the LoRA adapter that is merged into the base; empty without one.
        targets: every linear layer of the language model whose name ends in one of these has
            factors; empty where the settings choose layers by another rule.
    """

    folder: Path
    weights: Mapping[str, torch.Tensor]
    factors: _Factors = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    @torch.no_grad()
    def apply(self, model: "LlavaCausalLM") -> None:
        """Bring the folder's weights into a model that holds those of the base.

        Raises:
            UserInputError: weights that the model has no place for, of another shape, or of a part
                of the projector only.
        """
        state = model.state_dict(keep_vars=True)
        self._check_projector(state)
        for name, value in self.weights.items():
            self._check(name, value, state.get(name))
            state[name].copy_(value)
        if self.factors:
            self._merge_factors(model)
        forget(model.get_model().mm_projector)
        tower = model.get_vision_tower()
        changed = (*self.weights, *self.factors)
        if tower is not None and any(name.startswith(TOWER_PREFIX) for name in changed):
            # The tower has changed, so it must be saved with the model.
            tower.from_checkpoint = True
            model.config.unfreeze_mm_vision_tower = True

    def _check_projector(self, state: Mapping[str, torch.Tensor]) -> None:
        """Refuse parts of a projector: mixed with another training's it would be useless."""
        own = {name for name in state if name.startswith(_PROJECTOR_PREFIX)}
        lost = sorted(own - set(self.weights))
        if lost and (not self.factors or len(lost) < len(own)):
            raise UserInputError(
                f"{str(self.folder)!r} holds {len(own) - len(lost)} of the {len(own)} weights of "
                f"the projector, {lost[0]!r} is missing; download or save it again, with the "
                "config.json of its training"
            )

    def _check(self, name: str, value: torch.Tensor, own: nn.Parameter | None) -> None:
        if own is None:
            raise UserInputError(
                f"{str(self.folder)!r} holds {name!r}, for which the model has no place; give the "
                "config.json that was saved with it"
            )
        if own.shape != value.shape:
            raise UserInputError(
                f"{str(self.folder)!r} holds {name!r} of shape {list(value.shape)}, the model has "
                f"{list(own.shape)}; give the model_base and the config.json it was trained with"
            )

    def _merge_factors(self, model: nn.Module) -> None:
        """Add every s B A to its weight in place; one weight at a time is in memory twice.

        Products are taken in float32 (float64 for float64 weights) and rounded once, to the
        weight's own dtype. PEFT's `fan_in_fan_out` means nothing here, as in PEFT: only layers that
        are not `nn.Linear` store their weights transposed, and LLaVA has none.
        """
        parameters = dict(model.named_parameters())
        linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self._check_targets(linear)
        where = f"the adapter in {str(self.folder)!r}"
        for name, (a, b, scale) in self.factors.items():
            if name not in linear:
                raise UserInputError(
                    f"{where} changes {name!r}, which is not a linear layer of the model; give the "
                    "model_base and the config.json it was trained with"
                )
            weight = parameters[name]
            if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
                raise UserInputError(
                    f"{where} has factors {list(a.shape)} and {list(b.shape)} for {name!r} of "
                    f"shape {list(weight.shape)}; give the model_base it was trained on"
                )
            dtype = torch.promote_types(weight.dtype, torch.float32)
            a, b = a.to(weight.device, dtype), b.to(weight.device, dtype)
            weight.copy_(torch.addmm(weight.to(dtype), b, a, alpha=scale))

    def _check_targets(self, linear: set[str]) -> None:
        """Refuse an adapter that lost factors: what it trained would be half there."""
        ends = tuple(f".{name}.weight" for name in self.targets)
        lost = sorted(
            name
            for name in linear - set(self.factors)
            if name.startswith("model.layers.") and name.endswith(ends)
        )
        if lost:
            some = f"{len(lost)} layers that its target_modules name, for example {lost[0]!r}"
            raise _damaged(self.folder, f"lacks the factors of {some}")


def read_partial(folder: Path, model_base: str | None) -> PartialCheckpoint | None:
    """Read what a folder adds to `model_base`, by its files; None for a complete checkpoint.

    Raises:
        UserInputError: `model_base` is missing or superfluous, or files are damaged.
    """
    is_lora = (folder / CONFIG_FILE).is_file()
    complete = weight_file(folder) is not None
    stems = [folder / f"{_PROJECTOR}.{suffix}" for suffix in ("safetensors", "bin")]
    is_projector = not is_lora and not complete and any(file.is_file() for file in stems)
    if not (is_lora or is_projector):
        if model_base is not None:
            raise UserInputError(
                f"{str(folder)!r} is neither a LoRA nor a projector-only folder (it holds neither "
                f"{CONFIG_FILE} nor {_PROJECTOR}.bin alone), so it needs no model_base; "
                "leave model_base out"
            )
        return None
    if model_base is None:
        raise UserInputError(_ask_for_base(folder, is_lora, complete))
    if is_lora:
        return _read_adapter(folder)
    return PartialCheckpoint(folder, _projector(folder))


def _ask_for_base(folder: Path, is_lora: bool, complete: bool) -> str:
    if not is_lora:
        return (
            f"{str(folder)!r} holds only a projector; give the language model it was trained with "
            "as model_base"
        )
    if complete:
        return (
            f"{str(folder)!r} holds a LoRA adapter and the weights of a whole model; give a "
            "model_base to use the adapter, or move adapter_config.json away to use the weights"
        )
    trained_on = read_adapter_config(folder).get("base_model_name_or_path")
    hint = f", which was {str(trained_on)!r}" if trained_on else ""
    return (
        f"{str(folder)!r} holds a LoRA adapter; give the model it was trained on as model_base"
        f"{hint}"
    )


def read_rest(folder: Path) -> dict[str, torch.Tensor]:
    """Read weights that were trained with the adapter; none if the projector was not."""
    weights = read_weights(folder, _REST) or {}
    weights = {key.removeprefix("base_model."): value for key, value in weights.items()}
    if any(key.startswith("model.model.") for key in weights):
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
    return {name_in_memory(key): value for key, value in weights.items()}


def _projector(folder: Path) -> dict[str, torch.Tensor]:
    """Read `model.mm_projector.*`, whatever its prefix, a newline and tables of tokens if any."""
    weights: dict[str, torch.Tensor] = {}
    for key, value in (read_weights(folder, _PROJECTOR) or {}).items():
        part = next((part for part in _PARTS if part in key), None)
        name = None if part is None else _PARTS[part] + key.split(part, 1)[1]
        if name is None or name in weights:
            fault = "a weight it has twice" if name else "which is not a weight of a projector"
            raise UserInputError(
                f"{_PROJECTOR}.bin in {str(folder)!r} holds {key!r}, {fault}; save the projector "
                "again"
            )
        weights[name] = value
    if weights and not any(name.startswith(_PROJECTOR_PREFIX) for name in weights):
        raise UserInputError(
            f"{_PROJECTOR}.bin in {str(folder)!r} holds {next(iter(weights))!r} and no weight of a "
            "projector; save the projector again"
        )
    return weights


def _read_adapter(folder: Path) -> PartialCheckpoint:
    """Read an adapter's config and weights, and the weights that were trained with it.

    Raises:
        UserInputError: files missing or damaged, or a variant of LoRA that cannot be merged.
    """
    config = read_adapter_config(folder)
    weights = read_weights(folder, _STEM)
    if weights is None:
        raise UserInputError(
            f"{str(folder)!r} holds {CONFIG_FILE} but neither {_STEM}.safetensors nor {_STEM}.bin; "
            "download or save the adapter again"
        )
    sides: dict[str, dict[str, torch.Tensor]] = {"A": {}, "B": {}}
    scales, whole = {}, {}
    for key, value in weights.items():
        key = key.removeprefix(_WRAPPER)
        factor = _FACTOR.fullmatch(key)
        if factor is not None:
            side, module = sides[factor["side"]], factor["module"]
            name = name_in_memory(f"{_WRAPPED_PART.sub('', module)}.weight")
            _check_factor(folder, key, value, known=name in side)
            side[name] = value
            if side is sides["A"]:
                scales[name] = _scale(config, module, value.shape[0])
        elif "lora_" in key:
            raise UserInputError(
                f"the adapter in {str(folder)!r} holds {key!r}, which is not part of a plain LoRA "
                "of linear layers; merge it with PEFT and give the merged folder"
            )
        else:
            whole[name_in_memory(_WRAPPED_PART.sub("", key))] = value
    halves = sorted(set(sides["A"]) ^ set(sides["B"]))
    if halves:
        raise _damaged(folder, f"holds only one of the two factors of {halves[0]!r}")
    if not scales:
        raise _damaged(folder, "has no factors (lora_A, lora_B), so it changes nothing")
    factors = {name: (a, sides["B"][name], scales[name]) for name, a in sides["A"].items()}
    return PartialCheckpoint(folder, {**read_rest(folder), **whole}, factors, _target_names(config))


def _damaged(folder: Path, fault: str) -> UserInputError:
    return UserInputError(f"the adapter in {str(folder)!r} {fault}; download or save it again")


def _check_factor(folder: Path, key: str, value: torch.Tensor, known: bool) -> None:
    fault = None
    if value.ndim != 2 or 0 in value.shape:
        fault = f"of shape {list(value.shape)}, where a matrix with a rank of at least 1 belongs"
    elif not value.is_floating_point():
        fault = f"of type {str(value.dtype).removeprefix('torch.')}, where numbers belong"
    elif known:
        fault = "twice, with and without the adapter's name"
    if fault is not None:
        raise _damaged(folder, f"holds {key!r} {fault}")


def _target_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return names of which every module was trained; none where the rule is another."""
    names = config.get("target_modules")
    partial = any(config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    return () if partial or not isinstance(names, list) else tuple(map(str, names))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json` and check it.

    Raises:
        UserInputError: unreadable, no LoRA, or a variant of it that cannot be merged.
    """
    file = folder / CONFIG_FILE
    config = read_json_object(file)
    if "lora_alpha" not in config:
        raise UserInputError(
            f"{str(file)!r} does not describe a LoRA (lora_alpha is missing); download or save it "
            "again"
        )
    alpha, kind = config["lora_alpha"], config.get("peft_type", "LORA")
    odd = [f"{key}={config[key]!r}" for key in _VARIANTS if config.get(key)]
    if kind != "LORA":
        odd.append(f"peft_type={kind!r}")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        odd.append(f"init_lora_weights={start!r}")
    if not _is_number(alpha):
        odd.append(f"lora_alpha={alpha!r}")
    patterns = config.get("alpha_pattern") or {}
    readable = isinstance(patterns, dict) and all(map(_is_pattern, patterns))
    if not (readable and all(map(_is_number, patterns.values()))):
        odd.append(f"alpha_pattern={patterns!r}")
    if odd:
        raise UserInputError(
            f"the adapter in {str(folder)!r} is more than a plain LoRA ({', '.join(odd)}), which "
            "cannot be merged here; merge it with PEFT and give the merged folder"
        )
    return config


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return s of one module. The rank is that of its factors, whatever `rank_pattern` says."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # PEFT's rule: a pattern fits the end of a module's name, from a dot on.
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
