"""Strict generation: every row of a batch exactly as if it had been alone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava.model.checks import check_sizes
from llava.model.generation import effective
from llava.model.prompt_inputs import check_questions
from llava.model.splice import count_marks, share_images, unpadded
from llava.model.tiles import Images
from llava.pruning.active import prune
from llava.utils import UserInputError

# Arguments of `generate` that hold all rows, or are told which row they are asked about.
OF_A_BATCH = (
    *("streamer", "position_ids", "return_dict_in_generate"),
    *("past_key_values", "prefix_allowed_tokens_fn"),
)


def generate_rows(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    images: Images | None,
    image_sizes: Sequence[tuple[int, int]] | None,
    questions: Sequence[str] | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Call ``model.generate`` with one row after the other.

    Products of a batch are rounded in another order than those of a row, so that tokens with nearly
    equal scores may change places. Here nothing of one row takes part in another.

    Returns:
        int64 [B, new], rows that ended early padded on the right; several a prompt where
        ``num_return_sequences`` asks for them.

    Raises:
        UserInputError: what belongs to a batch as a whole (``OF_A_BATCH``); images, their sizes or
            questions that do not match the rows.
    """
    for name in OF_A_BATCH:
        value = effective(model, kwargs, name)
        if value is not None and value is not False:
            raise UserInputError(
                f"{name} belongs to a batch as a whole, and strict=True runs its rows one by one; "
                "leave one of the two out"
            )
    rows = unpadded(input_ids, attention_mask)
    if questions is not None:
        check_questions(questions, len(rows), "prompts")
    count = 0 if images is None else len(images)
    sizes = None if images is None else check_sizes(image_sizes, count)
    new = []
    with prune(model, model.pruning):  # one setting for all rows
        for number, share in enumerate(share_images(count_marks(rows), count)):
            own = slice(share.start, share.stop)
            output = model.generate(
                rows[number][None],
                images=images[own] if len(share) else None,
                image_sizes=None if sizes is None else sizes[own],
                questions=None if questions is None else [questions[number]],
                **kwargs,
            )
            new.extend(output)
    return pad_sequence(new, batch_first=True, padding_value=_padding(model, kwargs))


def _padding(model: Any, kwargs: dict[str, Any]) -> int:
    """What ``generate`` fills up rows with that have ended."""
    for name in ("pad_token_id", "eos_token_id"):
        value = kwargs[name] if name in kwargs else effective(model, kwargs, name)
        if value is not None:
            return value[0] if isinstance(value, list) else int(value)
    return 0
