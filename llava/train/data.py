"""Prepare samples for the model, and batches of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.images import open_image
from llava.mm_utils import process_images
from llava.pixels import check_pixels
from llava.train.arguments import DataArguments
from llava.train.conversations import tokenize_sample, tokenize_turns
from llava.train.samples import Sample, read_samples
from llava.train.skipped import SkippedSamples
from llava.utils import UserInputError, user_path

_IMAGE_WORDS = 576  # patches of a tile of LLaVA-1.5's tower; only the order of samples needs it


class SupervisedDataset(Dataset):
    """Hold the samples of a LLaVA JSON file; prepare text and images when they are asked for.

    An item has the int64 `[L]` tensors `input_ids`, `labels` and `turns`, and of every image in
    order: in `images` its pixels `[3, H, W]`, tiles `[T, 3, H, W]` or cached features `[N, Dv]`, in
    `image_sizes` (width, height), None for features.

    With `skip_bad_samples`, samples whose JSON cannot be used are left out, and one whose text or
    image turns out not to be usable when it is asked for is replaced by the next one that can be
    used and has images too, or has none either. So what stands for a sample depends on the data
    alone, not on workers, processes or a resume, and no batch becomes smaller.

    Raises:
        UserInputError: data that cannot be used; `parallel_turns` is not a share; an unknown
            `pixels`; a tokenizer that is not the model's.
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
        faults: dict[str, str] = {}
        self.samples = read_samples(args.data_path, faults if args.skip_bad_samples else None)
        self._skipped = SkippedSamples(faults, len(self.samples))
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

        self._start_end = bool(getattr(model_config, "mm_use_im_start_end", False))
        self._check_tokenizer()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def modality_lengths(self) -> list[int]:
        """How long samples are, negative without an image; no image is opened for it."""
        lengths = []
        for sample in self.samples:
            words = max(1, sum(len(text.split()) for text in sample.turns))
            images = len(sample.images)
            lengths.append(words + images * _IMAGE_WORDS if images else -words)
        return lengths

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.args.skip_bad_samples:
            return self._item(index)
        count, shown = len(self.samples), bool(self.samples[index].images)
        fault = ""
        for place in ((index + step) % count for step in range(count)):
            if bool(self.samples[place].images) != shown:
                continue
            try:
                return self._item(place)
            except UserInputError as error:
                fault = str(error)
                self._skipped.add(place, fault)
        kind = "with" if shown else "without"
        raise UserInputError(f"no sample {kind} images can be used; the last: {fault}")

    def skipped(self) -> dict[str, str]:
        """Return what is wrong with each sample that was skipped, by name.

        All processes that train together have to call it.
        """
        faults = dict(self._skipped.faults)
        for index in self._skipped.found():
            try:
                self._item(index)
            except UserInputError as error:
                faults[self.samples[index].name] = str(error)
        return faults

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer of another model before anything is trained.

        Raises:
            UserInputError: it has ids that the model has no embedding for, or makes no labels.
        """
        size = self.model_config.vocab_size
        beyond = {
            token: index
            for token, index in self.tokenizer.get_vocab().items()
            if index >= size and index != self.tokenizer.pad_token_id
        }
        if beyond:
            token = min(beyond, key=lambda token: beyond[token])
            raise UserInputError(
                f"the tokenizer's token {token!r} has the id {beyond[token]}, but the model has "
                f"{size} embeddings; use the tokenizer that was made for the model"
            )
        if self.args.skip_bad_samples:  # else the first sample says so
            every = Sample("every sample", (f"{DEFAULT_IMAGE_TOKEN}\nWhat?", "This."), ("",))
            tokenize_sample(every, self.template, self.tokenizer, self._start_end)

    def _item(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        make = tokenize_turns if sample.images and self._parallel(index) else tokenize_sample
        ids, labels, turns = make(sample, self.template, self.tokenizer, self._start_end)
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
