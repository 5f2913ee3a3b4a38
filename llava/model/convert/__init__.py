"""LLaVA's own checkpoints as Hugging Face's, and back: `llava convert`."""

from llava.model.convert.conversion import FORMS, convert

__all__ = ["FORMS", "convert"]
