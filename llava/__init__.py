"""LLaVA with visual token pruning.

Importing the package is cheap: the model class is resolved on first access, so tools that need
only constants or prompts do not pay for torch and transformers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

__version__ = "0.1.0"
__all__ = ["LlavaLlamaForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LlavaLlamaForCausalLM":
        from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

        return LlavaLlamaForCausalLM
    raise AttributeError(f"module 'llava' has no attribute {name!r}")
