"""Pruning between the layers of language models in families: where tokens stand, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from llava.families.prompts import Prompts, PrunedPrompts, left_columns
from llava.pruning.active import record_decoder
from llava.pruning.config import PruningConfig
from llava.pruning.decoder.call import decoding
from llava.pruning.decoder.columns import PADDING, TEXT, PlacedImage, VisualColumns
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.segments import segments_of
from llava.pruning.errors import PruningError
from llava.pruning.tokens import ImageTokens

if TYPE_CHECKING:
    from llava.families.attachment import Attachment
    from llava.families.family import Family


class LayerPruning(NamedTuple):
    """What a call drops between layers.

    Attributes:
        config: the setting; None in calls that only go on from a cache of pruned prompts.
        columns: where visual tokens stand in the prompts that the language model reads; None as
            for `config`.
    """

    config: DecoderConfig | None = None
    columns: VisualColumns | None = None


def check_layers(family: Family, model: Any, setting: PruningConfig | None, cache: Any) -> None:
    """Refuse a setting that drops tokens between layers where the model's cannot differ in length.

    Args:
        family: of the model.
        model: the model.
        setting: the one that counts.
        cache: `past_key_values` of the call.

    Raises:
        PruningError: names what to use instead.
    """
    if setting is not None and setting.decoder is not None:
        family.decoder_layers(model).check(cache)


def between_layers(
    target: Attachment, layers: LayerPruning, *, generating: bool
) -> AbstractContextManager[None]:
    """Let passes through the language model of `target` drop what `layers` says inside."""
    return decoding(
        target.family.decoder_layers(target.model),
        layers.config,
        layers.columns,
        generating=generating,
        done=partial(record_decoder, target),
        marked=partial(_lease, target),
    )


class _Lease:
    """Keeps hooks on a model as long as a cache of its pruned prompts lives, or a copy of it.

    Calls that go on from the cache outside any block read it right only through these hooks.
    """

    def __init__(self, target: Attachment) -> None:
        self._target = target
        target.hold()

    def __del__(self) -> None:
        if self._target.model is not None:
            self._target.release()

    def __deepcopy__(self, memo: Any) -> _Lease:
        return _Lease(self._target)

    def __copy__(self) -> _Lease:
        return _Lease(self._target)

    def __reduce__(self) -> Any:
        return type(None), ()


def _lease(target: Attachment, cache: Any) -> None:
    if hasattr(cache, "get_seq_length"):
        cache._pruning_lease = _Lease(target)


def visual_columns(
    prompts: Prompts, tokens: ImageTokens | None, pruned: PrunedPrompts | None
) -> VisualColumns:
    """Say where visual tokens stand in the prompts that the language model reads.

    Args:
        prompts: the unpruned ones.
        tokens: of their images, in the same order: what is left of them or, without `pruned`, their
            outline; None for prompts without any.
        pruned: which columns are left; None where all are.
    """
    image = torch.full_like(prompts.ids, TEXT).masked_fill(~prompts.mask, PADDING)
    place, placed = torch.zeros_like(image), []
    for number, (row, columns, _) in enumerate(prompts.images):
        assert tokens is not None
        total, own = len(columns), torch.arange(len(columns))
        if pruned is not None:
            columns = left_columns(tokens, number, columns)
            kept = tokens.sequence(number).place
            own = torch.arange(len(columns)) * total // max(len(columns), 1)
            own = own if kept is None else kept.cpu()
        image[row, columns], place[row, columns] = number, own
        placed.append(PlacedImage(total, tokens.layout_of(number)))
    if pruned is not None:
        image, place = pruned.take(image, PADDING), pruned.take(place, 0)
    return VisualColumns(image, place, tuple(placed))


def goes_on(cache: Any) -> bool:
    """Return whether a cache begins with prompts that were pruned between layers.

    Raises:
        PruningError: the cache was cut inside them.
    """
    return segments_of(cache) is not None


def check_next(
    family: Family, model: Any, ids: Tensor | None, call: Mapping[str, Any], *, whole: bool
) -> dict[str, Any]:
    """Return the arguments of a call that goes on from prompts pruned between layers alone.

    Args:
        family: of the model.
        model: the model.
        ids: LongTensor [B, S]: what comes next or, if `whole`, [B, L + S] with all before it.
        call: the other arguments.
        whole: whether `ids` begin with the prompts.

    Raises:
        PruningError: what comes next has an image, or is not there.
    """
    cache = call["past_key_values"]
    seen = int(cache.get_seq_length()) if whole else 0
    if ids is not None:
        if ids.shape[1] <= seen:
            raise PruningError(
                f"the cache holds {seen} tokens of a prompt that was pruned between layers, the "
                f"prompts given with it have {ids.shape[1]}; give the whole conversation, or leave "
                "past_key_values out, and the whole prompt is read again"
            )
        marks = torch.tensor(family.placeholders(model), device=ids.device)
        if bool(torch.isin(ids[:, seen:], marks).any()):
            raise PruningError(
                "the prompt goes on with another image, but its cache holds a prompt that was "
                "pruned between layers; leave past_key_values out, and the whole prompt is read "
                "again"
            )
    return {name: value for name, value in call.items() if name not in family.pixels}
