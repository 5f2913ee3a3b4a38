"""LLaVA's supervised data: conversations with at most one image, and their batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.images import open_image
from llava.mm_utils import process_images
from llava.pixels import check_pixels
from llava.train.arguments import DataArguments
from llava.train.conversations import render, tokenize, tokenize_turns
from llava.utils import UserInputError


class SupervisedDataset(Dataset):
    """Samples of a LLaVA JSON file; text and images are prepared when they are asked for.

    Raises:
        UserInputError: the file is missing, is no JSON array, or names images without a source;
            ``parallel_turns`` is no share; ``pixels`` is no reading.
    """

    def __init__(
        self,
        args: DataArguments,
        tokenizer: Any,
        template: Conversation,
        image_processor: Any,
        model_config: Any,
    ) -> None:
        check_pixels(args.pixels)
        self.samples = _read(args.data_path)
        if not 0 <= args.parallel_turns <= 1:
            raise UserInputError(f"--parallel_turns is {args.parallel_turns}; give a share, 0 to 1")
        self.args, self.tokenizer, self.template = args, tokenizer, template
        self.image_processor, self.model_config = image_processor, model_config
        self.features = None
        if args.feature_file is not None:
            self.features = np.load(args.feature_file, mmap_mode="r")
        elif args.image_folder is None and any("image" in sample for sample in self.samples):
            raise UserInputError("the samples name images; give --image_folder or --feature_file")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        if "image" in sample and self._parallel(index):
            ids, labels, turns = tokenize_turns(sample, self.template, self.tokenizer)
        else:
            prompt = render(sample, self.template)
            ids, labels = tokenize(prompt, self.template, self.tokenizer)
            turns = torch.zeros_like(ids)
        example = {"input_ids": ids, "labels": labels, "turns": turns}
        marks = int((ids == IMAGE_TOKEN_INDEX).sum())
        if marks > 1 or marks != ("image" in sample):
            raise UserInputError(
                f"sample {sample.get('id')!r} has {marks} <image> marks and "
                f"{'an' if 'image' in sample else 'no'} image; write exactly one mark for an image"
            )
        if "image" in sample:
            example["image"] = self._image(sample["image"])
        return example

    def _parallel(self, index: int) -> bool:
        """Spread the share of parallel samples evenly over the file."""
        share = self.args.parallel_turns
        return int((index + 1) * share) > int(index * share)

    def _image(self, name: str) -> Tensor:
        """Pixels ``[3, H, W]``, or cached features ``[N, Dv]``."""
        if self.features is not None:
            return torch.from_numpy(np.asarray(self.features[int(Path(name).stem)])).float()
        image = open_image(Path(self.args.image_folder or "") / name, self.args.pixels)
        return process_images([image], self.image_processor, self.model_config)[0]


class Collator:
    """Pad a batch on the right.

    No padding mask is made: attention is causal, so no real token can see the padding behind it,
    and padding carries no labels.
    """

    def __init__(self, pad_token_id: int, max_length: int) -> None:
        self.pad_token_id, self.max_length = pad_token_id, max_length

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = pad_sequence([e["input_ids"] for e in examples], True, self.pad_token_id)
        labels = pad_sequence([e["labels"] for e in examples], True, IGNORE_INDEX)
        turns = pad_sequence([e["turns"] for e in examples], True, 0)
        batch = {"input_ids": ids, "labels": labels, "turns": turns}
        batch = {name: values[:, : self.max_length] for name, values in batch.items()}
        images = [e["image"] for e in examples if "image" in e]
        if images and len(images) < len(examples):
            # a text-only row takes one image slot and shows nothing of it, as in LLaVA
            blank = torch.zeros_like(images[0])
            images = [e.get("image", blank) for e in examples]
        if images:
            batch["images"] = torch.stack(images)
        return batch


def turn_mask(turns: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask ``[B, 1, L, L]`` of turns ``[B, L]`` that do not see one another.

    A token sees what stands before it in its own turn and in turn 0, which is common to all.
    """
    length = turns.shape[1]
    key = turns[:, None, :]
    seen = (key == 0) | (key == turns[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool, device=turns.device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=turns.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def spliced_turns(turns: Tensor, input_ids: Tensor, image_tokens: int, length: int) -> Tensor:
    """``turns`` ``[B, L]`` after the splice of ``image_tokens`` per mark, padded to ``length``."""
    rows = []
    for ids, row in zip(input_ids, turns, strict=True):
        wide = torch.where(ids == IMAGE_TOKEN_INDEX, image_tokens, 1)
        row = row.repeat_interleave(wide)[:length]
        rows.append(torch.nn.functional.pad(row, (0, length - len(row))))
    return torch.stack(rows)


def _read(path: str) -> list[dict[str, Any]]:
    try:
        samples = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserInputError(f"cannot read --data_path {path}: {error}") from error
    if not isinstance(samples, list) or not samples:
        raise UserInputError(f"--data_path {path} must hold a JSON array of samples")
    return samples
