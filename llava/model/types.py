"""What the parts of the pipeline take: images in every form, and a model that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from llava.pruning.config import PruningConfig

if TYPE_CHECKING:
    from llava.model.multimodal_encoder.vision_tower import VisionTower

# [B, 3, H, W], [B, T, 3, H, W], or a list of [3, H, W] or [T, 3, H, W]; features of the tower that
# were computed before as [B, N, C] or a list of [N, C].
Images = torch.Tensor | list[torch.Tensor]


class VisualModel(Protocol):
    """A causal language model that reads images: what `LlavaMetaForCausalLM` makes of one.

    Attributes:
        config: the language model's, with LLaVA's `mm_*` keys.
        pruning: the setting that counts for the caller.
        text_tokenizer: the language model's tokenizer, for methods that read the question.
    """

    config: Any
    text_tokenizer: Any
    generation_config: Any

    device: torch.device

    @property
    def pruning(self) -> PruningConfig | None: ...

    def get_model(self) -> Any:
        """Return the layers of the language model, which own `vision_tower` and `mm_projector`."""

    def get_vision_tower(self) -> VisionTower | None: ...

    def encode_images(self, images: torch.Tensor) -> torch.Tensor: ...

    def own_encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Do what `encode_images` does where nothing has replaced it."""


class GenerativeModel(VisualModel, Protocol):
    """A model that also answers."""

    def generate(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any: ...
