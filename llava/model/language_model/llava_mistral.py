"""LLaVA on a Mistral language model."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
)

from llava.model.language_model.llava_llama import LlavaCausalLM, LlavaConfigMixin
from llava.model.llava_arch import LlavaMetaModel


class LlavaMistralConfig(LlavaConfigMixin, MistralConfig):
    """Mistral's config plus LLaVA's ``mm_*`` keys."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """Mistral with a vision tower and a projector."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaCausalLM, MistralForCausalLM):
    """A Mistral that reads images."""

    config_class = LlavaMistralConfig
    base_type = "mistral"
    _no_split_modules = [  # noqa: RUF012
        *("MistralDecoderLayer", "CLIPVisionTower", "SiglipVisionTower")
    ]

    def __init__(self, config: LlavaMistralConfig) -> None:
        super(MistralForCausalLM, self).__init__(config)
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
