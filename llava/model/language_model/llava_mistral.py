"""LLaVA on a Mistral language model."""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
)

from llava.model.language_model.llava_causal_lm import LlavaCausalLM, LlavaConfigMixin
from llava.model.llava_arch import LlavaMetaModel


class LlavaMistralConfig(LlavaConfigMixin, MistralConfig):
    """Mistral's config plus LLaVA's `mm_*` keys."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """Mistral with a vision tower and a projector."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaCausalLM, MistralForCausalLM):  # type: ignore[misc]
    """A Mistral that reads images."""

    config_class = LlavaMistralConfig
    base_type = "mistral"
    inner_class = LlavaMistralModel
    _no_split_modules = ["MistralDecoderLayer", *LlavaCausalLM.undivided]  # noqa: RUF012


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
