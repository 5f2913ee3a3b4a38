"""Recorded runs of official programs: their inputs, their outputs, and our way through a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from recorded_pixels import skip_unless_reproducible
from safetensors.torch import load_file
from torch import Tensor, nn

from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, VisualTokens, prune, prune_visual_tokens

GOLDENS = Path(__file__).parents[1] / "goldens"


def cases(method: str, *patterns: str) -> list[str]:
    """`method/case` of every recorded case that fits one of the patterns; at least one each."""
    found = [sorted((GOLDENS / "pruners" / method).glob(pattern)) for pattern in patterns]
    assert all(found), f"no recorded case of {method} fits one of {patterns}"
    return [f"{method}/{path.name}" for group in found for path in group]


class Official:
    """One recorded case: `about` it, `inputs` in `dtype`, `outputs` as stored."""

    def __init__(self, name: str, dtype: torch.dtype | None = None) -> None:
        folder = GOLDENS / "pruners" / name
        self.about = json.loads((folder / "case.json").read_text())
        self.inputs, self.outputs = (
            load_file(file) if (file := folder / f"{side}.safetensors").exists() else {}
            for side in ("inputs", "outputs")
        )
        if dtype is not None:
            self.inputs = {
                key: value.to(dtype) if value.is_floating_point() else value
                for key, value in self.inputs.items()
            }

    def embeds(
        self,
        config: PruningConfig,
        settings: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        word_ids: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D]: what the recorded checkpoint's language model reads under `config`.

        Args:
            config: what to prune by.
            settings: of the model's config, beside the checkpoint's own.
            dtype: the model's precision.
            word_ids: the tokens of the question's words, for methods that read them.
        """
        path = GOLDENS / "llava" / self.about["checkpoint"]
        model = load_pretrained_model(str(path), device="cpu", **settings)[1].to(dtype)
        tiled = model.config.image_aspect_ratio == "anyres"
        skip_unless_reproducible(self.about["images"], in_tiles=tiled)
        images = [Image.open(GOLDENS / "llava" / file) for file in self.about["images"]]
        sizes = [image.size for image in images]
        pixels = process_images(images, model.get_vision_tower().image_processor, model.config)
        given = [p.to(dtype) for p in pixels] if isinstance(pixels, list) else pixels.to(dtype)
        with torch.no_grad(), prune(model, config):
            visual = model.encode_visual_tokens(given, sizes)
            if word_ids is not None:
                words = model.get_input_embeddings()(word_ids)
                visual.extras["question_embeddings"] = [words] * len(images)
            visual = model.prune_visual_tokens(visual)
            return model.splice_visual_tokens(visual, self.inputs["input_ids"])[2]


def given_tiles(features: Tensor, **extras: Tensor) -> VisualTokens:
    """Tiles [T, N, C] of an image each, with what was read of them: tensors [T, ...]."""
    tiles, count = features.shape[:2]
    side = round(count**0.5)
    return VisualTokens(
        features,
        features.clone(),
        nn.Identity(),
        torch.arange(tiles),
        (side, side),
        extras={name: list(values) for name, values in extras.items()},
    )


def kept_mask(visual: VisualTokens, config: PruningConfig) -> Tensor:
    """BoolTensor [T, N]: what every tile keeps."""
    kept = prune_visual_tokens(visual, config).kept
    assert kept is not None
    mask = torch.zeros(visual.projected.shape[:2], dtype=torch.bool)
    return mask.scatter(1, kept, True)
