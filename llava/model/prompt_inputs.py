"""What prompts say of their images: their room, their places, and what is asked about them.

Methods that choose tokens by the question name what they read of it in `needs` or `wants`; nothing
else is computed.
"""

import logging
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from llava.constants import IMAGE_TOKEN_INDEX, OPTION_LETTER, SHORT_ANSWER, UNANSWERABLE
from llava.model.call_context import call_context
from llava.model.checks import check_questions
from llava.model.multimodal_encoder.clip_text import has_text_tower, text_tower_of
from llava.model.splice import share_images
from llava.model.types import VisualModel
from llava.model.vision_inputs import tower_of
from llava.pruning.config import PruningConfig
from llava.pruning.precision import outside_autocast
from llava.pruning.tokens import Prompt, VisualTokens
from llava.utils import UserInputError

logger = logging.getLogger(__name__)

# Extras of VisualTokens that come from the question.
QUESTION_EXTRAS = ("clip_image", "clip_text", "question_embeddings")

# What LLaVA's evaluation prompts say of the form of the answer, not of the image.
ANSWER_FORMATS = (SHORT_ANSWER, OPTION_LETTER, UNANSWERABLE)

# Our own list: words that name nothing in an image.
_CONTENT_STOP_WORDS = """
a about all also am an and any are as at be been being both but by can could did do does doing each
for from had has have having he her here hers him his how i if in into is it its me my no nor not of
on or our ours please she should so some such than that the their theirs them then there these they
this those to too us very was we were what when where which while who whom whose why will with would
you your yours
"""
CONTENT_STOP_WORDS = frozenset(_CONTENT_STOP_WORDS.split())

# The released list has 47 words. Recorded questions show what is in it (a answer are at how is it
# or question the what when which who with you) and what is not (can in me no of on s than there
# this yes); the other words are inferred.
_RELEASE_STOP_WORDS = """
a an and answer are at be been being but by could did do does for had has have he how i is it may
might must or question she should the they to was we were what when where which who why will with
would you
"""
RELEASE_STOP_WORDS = frozenset(_RELEASE_STOP_WORDS.split())


def add_prompts(
    model: VisualModel, visual: VisualTokens, rows: Sequence[torch.Tensor]
) -> VisualTokens:
    """Add what the prompts say of their images: room, place and, if it is read, the question.

    Args:
        model: a LLaVA.
        visual: encoded images in the order of the marks.
        rows: ids of every prompt, padding removed.

    Raises:
        UserInputError: another number of images than marks, or questions that are missing.
    """
    shares = share_images(rows, visual.num_images)
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    texts = [int((row != IMAGE_TOKEN_INDEX).sum()) for row in rows]
    prompts = [
        Prompt(tuple(share), text, limit)
        for row, share, text in zip(rows, shares, texts, strict=True)
        if limit is not None and text < len(row)
    ]
    if visual.extras:
        places = [place for share in shares for place in range(len(share))]
        visual = visual.with_extras({"image_position": places})
    visual = replace(visual, prompts=tuple(prompts), shares=tuple(shares))
    config = model.pruning
    if config is None or not needed_of_question(config, tower_of(model)):
        return visual
    questions = current_questions(len(rows), config.method)
    of_images = [questions[row] for row, share in enumerate(shares) for _ in share]
    return add_questions(model, visual, of_images)


def current_questions(rows: int, method: str) -> Sequence[str]:
    """Return the questions of `rows` prompts that the caller asks.

    Raises:
        UserInputError: none were given, or something else than a text that is not blank for each.
    """
    questions = call_context().questions
    if questions is None:
        raise UserInputError(
            f"pruning method {method!r} reads the question, and a prompt does not say which part "
            "of it that is: pass questions=[...] to generate, one text for each prompt without "
            "template and system text (elsewhere: `with llava.model.call_context.asking([...])`)"
        )
    check_questions(questions, rows, "prompts")
    return questions


def needed_of_question(config: PruningConfig | None, tower: Any) -> set[str]:
    """Return which of QUESTION_EXTRAS a setting reads and can have with this tower (or None)."""
    if config is None:
        return set()
    needs, wants = (
        set(names) & set(QUESTION_EXTRAS) for names in (config.pruner.needs, config.pruner.wants)
    )
    has_text = bool(wants) and tower is not None and has_text_tower(tower)
    return needs | wants if has_text else needs


@outside_autocast()
def add_questions(
    model: VisualModel, visual: VisualTokens, questions: Sequence[str]
) -> VisualTokens:
    """Add what the active setting reads of the questions, one for each image.

    Raises:
        UserInputError: another number of questions than images, or the model lacks the text tower
            or the tokenizer.
    """
    config, tower = model.pruning, tower_of(model)
    needs = needed_of_question(config, tower)
    if config is None or not needs:
        return visual
    check_questions(questions, visual.num_images, "images")
    own = question_extras(
        needs, config, visual, tower, questions, lambda words: _word_embeddings(model, words)
    )
    return replace(visual, extras={**visual.extras, **own})


def question_extras(
    needs: Collection[str],
    config: PruningConfig,
    visual: Any,
    tower: Any,
    questions: Sequence[str],
    embed_words: Callable[[str], torch.Tensor],
) -> dict[str, list[torch.Tensor]]:
    """Return what is read of the questions, one entry for each image.

    Args:
        needs: some of QUESTION_EXTRAS.
        config: the setting that reads them.
        visual: the encoded images.
        tower: their vision tower, for what its text tower gives.
        questions: one for each image.
        embed_words: returns the language model's embeddings [m, D] of a text.

    Raises:
        UserInputError: the text tower cannot be loaded.
    """
    extras: dict[str, list[torch.Tensor]] = {}
    if "clip_image" in needs:
        text = text_tower_of(tower)
        extras["clip_image"] = [text.embed_patches(tower, tile) for tile in visual.features]
    if "clip_text" in needs:
        text = text_tower_of(tower)
        # The one sentence that CDPruner's code removes.
        words = [without_answer_format(question, (SHORT_ANSWER,)) for question in questions]
        extras["clip_text"] = [text.encode(question) for question in words]
    if "question_embeddings" in needs:
        rule = config.pruner.keyword_rule
        words = [keywords(question, rule) for question in questions]
        extras["question_embeddings"] = [embed_words(text) for text in words]
    return extras


def _word_embeddings(model: VisualModel, words: str) -> torch.Tensor:
    """Return the language model's embeddings [m, D] of the m tokens of a text."""
    if model.text_tokenizer is None:
        raise UserInputError(
            "the active pruning method reads the question's words and the model knows no "
            "tokenizer; load it with load_pretrained_model from a folder with one, or set "
            "model.text_tokenizer"
        )
    ids = model.text_tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    embed = model.get_model().embed_tokens
    return embed(torch.tensor(ids, dtype=torch.long, device=embed.weight.device)).detach()


def without_answer_format(question: str, formats: Sequence[str] = ANSWER_FORMATS) -> str:
    """Remove sentences about the form of the answer."""
    for sentence in formats:
        question = question.replace(sentence, "")
    return question.strip()


def keywords(question: str, rule: str = "release") -> str:
    """Return the words of a question that a picture is searched for, in their order.

    Args:
        question: the user's words.
        rule: `release`, as in MMTok's code: two sentences about the form of the answer and stop
            words go, words end at apostrophes and hyphens; where nothing is left, the question
            without those sentences, perhaps "". `content`: more sentences and far more stop
            words go, `cat's` and `left-hand` are words; where nothing is left, all of the
            question.
    """
    if rule == "release":
        asked = without_answer_format(question, (SHORT_ANSWER, OPTION_LETTER))
        pattern, stop_words, otherwise = r"\b\w+\b", RELEASE_STOP_WORDS, asked
    else:
        asked = without_answer_format(question)
        pattern, stop_words = r"[^\W_]+(?:['’-][^\W_]+)*", CONTENT_STOP_WORDS
        otherwise = question.strip()
    words = re.findall(pattern, asked)
    kept = " ".join(word for word in words if word.lower() not in stop_words)
    logger.debug("keywords of %r: %r", question, kept)
    return kept or otherwise
