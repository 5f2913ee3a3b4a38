"""LLaVA on a Llama language model."""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from llava.model.language_model.llava_causal_lm import LlavaCausalLM, LlavaConfigMixin
from llava.model.llava_arch import LlavaMetaModel


class LlavaConfig(LlavaConfigMixin, LlamaConfig):
    """Llama's config plus LLaVA's `mm_*` keys."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Llama with a vision tower and a projector."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaCausalLM, LlamaForCausalLM):  # type: ignore[misc]
    """A Llama that reads images."""

    config_class = LlavaConfig
    base_type = "llama"
    inner_class = LlavaLlamaModel
    _no_split_modules = ["LlamaDecoderLayer", *LlavaCausalLM.undivided]  # noqa: RUF012


AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
