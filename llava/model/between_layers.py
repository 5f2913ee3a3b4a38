"""Pruning between layers in calls of LLaVA's own models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from llava.model.call_context import columns_added_to
from llava.model.generation import effective
from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.pruning.active import record_decoder
from llava.pruning.decoder.call import decoding, is_decoding
from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.segments import segments_of
from llava.utils import UserInputError


def decoder_setting(model: Any) -> DecoderConfig | None:
    """Return what the setting that counts for the caller drops between layers."""
    setting = model.pruning
    return None if setting is None else setting.decoder


def reading_columns(
    setting: DecoderConfig | None, columns: list[VisualColumns], cache: Any = None
) -> AbstractContextManager[None]:
    """Let splices inside add to `columns`, if a setting or what a cache holds needs to know."""
    needed = setting is not None or segments_of(cache) is not None
    return columns_added_to(columns) if needed else nullcontext()


def generating_between_layers(
    model: Any,
    setting: DecoderConfig | None,
    columns: Sequence[VisualColumns],
    arguments: Mapping[str, Any],
) -> AbstractContextManager[None]:
    """Prune prompts of one `generate` call inside.

    Args:
        model: a LlavaCausalLM.
        setting: what is dropped.
        columns: of the prompts, none or one.
        arguments: of `generate`.

    Raises:
        UserInputError: settings under which layers cannot differ in length, or another image
            behind pruned prompts of a cache.
    """
    segments = segments_of(arguments.get("past_key_values"))
    if setting is None and segments is None:
        return nullcontext()
    if segments is not None:
        _refuse_images(columns, segments[0].width)
    if setting is not None and effective(model, arguments, "use_cache") is False:
        raise UserInputError(
            f"{setting.method!r} prunes between layers, which needs the key cache; leave "
            "use_cache=False out"
        )
    return _decoding(model, setting, columns, generating=True)


def passing_between_layers(
    model: Any, setting: DecoderConfig | None, columns: Sequence[VisualColumns], cache: Any
) -> AbstractContextManager[None]:
    """Prune prompts of one `forward` call inside, or go on from a cache that holds pruned ones.

    Raises:
        UserInputError: another image behind pruned prompts of a cache.
    """
    inside, marked = is_decoding(model.get_model()), segments_of(cache) is not None
    if marked:
        _refuse_images(columns, 0)
    if inside == marked and not columns:
        return nullcontext()  # nothing to do, or the call around this one does it
    return _decoding(model, setting, columns, generating=False)


def embeddings_between_layers(model: Any, cache: Any) -> AbstractContextManager[None]:
    """Do as `passing_between_layers` for embeddings that are given to `forward`.

    Raises:
        UserInputError: tokens are to be dropped, and nothing says which are of images.
    """
    if is_decoding(model.get_model()):
        return nullcontext()
    if segments_of(cache) is not None:
        return _decoding(model, None, [], generating=False)
    behind = cache is not None and cache.get_seq_length() > 0
    setting = None if behind else decoder_setting(model)
    if setting is not None:
        raise UserInputError(
            f"{setting.method!r} prunes between layers, and nothing says which inputs_embeds are "
            "of images; pass input_ids and images, or switch it off: with prune(model): ..."
        )
    return nullcontext()


def _refuse_images(columns: Sequence[VisualColumns], start: int) -> None:
    """Refuse prompts with an image from column `start` on: what a cache holds was pruned already.

    Raises:
        UserInputError: there is one.
    """
    if any(bool((own.image[:, start:] >= 0).any()) for own in columns):
        raise UserInputError(
            "the prompt goes on with another image, but its cache holds a prompt that was pruned "
            "between layers; leave past_key_values out, and the whole prompt is read again"
        )


def _decoding(
    model: Any,
    setting: DecoderConfig | None,
    columns: Sequence[VisualColumns],
    *,
    generating: bool,
) -> AbstractContextManager[None]:
    own = columns[0] if columns else None
    layers, done = TransformersDecoder(model.get_model()), partial(record_decoder, model)
    return decoding(layers, setting, own, generating=generating, done=done)
