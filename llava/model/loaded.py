"""The model under test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava.command_line import check_complete, check_conv_mode
from llava.conversation import conv_mode_for
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig


@dataclass(frozen=True)
class Subject:
    """The model under test with what it takes to prompt it.

    `own_pruning` is the setting that its checkpoint was saved with. The model itself carries none:
    every arm brings its own.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    template: str
    own_pruning: PruningConfig | None = None


def load_subject(
    path: str,
    device: str,
    *,
    base: str | None = None,
    conv_mode: str | None = None,
    **loading: Any,
) -> Subject:
    """A checkpoint with its prompt template, pruning switched off.

    Args:
        path, base: as in `load_pretrained_model`.
        device: likewise.
        conv_mode: conversation template; by default the model's own.
        **loading: more arguments of `load_pretrained_model`, such as `load_4bit` or `dtype`.

    Raises UserInputError for what cannot be loaded or asked.
    """
    check_conv_mode(conv_mode)
    name = get_model_name_from_path(str(path))
    tokenizer, model, processor, _ = load_pretrained_model(
        str(path), base, name, device=device, **loading
    )
    check_complete(path, tokenizer, processor)
    own, model.pruning = model.pruning, None
    template = conv_mode or conv_mode_for(name, model.config)
    return Subject(model.eval(), tokenizer, processor, template, own)
