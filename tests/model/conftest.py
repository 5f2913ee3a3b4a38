"""Small LLaVA-1.5 and 1.6 models, fresh for every test that may change them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model

CHECKPOINTS = Path(__file__).parents[1] / "goldens" / "llava" / "checkpoints"


@pytest.fixture
def tiny_folder() -> Path:
    """Recorded checkpoint without tower weights; its tower lies in the folder next to it."""
    return CHECKPOINTS / "llava15-tiny"


@pytest.fixture
def tiny(tiny_folder: Path) -> LlavaLlamaForCausalLM:
    return load_pretrained_model(str(tiny_folder), device="cpu")[1]


@pytest.fixture
def pixels() -> Callable[..., torch.Tensor]:
    """`pixels(n, side=336, seed=0)`: float32 [n, 3, side, side]."""

    def make(count: int, side: int = 336, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, side, side, generator=generator)

    return make


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture
def small_tower() -> Callable[..., CLIPVisionModel]:
    """`small_tower(folder)`: save a random CLIP tower of 28 pixels, 4 patches, 3 layers."""

    def make(folder: Path, **changes: object) -> CLIPVisionModel:
        torch.manual_seed(1)
        tower = CLIPVisionModel(CLIPVisionConfig(**{**SIZES, **changes})).eval()
        tower.save_pretrained(folder)
        return tower

    return make


@pytest.fixture
def small_siglip() -> Callable[..., SiglipVisionModel]:
    """`small_siglip(folder)`: save a random SigLIP tower of the same sizes, no class token."""

    def make(folder: Path, **changes: object) -> SiglipVisionModel:
        torch.manual_seed(1)
        tower = SiglipVisionModel(SiglipVisionConfig(**{**SIZES, **changes})).eval()
        with torch.no_grad():  # the default initialisation hardly tells patches apart
            for parameter in tower.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        tower.save_pretrained(folder)
        return tower

    return make


@pytest.fixture
def small_model(tmp_path: Path, small_tower: Callable) -> Callable[..., LlavaLlamaForCausalLM]:
    """`small_model(**config changes)`: a random model of 2 layers over a small tower."""

    def make(**changes: object) -> LlavaLlamaForCausalLM:
        tower = tmp_path / "tower"
        if not tower.exists():
            small_tower(tower)
        settings = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "pad_token_id": 0,
            "mm_vision_tower": str(tower),
            "mm_hidden_size": 16,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_patch_token": False,
        }
        torch.manual_seed(2)
        model = LlavaLlamaForCausalLM(LlavaConfig(**{**settings, **changes})).eval()
        # The default initialisation is so small that logits would hardly depend on the images.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        if model.get_vision_tower() is not None:
            model.get_vision_tower().load_model()
        return model

    return make


@pytest.fixture
def small_next(small_model: Callable) -> Callable[..., LlavaLlamaForCausalLM]:
    """`small_next(**config changes)`: a random LLaVA-1.6 with tiles of 28 pixels, 4 patches."""

    def make(**changes: object) -> LlavaLlamaForCausalLM:
        settings = {
            "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
            "mm_patch_merge_type": "spatial_unpad",
            "tokenizer_padding_side": "right",
        }
        return small_model(**{**settings, **changes})

    return make
