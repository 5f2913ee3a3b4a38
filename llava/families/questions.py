"""What methods read of the question that a prompt asks about its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.model.multimodal_encoder.clip_text import has_text_tower
from llava.model.prompt_inputs import current_questions, question_extras
from llava.model.prompt_inputs import needed_of_question as needed_by_setting
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.precision import outside_autocast

if TYPE_CHECKING:
    from llava.families.family import Family


def needed_of_question(family: Family, model: Any, config: PruningConfig | None) -> set[str]:
    """Return which of QUESTION_EXTRAS a setting reads and can have of this model."""
    return needed_by_setting(config, family.text_tower(model))


@outside_autocast()
@torch.no_grad()
def add_questions(
    family: Family, model: Any, visual: Any, rows: Sequence[int], prompts: int
) -> Any:
    """Add what the active setting reads of the questions.

    Args:
        family: of the model.
        model: its setting counts.
        visual: encoded images.
        rows: the row of every image.
        prompts: how many rows there are.

    Raises:
        UserInputError: questions that are missing, or a model that lacks the text tower or the
            tokenizer.
    """
    config, tower = family.attachment(model).pruning, family.text_tower(model)
    needs = needed_of_question(family, model, config)
    if config is None or not needs:
        return visual
    if needs & {"clip_image", "clip_text"} and (tower is None or not has_text_tower(tower)):
        raise _no_text_tower(model, config)
    asked = current_questions(prompts, config.method)
    questions = [asked[row] for row in rows]
    return visual.with_extras(
        question_extras(
            needs,
            config,
            visual,
            tower,
            questions,
            lambda words: _word_embeddings(family, model, words),
        )
    )


def _no_text_tower(model: Any, config: PruningConfig) -> PruningError:
    """Return the error for methods that need the text tower of a model whose is not known."""
    vision = model.config.vision_config
    cure, name = "use a setting", getattr(vision, "_name_or_path", "")
    if vision.model_type == "clip_vision_model":
        cure = (
            "set model.config.vision_config._name_or_path to the complete CLIP model that its "
            f"vision tower was taken from{f' (it is {name!r})' if name else ''}, or use a setting"
        )
    return PruningError(
        f"method {config.method!r} compares images with CLIP's text tower, which "
        f"{type(model).__name__} does not come with; {cure} that reads no question, such as "
        "cdpruner with relevance=none"
    )


def _word_embeddings(family: Family, model: Any, words: str) -> Tensor:
    """Return the language model's embeddings [m, D] of the m tokens of a text."""
    tokenizer = getattr(model, "text_tokenizer", None)
    if tokenizer is None:
        raise PruningError(
            "the active pruning method reads the question's words and the model knows no "
            "tokenizer; set model.text_tokenizer = processor.tokenizer"
        )
    ids = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    return family.embed(model, torch.tensor([ids], dtype=torch.long, device=model.device))[0]
