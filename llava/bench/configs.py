"""LLaVA models of known shapes with random weights, built where they run and as they run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig
from transformers.initialization import no_init_weights

from llava.model.checkpoint import read_json_object
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.registry import unknown
from llava.shipped import LLAVA_TINY, shipped_path
from llava.utils import UserInputError

# Standard deviation of all random weights: that of Llama and CLIP.
STD = 0.02
# Where the tower's files are looked for, so that nobody asks a hub for a model called random.
_NO_FILES = str(Path(__file__).parent)
# Weights repeat a block of this many random numbers, because drawing billions takes minutes.
BLOCK = 2**20

_CLIP_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_LLAVA = {
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
}
_VICUNA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    **_LLAVA,
}
_VICUNA_13B = {
    **_VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_ONE_TILE = {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}
# Five tiles without newlines: 2,880 tokens, as papers count an image of LLaVA-1.6.
_FIVE_TILES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "mm_next_protocol": "fixed2880",
}


@dataclass(frozen=True)
class Shape:
    """A model as the bench builds it.

    Attributes:
        language: arguments of `LlavaConfig`.
        tower: arguments of transformers' `CLIPVisionConfig`.
        tiles: tiles of an image.
        budgets: tokens to keep where the user names none.
    """

    language: dict[str, Any]
    tower: dict[str, Any] = field(default_factory=lambda: dict(_CLIP_LARGE))
    tiles: int = 1
    budgets: tuple[int, ...] = (64, 128, 192)


# As deep as Vicuna-7B and an eighth as wide: what is dropped between layers needs them all, and all
# of a 7B's take minutes a prompt on a CPU.
DEEP = "deep-narrow"
_NARROW = {
    **_VICUNA_7B,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "mm_hidden_size": 256,
}
_NARROW_TOWER = {
    **_CLIP_LARGE,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
_NEXT_BUDGETS = (160, 320, 640)
SHAPES = {
    "llava-1.5-7b": Shape({**_VICUNA_7B, **_ONE_TILE}),
    "llava-1.5-13b": Shape({**_VICUNA_13B, **_ONE_TILE}),
    "llava-next-7b": Shape({**_VICUNA_7B, **_FIVE_TILES}, tiles=5, budgets=_NEXT_BUDGETS),
    DEEP: Shape({**_NARROW, **_ONE_TILE}, _NARROW_TOWER),
}
NAMES = (*SHAPES, LLAVA_TINY)


def shape_of(name: str) -> Shape:
    """Return the shape of a model by its name; llava-tiny's is read from its folder.

    Raises:
        UserInputError: an unknown name.
    """
    if name != LLAVA_TINY:
        if name not in SHAPES:
            raise UserInputError(unknown("--config", name, NAMES))
        return SHAPES[name]
    folder = shipped_path(LLAVA_TINY)
    language = read_json_object(folder / "config.json")
    tower = read_json_object(folder / language.pop("mm_vision_tower") / "config.json")
    for config in (language, tower):
        for key in ("architectures", "model_type", "dtype", "transformers_version"):
            config.pop(key, None)
    return Shape(language, tower)


def build_random(
    shape: Shape, *, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> LlavaLlamaForCausalLM:
    """Build a model of random weights, the same ones whenever it is built on a kind of device.

    Every weight is made on `device` in `dtype`: nothing is converted or moved. No global random
    generator is used.

    Args:
        shape: of the model.
        device: where it runs.
        dtype: of its weights.
        layers: decoder layers; by default as many as the shape has.
    """
    settings = dict(shape.language)
    if layers is not None:
        settings["num_hidden_layers"] = layers
    tower_config = CLIPVisionConfig(**shape.tower)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    moved = [device] if device.type == "cuda" else []
    try:
        # CLIP draws its class token whatever is asked for.
        with torch.device(device), no_init_weights(), torch.random.fork_rng(moved):
            model = LlavaLlamaForCausalLM(LlavaConfig(**settings))
            inner, config = model.get_model(), model.config
            inner.vision_tower = CLIPVisionTower("random", config, True, source=_NO_FILES)
            inner.vision_tower.build(tower_config)
            inner.mm_projector = build_vision_projector(config)
            config.mm_vision_tower = "random"
            if "unpad" in config.mm_patch_merge_type:
                inner.image_newline = nn.Parameter(torch.empty(config.hidden_size))
    finally:
        torch.set_default_dtype(before)
    fill_random(model, device)
    model.eval()  # weights keep requires_grad, as loaded ones do: torch chooses kernels by it
    model.text_tokenizer = word_ids
    return model


def fill_random(model: nn.Module, device: torch.device) -> None:
    """Fill matrices with N(0, STD^2); norms become the identity and biases zero."""
    generator = torch.Generator(device).manual_seed(0)
    block = torch.randn(BLOCK, generator=generator, device=device) * STD
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                _repeat(block.to(parameter.dtype), parameter)
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("weight"):
                parameter.fill_(1)
            else:  # an embedding: CLIP's class token, the newline
                _repeat(block.to(parameter.dtype), parameter)


def _repeat(block: Tensor, parameter: Tensor) -> None:
    """Fill a parameter with a block again and again, one short of it so that rows differ."""
    flat, step = parameter.view(-1), len(block) - 1
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        part.copy_(block[: len(part)])


def word_ids(text: str, **_: Any) -> dict[str, list[int]]:
    """Give every word of a text an id, for methods that read the words of a question."""
    return {"input_ids": [3 + sum(word.encode()) % 200 for word in text.split()]}
