"""Prepare samples for the model, and batches of them."""

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
from llava.train.conversations import tokenize_sample, tokenize_turns
from llava.train.samples import read_samples
from llava.utils import UserInputError, user_path


class SupervisedDataset(Dataset):
    """Hold the samples of a LLaVA JSON file; prepare text and images when they are asked for.

    An item has the int64 `[L]` tensors `input_ids`, `labels` and `turns`, and of every image in
    order: in `images` its pixels `[3, H, W]`, tiles `[T, 3, H, W]` or cached features `[N, Dv]`, in
    `image_sizes` (width, height), None for features.

    Raises:
        UserInputError: data that cannot be used; `parallel_turns` is not a share; an unknown
            `pixels`.
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
        if not 0 <= args.parallel_turns <= 1:
            raise UserInputError(f"--parallel_turns is {args.parallel_turns}; give a share, 0 to 1")
        self.samples = read_samples(args.data_path)
        self.args, self.tokenizer, self.template = args, tokenizer, template
        self.image_processor, self.model_config = image_processor, model_config
        self.features = _read_features(args.feature_file, model_config)
        self.folder = user_path(args.image_folder or "")
        if self.features is None and any(sample.images for sample in self.samples):
            if args.image_folder is None:
                raise UserInputError(
                    "the samples name images; give --image_folder or --feature_file"
                )
            if not self.folder.is_dir():
                raise UserInputError(
                    f"--image_folder {args.image_folder} is not a folder; check the path"
                )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        make = tokenize_turns if sample.images and self._parallel(index) else tokenize_sample
        ids, labels, turns = make(sample, self.template, self.tokenizer)
        try:
            shown = [self._image(name) for name in sample.images]
        except UserInputError as error:
            raise UserInputError(f"{sample.name}: {error}") from error
        return {
            "name": sample.name,
            "input_ids": ids,
            "labels": labels,
            "turns": turns,
            "images": [image for image, _ in shown],
            "image_sizes": [size for _, size in shown],
        }

    def _parallel(self, index: int) -> bool:
        """Spread the share of parallel samples evenly over the file."""
        share = self.args.parallel_turns
        return int((index + 1) * share) > int(index * share)

    def _image(self, name: str) -> tuple[Tensor, tuple[int, int] | None]:
        if self.features is not None:
            return _row(self.features, name), None
        image = open_image(self.folder / name, self.args.pixels)
        pixels = process_images([image], self.image_processor, self.model_config)[0]
        return pixels, image.size


class Collator:
    """Pad a batch on the right; its mask `[B, L]` says where the tokens are.

    `images` and `image_sizes` are those of all marks in order.
    """

    def __init__(self, pad_token_id: int, max_length: int) -> None:
        self.pad_token_id, self.max_length = pad_token_id, max_length

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "turns": 0}
        texts = {key: [e[key][: self.max_length] for e in examples] for key in fill}
        masks = [torch.ones_like(row) for row in texts["turns"]]
        batch: dict[str, Any] = {
            **{key: pad_sequence(rows, True, fill[key]) for key, rows in texts.items()},
            "attention_mask": pad_sequence(masks, True, 0),
            "names": [e["name"] for e in examples],
        }
        images: list[Tensor] = []
        sizes: list[tuple[int, int] | None] = []
        for example, row in zip(examples, texts["input_ids"], strict=True):
            # An image whose mark was cut off is not shown.
            marks = int((row == IMAGE_TOKEN_INDEX).sum())
            images += example["images"][:marks]
            sizes += example["image_sizes"][:marks]
        if images:
            # Tiles of images differ in number.
            batch["images"] = torch.stack(images) if images[0].ndim == 3 else images
            batch["image_sizes"] = None if None in sizes else sizes
        return batch


def _read_features(path: str | None, config: Any) -> np.ndarray | None:
    """Map cached features `[images, N, Dv]`; None without a file."""
    if path is None:
        return None
    if getattr(config, "image_aspect_ratio", None) == "anyres":
        raise UserInputError(
            "--feature_file has one view of each image, but image_aspect_ratio 'anyres' shows "
            "several; give --image_folder, or --image_aspect_ratio pad"
        )
    try:
        features = np.load(user_path(path), mmap_mode="r")
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise UserInputError(f"cannot read --feature_file {path}: {error}") from error
    wanted = f"give floating point of shape [images, patches, {config.mm_hidden_size}]"
    if not isinstance(features, np.ndarray):
        raise UserInputError(f"--feature_file {path} is an archive of several arrays; {wanted}")
    shape, kind = features.shape, features.dtype.kind
    if len(shape) != 3 or shape[2] != config.mm_hidden_size or 0 in shape or kind != "f":
        raise UserInputError(
            f"--feature_file {path} has {features.dtype} of shape {list(shape)}; {wanted}, made "
            "by this model's vision tower"
        )
    return features


def _row(features: np.ndarray, name: str) -> Tensor:
    """Return the features `[N, Dv]` of the image whose file name is the number of their row."""
    stem = Path(name).stem
    if not stem.isdecimal() or int(stem) >= len(features):
        raise UserInputError(
            f"--feature_file has the rows 0 to {len(features) - 1}, and none for the image "
            f"{name!r}; name every image by the number of its row"
        )
    return torch.from_numpy(features[int(stem)].astype(np.float32))
