"""Put visual embeddings into rows of text, and rows into a batch."""

import logging
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.pruning.decoder.columns import TEXT, PlacedImage, VisualColumns
from llava.pruning.tokens import ImageTokens, TokenSequence
from llava.utils import UserInputError

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One merged sequence: embeds [L, D], int64 labels [L] and positions [L]."""

    embeds: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def unpadded(rows: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Free the rows of [B, L] of padding, wherever it is; without a mask all tokens count."""
    if mask is None:
        return list(rows)
    return [row[keep] for row, keep in zip(rows, mask.bool(), strict=True)]


def share_images(rows: Sequence[torch.Tensor], num_images: int) -> list[range]:
    """Say which images belong to which row of ids, padding removed.

    Rows take images in order. A row without a mark takes one image that is not shown: batches of
    LLaVA carry a dummy image there. A batch may also leave all dummies out.

    Raises:
        UserInputError: the number of images fits neither reading.
    """
    marks = [int((row == IMAGE_TOKEN_INDEX).sum()) for row in rows]
    with_dummies = [max(1, count) for count in marks]
    if num_images not in (sum(marks), sum(with_dummies)):
        raise UserInputError(
            f"the prompts have {sum(marks)} <image> marks but {num_images} images were given; "
            "give one image for each mark (rows without a mark may carry one dummy image each)"
        )
    takes = with_dummies if num_images == sum(with_dummies) else marks
    ends = list(accumulate(takes, initial=0))
    return [range(start, end) for start, end in pairwise(ends)]


def splice_prompts(
    visual: ImageTokens | None,
    rows: Sequence[torch.Tensor],
    labels: Sequence[torch.Tensor],
    embed: nn.Module,
) -> list[Row]:
    """Replace every image mark of every prompt by the embeddings of its image.

    Args:
        visual: encoded, perhaps pruned images in the order of the marks; None for text only.
        rows, labels: int64 [L] of every prompt, padding removed.
        embed: the language model's embedding table.
    """
    count = 0 if visual is None else visual.num_images
    merged = []
    for ids, targets, share in zip(rows, labels, share_images(rows, count), strict=True):
        images = [] if visual is None else [visual.embeddings(image) for image in share]
        embeds, targets = splice_row(ids, targets, images, embed)
        if visual is not None and visual.original_positions:
            positions = row_positions(ids, [visual.sequence(image) for image in share])
        else:
            positions = torch.arange(len(targets), device=targets.device)
        merged.append(Row(embeds, targets, positions))
    return merged


def cut_rows(merged: Sequence[Row], rows: Sequence[torch.Tensor], limit: int | None) -> list[Row]:
    """Cut merged rows to their first `limit` tokens, with a warning for each that loses some.

    Args:
        merged: prompts with their images.
        rows: their ids, padding removed.
        limit: `tokenizer_model_max_length`; None cuts nothing.
    """
    if limit is None:
        return list(merged)
    for number, (row, ids) in enumerate(zip(merged, rows, strict=True)):
        length, text = len(row.labels), int((ids != IMAGE_TOKEN_INDEX).sum())
        if length > limit:
            logger.warning(
                f"row {number} has {length} tokens ({text} of text, {length - text} of images) "
                f"but tokenizer_model_max_length is {limit}: its last {length - limit} tokens are "
                "cut off"
            )
    return [Row(*(part[:limit] for part in row)) for row in merged]


def splice_row(
    ids: torch.Tensor, labels: torch.Tensor, images: list[torch.Tensor], embed: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace every image mark of a row by that image's embeddings.

    Args:
        ids: int64 [L], padding removed.
        labels: int64 [L].
        images: embeddings [N_i, D] for each mark; one extra for a row without a mark.
        embed: the language model's embedding table.

    Returns:
        Embeddings [merged length, D] and labels of the merged row.
    """
    at = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    is_text = ids != IMAGE_TOKEN_INDEX
    lengths = [b - a - 1 for a, b in zip([-1, *at], [*at, len(ids)], strict=True)]
    texts = embed(ids[is_text]).split(lengths)
    text_labels = labels[is_text].split(lengths)
    if not at:
        # The unseen dummy joins with length 0, so every rank has a gradient for the projector.
        return torch.cat([texts[0], *(_like(x[:0], texts[0]) for x in images)]), labels
    embeds, merged = [texts[0]], [text_labels[0]]
    for image, text, label in zip(images, texts[1:], text_labels[1:], strict=True):
        embeds += [_like(image, text), text]
        merged += [label.new_full((len(image),), IGNORE_INDEX), label]
    return torch.cat(embeds), torch.cat(merged)


def row_positions(ids: torch.Tensor, images: list[TokenSequence]) -> torch.Tensor:
    """Return the place that each token of a merged row has in the unpruned row.

    Args:
        ids: int64 [L] of the row, padding removed.
        images: what is left of the image at each mark; one extra for a row without a mark.

    Returns:
        int64 [merged length], ascending.
    """
    at = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
    lengths = [b - a - 1 for a, b in zip([-1, *at], [*at, len(ids)], strict=True)]
    pieces, start = [torch.arange(lengths[0], device=ids.device)], lengths[0]
    for length, image in zip(lengths[1:], images, strict=False):
        assert image.place is not None  # methods that merge refuse original positions
        pieces.append(image.place.to(ids.device) + start)
        start += image.total
        pieces.append(torch.arange(start, start + length, device=ids.device))
        start += length
    return torch.cat(pieces)


def visual_columns(
    visual: ImageTokens | None, rows: Sequence[torch.Tensor], merged: Sequence[Row], side: str
) -> VisualColumns:
    """Say where visual tokens stand in spliced prompts.

    Args:
        visual: what was spliced; None for text only.
        rows: ids of the prompts, padding removed.
        merged: the prompts with their images, perhaps cut.
        side: on which they are padded.
    """
    count = 0 if visual is None else visual.num_images
    images, own = [], []
    for image in range(count):
        assert visual is not None
        sequence = visual.sequence(image)
        length = len(sequence.source)
        place = torch.arange(length) * sequence.total // max(length, 1)
        own.append(place if sequence.place is None else sequence.place.cpu())
        images.append(PlacedImage(sequence.total, visual.layout_of(image)))
    labelled = []
    for ids, row, share in zip(rows, merged, share_images(rows, count), strict=True):
        at = (ids == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        lengths = [b - a - 1 for a, b in zip([-1, *at], [*at, len(ids)], strict=True)]
        places = [torch.zeros(lengths[0], dtype=torch.long)]
        numbers = [torch.full_like(places[0], TEXT)]
        for image, length in zip(share, lengths[1:], strict=False):
            text = torch.zeros(length, dtype=torch.long)
            places += [own[image], text]
            numbers += [torch.full_like(own[image], image), torch.full_like(text, TEXT)]
        end = len(row.labels)
        labelled.append((torch.cat(numbers)[:end], torch.cat(places)[:end]))
    return VisualColumns.of_rows(labelled, images, side)


def _like(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return x.to(device=reference.device, dtype=reference.dtype)


def pad_rows(rows: Sequence[Row], side: str) -> tuple[Row, torch.Tensor]:
    """Pad rows with zero embeddings to the longest one.

    Args:
        rows: merged sequences.
        side: "left" or "right": where the padding goes.

    Returns:
        All rows as one, each tensor with a batch dimension, and their mask bool [B, L].

    Raises:
        UserInputError: another side.
    """
    if side not in ("left", "right"):
        raise UserInputError(f"tokenizer_padding_side is {side!r}; use 'left' or 'right'")
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    embeds, labels, positions = map(list, zip(*rows, strict=True))
    mask = pad([torch.ones_like(row, dtype=torch.bool) for row in labels])
    return Row(pad(embeds), pad(labels, padding_value=IGNORE_INDEX), pad(positions)), mask
