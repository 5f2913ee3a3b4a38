"""Images and prompts on their way into a LLaVA model, under the names that LLaVA's users import.

How pictures become pixels is in `llava.anyres`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import StoppingCriteria

from llava.anyres import (  # noqa: F401 - LLaVA's import path of these
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    process_anyres_image,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    unpad_image,
)
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.images import decode_base64
from llava.utils import user_path
from llava.value_rules import check_characters


def load_image_from_base64(image: str) -> Image.Image:
    """Decode a base64 image file as `open_image` does; RGB.

    Raises:
        UserInputError: the text does not hold an image, or one that is cut short or too large.
    """
    return decode_base64(image, "the image")


def tokenizer_image_token(
    prompt: str,
    tokenizer: Any,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Tokenise a prompt that holds `<image>` marks.

    The text between marks is tokenised piece by piece, as LLaVA did in training, so a piece may
    begin with a space token that tokenising the whole text would not give.

    Returns:
        Token ids with `image_token_index` at every mark and one BOS at the front if the
        tokenizer writes one; a list, or int64 [L] for `return_tensors="pt"`.

    Raises:
        ValueError: another value of `return_tensors`.
        UserInputError: the prompt is not valid text, as after bytes that could not be decoded.
    """
    ids = tokenize_pieces(prompt.split(DEFAULT_IMAGE_TOKEN), tokenizer, image_token_index)
    if return_tensors is None:
        return ids
    if return_tensors == "pt":
        return torch.tensor(ids, dtype=torch.long)
    raise ValueError(f"unsupported tensor type: {return_tensors!r}; use 'pt' or None")


def tokenize_pieces(
    pieces: Sequence[str], tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX
) -> list[int]:
    """Tokenise the texts between the image marks of a prompt, see `tokenizer_image_token`.

    Args:
        pieces: one text more than there are images; an `<image>` in a piece is text.

    Raises:
        UserInputError: a piece is not valid text.
    """
    check_characters(DEFAULT_IMAGE_TOKEN.join(pieces), "the prompt")
    bos = tokenizer.bos_token_id
    chunks = [tokenizer(piece).input_ids for piece in pieces]
    starts_with_bos = bool(chunks[0]) and bos is not None and chunks[0][0] == bos
    ids: list[int] = [bos] if starts_with_bos else []
    for i, chunk in enumerate(chunks):
        if i:
            ids.append(image_token_index)
        ids.extend(chunk[1:] if starts_with_bos and chunk[:1] == [bos] else chunk)
    return ids


def get_model_name_from_path(model_path: str | Path) -> str:
    """Return the last part of a path; `parent_checkpoint-N` for a step checkpoint of a training.

    A folder in the hub's cache is called as the model on the hub, `.` as the folder it stands
    for.
    """
    parts = str(model_path).strip("/").split("/")
    if parts[-1] in (".", "..", "~"):
        parts = os.path.abspath(user_path(model_path)).split("/")
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").split("--", 1)[-1]
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stop once every row ends with one of the keywords.

    Works on sequences with and without the prompt: generation from embeddings reports new tokens
    only.

    Args:
        keywords: texts to stop at.
        tokenizer: the model's tokenizer.
        input_ids: the prompt, int64 [B, L].
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: torch.Tensor) -> None:
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.prompt_ids = input_ids
        found: list[list[int]] = [list(tokenizer(keyword).input_ids) for keyword in self.keywords]
        bos = tokenizer.bos_token_id
        self.keyword_ids = [ids[1:] if len(ids) > 1 and ids[0] == bos else ids for ids in found]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)

    def __call__(self, output_ids: torch.Tensor, scores: Any = None, **kwargs: Any) -> bool:
        """Whether every row of int64 [B, L] ends with a keyword."""
        return all(self._row_stops(row) for row in self._new_tokens(output_ids))

    def _new_tokens(self, output_ids: torch.Tensor) -> torch.Tensor:
        prompt = self.prompt_ids.to(output_ids.device)
        head, new = output_ids.tensor_split([prompt.shape[-1]], dim=1)
        return new if torch.equal(head, prompt) else output_ids

    def _row_stops(self, row: torch.Tensor) -> bool:
        tail = row[-self.max_keyword_len :].tolist() if self.max_keyword_len else []
        if any(ids and tail[-len(ids) :] == ids for ids in self.keyword_ids):
            return True
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)
