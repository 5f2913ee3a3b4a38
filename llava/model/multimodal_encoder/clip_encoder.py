"""The CLIP vision tower of LLaVA-1.5 and 1.6."""

from typing import Any, ClassVar

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.model.multimodal_encoder.vision_tower import VisionTower


class CLIPVisionTower(VisionTower):
    """CLIP up to the layer whose output LLaVA uses; its class token is not a patch."""

    family: ClassVar[str] = "CLIP"
    kinds: ClassVar[tuple[str, ...]] = ("clip", "clip_vision_model")
    model_class: ClassVar[Any] = CLIPVisionModel
    config_class: ClassVar[Any] = CLIPVisionConfig
    processor_class: ClassVar[Any] = CLIPImageProcessorPil
    has_class_token: ClassVar[bool] = True
    crops_centre: ClassVar[bool] = True

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vision_tower.pre_layrnorm(self.vision_tower.embeddings(pixels))
