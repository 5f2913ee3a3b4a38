"""Small checkpoints as users have them, single changes of their files, and their answers."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers import LlavaConfig as TheirLlavaConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model

VISION = {
    **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
}
TEXT = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
}
# What the released LLaVA-1.5 has besides the sizes.
OLD_KEYS = {
    "_name_or_path": "./checkpoints/llava-v1.5-7b",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "max_length": 4096,
    "max_sequence_length": 2048,
    "mm_conv_mode": None,
    "mm_next_protocol": "native",
    "mm_patch_merge_type": "flat",
    "mm_resampler_type": None,
    "mm_token_pruning": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "torch_dtype": "float32",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "unfreeze_mm_vision_tower": False,
    "use_mm_proj": True,
}
TILES = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
    "mm_patch_merge_type": "spatial_unpad",
    "unfreeze_mm_vision_tower": True,
}
STEPS = {f"do_{step}": True for step in ("convert_rgb", "normalize", "rescale", "resize")}
CLIP_PIXELS = {
    **STEPS,
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 28},
}
SIGLIP_PIXELS = {
    **STEPS,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 28, "width": 28},
}
# That of vicuna, which the first LLaVAs took over.
ANSWERS = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "do_sample": False,
    "eos_token_id": 2,
    "max_length": 4096,
    "num_beams": 1,
    "pad_token_id": 0,
    "temperature": 0.9,
    "top_p": 0.6,
    "transformers_version": "4.31.0",
}
DELETE = object()
_ROWS, _COLUMNS = np.mgrid[0:40, 0:56]
PICTURE = Image.fromarray(
    np.stack([_COLUMNS * 4, _ROWS * 6, (_COLUMNS + _ROWS) * 2], -1).astype(np.uint8)
)
PROMPT = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 9, 7]])


class Change(NamedTuple):
    """One changed key of a JSON file; `how` names the change in tables of what it must do."""

    path: tuple[str, ...]
    how: str
    value: Any

    @property
    def key(self) -> str:
        return ".".join(self.path)

    def apply(self, data: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(data)
        inner = changed
        for name in self.path[:-1]:
            inner = inner[name]
        if self.value is DELETE:
            del inner[self.path[-1]]
        else:
            inner[self.path[-1]] = self.value
        return changed


FIXED: dict[str, Any] = {
    **{"delete": DELETE, "null": None, "-1": -1, "0": 0, "1": 1, "huge": 10**12},
    **{"0.5": 0.5, "-0.5": -0.5, "text": "x", "empty": "", "true": True, "false": False},
    **{"[]": [], "{}": {}, "[1]": [1], "mapping": {"a": 1}, "nan": float("nan")},
    **{"inf": float("inf")},
}


def changes(data: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[Change]:
    """Every key of a JSON object, nested ones too, with every value of the list above and others
    that are made of its own: as text, in a list, as a float, one more, twice as much."""
    for name, value in data.items():
        here = (*path, name)
        made = {"as text": str(value), "in a list": [value]}
        if type(value) is int:
            made |= {"as float": float(value), "more": value + 1, "double": value * 2}
        for how, new in {**FIXED, **made}.items():
            if type(new) is not type(value) or new != value:
                yield Change(here, how, new)
        if isinstance(value, dict) and value:
            yield from changes(value, here)


class Answer(NamedTuple):
    """What a checkpoint makes of the picture: pixels, first scores and three tokens."""

    pixels: torch.Tensor
    scores: torch.Tensor
    tokens: list[list[int]]
    context: int

    def equals(self, other: Answer) -> bool:
        tensors = zip(self[:2], other[:2], strict=True)
        return all(torch.equal(a, b) for a, b in tensors) and self[2:] == other[2:]


def answer(folder: Path, **arguments: Any) -> Answer:
    """Load a checkpoint, show it the picture and ask for three tokens."""
    _, model, processor, context = load_pretrained_model(str(folder), device="cpu")
    pixels = process_images([PICTURE], processor, model.config)
    shown = {"images": pixels, "image_sizes": [PICTURE.size]}
    with torch.no_grad():
        scores = model(PROMPT, **shown).logits[0, -1]
    torch.manual_seed(0)  # where a setting makes it draw
    tokens = model.generate(PROMPT, **shown, max_new_tokens=3, **arguments)
    return Answer(pixels, scores, tokens.tolist(), context)


def write(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data))


def _noisy(model: torch.nn.Module) -> Any:
    # The default initialisation is so small that answers would hardly depend on the picture.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def native(folder: Path, tiles: bool = False, siglip: bool = False) -> None:
    """A LLaVA-1.5, or with `tiles` a 1.6 that holds its tower's weights; the tower in a folder."""
    torch.manual_seed(1)
    tower = folder / "tower"
    if siglip:
        _noisy(SiglipVisionModel(SiglipVisionConfig(**VISION))).save_pretrained(tower)
    else:
        CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tower)
    write(tower / "preprocessor_config.json", SIGLIP_PIXELS if siglip else CLIP_PIXELS)
    settings = {
        "mm_vision_tower": str(tower),
        "mm_hidden_size": 16,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
    }
    kind = TILES if tiles else {}
    model = _noisy(LlavaLlamaForCausalLM(LlavaConfig(**TEXT, **settings, **kind)))
    model.get_vision_tower().load_model()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "dtype", "head_dim", "mlp_bias"):  # younger than LLaVA-1.5
        del config[name]
    released = {"model_type": "llava", "mm_vision_tower": "tower"}
    write(folder / "config.json", {**config, **OLD_KEYS, **kind, **released})
    write(folder / "generation_config.json", ANSWERS)
    if tiles:
        (tower / "model.safetensors").unlink()


def converted(folder: Path, tiles: bool = False) -> None:
    """A LLaVA in Hugging Face's format, as transformers saves it now."""
    parts = {
        "text_config": LlamaConfig(**{**TEXT, "num_key_value_heads": 2}),
        "vision_config": CLIPVisionConfig(**VISION),
        "image_token_id": 60,
    }
    torch.manual_seed(4)
    if tiles:
        config = LlavaNextConfig(**parts, image_grid_pinpoints=[[28, 84], [56, 28], [56, 56]])
        model = _noisy(LlavaNextForConditionalGeneration(config))
    else:
        model = _noisy(LlavaForConditionalGeneration(TheirLlavaConfig(**parts, image_seq_length=4)))
    model.save_pretrained(folder)
    write(folder / "preprocessor_config.json", CLIP_PIXELS)
    write(folder / "generation_config.json", ANSWERS)


def saved_now(folder: Path) -> None:
    """A LLaVA-1.5 as this package saves it, without settings of answers in a file of their own."""
    native(folder / "old")
    load_pretrained_model(str(folder / "old"), device="cpu")[1].save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    shutil.rmtree(folder / "old")


CHECKPOINTS = {
    "llava-1.5": native,
    "llava-1.6": lambda folder: native(folder, tiles=True),
    "siglip": lambda folder: native(folder, siglip=True),
    "saved now": saved_now,
    "llava-hf": converted,
    "llava-next-hf": lambda folder: converted(folder, tiles=True),
}
