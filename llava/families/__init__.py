"""Models of other libraries that are pruned as they are: one file for each family of classes.

    image -> the model's own vision side (read by `capture`) -> VisualTokens -> prune_visual_tokens
          -> `prompts` (shorter prompt, embeddings, positions) -> the model's own language model

`family.Family` is what a file of this package fills in, `attachment` puts it between a caller and a
model.

`contract.VisionLanguageModel` is what everything above knows of a model of any family, LLaVA's own
classes included; `load` makes one of any checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava.families.contract import VisionLanguageModel

__all__ = ["load"]


def load(
    path: str, device: str = "auto", dtype: str | None = None, **more: Any
) -> VisionLanguageModel:
    """Load a checkpoint of any family, LLaVA's own format included, with pruning switched off.

    Args:
        path: checkpoint folder or hub name.
        device: auto, cpu, cuda, cuda:1, mps, ...
        dtype: float16, bfloat16 or float32; by default as in
            `llava.families.checkpoints.load_checkpoint`.
        **more: other fields of `llava.families.spec.ModelSpec`, such as `load_4bit`.

    Returns:
        The model with its tokenizer, image processor and template. Its `own_pruning` is the setting
        that it was saved with.

    Raises:
        UserInputError: what cannot be loaded, or asked about a picture.
    """
    from llava.families.spec import ModelSpec  # `llava.model` imports this package

    return ModelSpec(path, device=device, dtype=dtype, **more).load()
