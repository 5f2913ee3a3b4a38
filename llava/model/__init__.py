"""LLaVA models; import errors surface as they are."""

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
]
