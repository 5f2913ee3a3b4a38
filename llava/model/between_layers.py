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
    setting: DecoderConfig | None, columns: list[VisualColumns]
) -> AbstractContextManager[None]:
    """Let splices inside add to `columns`, if a setting needs to know them."""
    return nullcontext() if setting is None else columns_added_to(columns)


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
        UserInputError: settings under which layers cannot differ in length.
    """
    if setting is None and segments_of(arguments.get("past_key_values")) is None:
        return nullcontext()
    if setting is not None and effective(model, arguments, "use_cache") is False:
        raise UserInputError(
            f"{setting.method!r} prunes between layers, which needs the key cache; leave "
            "use_cache=False out"
        )
    return _decoding(model, setting, columns, generating=True)


def passing_between_layers(
    model: Any, setting: DecoderConfig | None, columns: Sequence[VisualColumns], cache: Any
) -> AbstractContextManager[None]:
    """Prune prompts of one `forward` call inside, or go on from a cache that holds pruned ones."""
    apart = is_decoding(model.get_model())  # a call inside another one, which it must not see
    if not columns and segments_of(cache) is None and not apart:
        return nullcontext()
    return _decoding(model, setting, columns, generating=False)


def check_embeddings(model: Any) -> None:
    """Refuse embeddings given to `forward` where tokens are to be dropped between layers.

    Raises:
        UserInputError: nothing says which columns are of images.
    """
    if is_decoding(model.get_model()):
        return
    setting = decoder_setting(model)
    if setting is not None:
        raise UserInputError(
            f"{setting.method!r} prunes between layers, and nothing says which inputs_embeds are "
            "of images; pass input_ids and images, or switch it off: with prune(model): ..."
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
