"""The tiny LLaVA-1.5 of the goldens, fresh for every test that may change it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model

GOLDENS = Path(__file__).parents[1] / "goldens" / "llava"
CHECKPOINT = GOLDENS / "checkpoints" / "llava15-tiny"
TOWER = GOLDENS / "checkpoints" / "clip-tiny-patch14-336"


@pytest.fixture
def tiny() -> LlavaLlamaForCausalLM:
    return load_pretrained_model(str(CHECKPOINT), device="cpu")[1]


@pytest.fixture
def pixels() -> Callable[..., torch.Tensor]:
    """``pixels(n, seed=0)``: float32 [n, 3, 336, 336]."""

    def make(count: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, 336, 336, generator=generator)

    return make


@pytest.fixture
def open_image() -> Callable[[str], Image.Image]:
    return lambda name: Image.open(GOLDENS / "images" / name).convert("RGB")


def small_tower(folder: Path, **changes: object) -> CLIPVisionModel:
    """Save a random CLIP tower: 28 pixels, 4 patches, 3 layers."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(1)
    tower = CLIPVisionModel(CLIPVisionConfig(**{**sizes, **changes})).eval()
    tower.save_pretrained(folder)
    return tower


def small_model(tower: str | Path, **changes: object) -> LlavaLlamaForCausalLM:
    """A random LLaVA of 2 layers over a tower made by ``small_tower``."""
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
    model.get_vision_tower().load_model()
    return model
