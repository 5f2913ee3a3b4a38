"""A LoRA on the language model of a LLaVA, made by PEFT."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.model.adapters import CONFIG_FILE, read_adapter_config, read_partial
from llava.model.checkpoint import TOWER_PREFIX
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.train.arguments import Arguments
from llava.utils import UserInputError, user_path


def add_lora(model: LlavaCausalLM, args: Arguments) -> nn.Module:
    """Put a LoRA on all linear layers of the decoder, with PEFT; the projector trains in full.

    Layers are named in full: by their last names alone (`q_proj`), those of a CLIP tower would get
    one too (LLaVA issue 1347).

    Returns:
        The PEFT model around `model`.

    Raises:
        UserInputError: a LoRA to continue from that does not fit.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    training = args.training
    if training.bits != 16:
        dtype = next(model.get_model().mm_projector.parameters()).dtype
        model = prepare_model_for_kbit_training(model, training.gradient_checkpointing or False)
        model.get_model().mm_projector.to(dtype)
        model.get_model().vision_tower.to(dtype)
    config = LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,  # type: ignore[arg-type]
        target_modules=_lora_targets(model, training.lora_vision_tower),
        lora_dropout=training.lora_dropout,
        bias=training.lora_bias,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
    )
    if training.lora_weight_path is not None:
        folder = user_path(training.lora_weight_path)
        if not (folder / CONFIG_FILE).is_file():
            raise UserInputError(
                f"--lora_weight_path {training.lora_weight_path} holds no {CONFIG_FILE}; give the "
                "folder of a LoRA"
            )
        own = read_adapter_config(folder)
        config.r, config.lora_alpha = own["r"], own["lora_alpha"]
    lora = get_peft_model(model, config)
    # PEFT has frozen the rest, or, with --lora_bias all, trains every bias there is.
    for name, weight in model.named_parameters():
        if name.startswith(TOWER_PREFIX) and "lora_" not in name:
            weight.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(not args.model.freeze_mm_mlp_adapter)
    if hasattr(model.get_model(), "image_newline"):
        model.get_model().image_newline.requires_grad_(not args.model.freeze_mm_mlp_adapter)
    if args.model.unfreeze_mm_vision_tower:
        model.get_vision_tower().unfreeze()  # type: ignore[union-attr]
    lora.peft_config["default"].base_model_name_or_path = args.model.model_name_or_path
    if training.lora_weight_path is not None:
        continue_lora(lora, model, Path(training.lora_weight_path))
    return lora


def _lora_targets(model: LlavaCausalLM, with_tower: bool) -> str:
    """Return a pattern of the full names of the linear layers that get a LoRA."""
    pattern = rf"model\.layers\.\d+\.({_linear(model.get_model().layers[0])})"
    tower = model.get_vision_tower()
    if not with_tower or tower is None:
        return pattern
    start = re.escape(f"{TOWER_PREFIX}encoder.layers.")
    blocks = tower.vision_tower.encoder.layers[: tower.num_layers_used]  # later ones do not run
    numbers = "|".join(str(number) for number in range(len(blocks)))
    return rf"{pattern}|{start}({numbers})\.({_linear(blocks[0])})"


def _linear(block: nn.Module) -> str:
    """Return a pattern of the names of all linear layers in a block."""
    names = [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    return "|".join(re.escape(name) for name in names)


@torch.no_grad()
def continue_lora(lora: nn.Module, model: LlavaCausalLM, folder: Path) -> None:
    """Bring the weights of a LoRA folder, and of what trained with it, into a new LoRA.

    Raises:
        UserInputError: weights that the LoRA has no place for, or lacks.
    """
    part = read_partial(user_path(folder), "its base")
    assert part is not None
    names = {name: weight for name, weight in lora.named_parameters() if "lora_" in name}
    given = {}
    for name, factors in part.factors.items():
        for side, value in zip("AB", factors[:2], strict=True):
            given[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.default.weight"] = (
                value
            )
    config: Any = lora.peft_config["default"]  # type: ignore[index]
    if any(scale != config.lora_alpha / config.r for *_, scale in part.factors.values()):
        raise UserInputError(
            f"the LoRA in {str(folder)!r} is scaled in another way than by lora_alpha / r "
            "(use_rslora, rank_pattern or alpha_pattern), which cannot be continued; merge it, and "
            "train a new one on the result"
        )
    odd = sorted(set(given) ^ set(names))
    if odd:
        raise UserInputError(
            f"the LoRA in {str(folder)!r} and the one to train differ, for example in {odd[0]!r}; "
            "give a LoRA of this language model, and --lora_vision_tower as it was trained"
        )
    state = model.state_dict(keep_vars=True)
    for name, value in given.items():
        names[name].copy_(value)
    for name, value in part.weights.items():
        if name not in state or state[name].shape != value.shape:
            raise UserInputError(
                f"{str(folder)!r} holds {name!r} of shape {list(value.shape)}, for which this "
                "model has no place; give a LoRA that was trained on it"
            )
        state[name].copy_(value)
