"""The SigLIP vision tower (arXiv 2303.15343) of later models of LLaVA's form."""

from typing import Any, ClassVar

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava.model.multimodal_encoder.vision_tower import VisionTower


class SiglipVisionTower(VisionTower):
    """SigLIP up to the layer whose output LLaVA uses. It has no class token: all are patches.

    So `mm_vision_select_feature` changes nothing, and methods that ask for the attention of the
    class token get the attention that patches receive, see `readings`.
    """

    family: ClassVar[str] = "SigLIP"
    kinds: ClassVar[tuple[str, ...]] = ("siglip", "siglip_vision_model")
    model_class: ClassVar[Any] = SiglipVisionModel
    config_class: ClassVar[Any] = SiglipVisionConfig
    processor_class: ClassVar[Any] = SiglipImageProcessorPil
    has_class_token: ClassVar[bool] = False
    crops_centre: ClassVar[bool] = False

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vision_tower.embeddings(pixels)
