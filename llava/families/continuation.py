"""Prompts that go on: what a cache holds of a pruned prompt, and where the next tokens go.

A caller counts the columns of its own prompt; the cache has fewer. So what is known of a cache is
kept beside it, and masks and positions of later calls are brought to the shorter count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.families.deep import DeepFeatures
from llava.families.prompts import PER_TOKEN, Short
from llava.pruning.errors import PruningError

if TYPE_CHECKING:
    from llava.families.family import Family


class ShortCall(NamedTuple):
    """A call with pruned prompts.

    Attributes:
        arguments: those of the model, without its ids.
        ids: LongTensor [B, L'], placeholders for the tokens of images.
        short: which columns are left.
        length: L, columns of the unpruned prompt.
        shift: LongTensor [B], by how much the positions after the prompt moved up.
        deep: features for inner layers.
    """

    arguments: dict[str, Any]
    ids: Tensor
    short: Short
    length: int
    shift: Tensor
    deep: DeepFeatures | None


_caches: WeakKeyDictionary[Any, ShortCall] = WeakKeyDictionary()


def remember(cache: Any, call: ShortCall) -> None:
    """Note that a cache begins with the prompt of a call."""
    if hasattr(cache, "get_seq_length"):
        _caches[cache] = call._replace(arguments={}, deep=None)


def _known(call: Mapping[str, Any]) -> tuple[ShortCall | None, int]:
    """Return the pruned prompt that the cache of a call begins with, and the cache's columns."""
    cache: Any = call.get("past_key_values")
    length = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    return (_caches.get(cache) if length else None), length


def continued(family: Family, ids: Tensor | None, call: Mapping[str, Any]) -> ShortCall | None:
    """Return a `generate` call that goes on from the cache of a pruned prompt; None for another.

    Args:
        family: of the model.
        ids: LongTensor [B, L + more]: the unpruned prompt, its answer and what is said next.
        call: the other arguments.

    Raises:
        PruningError: what is said next has an image.
    """
    known, _ = _known(call)
    if known is None or ids is None:
        return None
    new = ids[:, known.length :]
    if ids.shape[1] <= known.length:
        raise PruningError(
            f"the cache holds a pruned prompt of {known.length} tokens, the prompt given with it "
            f"has {ids.shape[1]}; give the whole conversation, or leave past_key_values out"
        )
    _refuse_images(known, new)
    columns = torch.arange(known.length, ids.shape[1]).expand(len(ids), -1)
    more = columns.shape[1]
    short = Short(
        torch.cat([known.short.columns, columns], dim=1),
        torch.cat([known.short.positions, _after(known, 0, more)], dim=2),
        pad(known.short.visual, (0, more)),
    )
    dropped = (*family.pixels, *PER_TOKEN)
    arguments = {name: value for name, value in call.items() if name not in dropped}
    arguments["attention_mask"] = _mask(known, call.get("attention_mask"), new)
    arguments["position_ids"] = family.position_ids(short.positions, short.mask).to(ids.device)
    own = torch.cat([known.ids.to(ids.device), new], dim=1)
    return ShortCall(arguments, own, short, ids.shape[1], known.shift, None)


def next_step(family: Family, ids: Tensor | None, call: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a `forward` call that goes on from the cache of a pruned prompt.

    Args:
        family: of the model.
        ids: LongTensor [B, S], the next tokens.
        call: the other arguments; mask and positions count the unpruned prompt, as everywhere.

    Returns:
        None for any other call.

    Raises:
        PruningError: the next tokens have an image.
    """
    known, length = _known(call)
    if known is None or ids is None:
        return None
    _refuse_images(known, ids)
    seen = length - known.ids.shape[1]
    arguments = {name: value for name, value in call.items() if name not in family.pixels}
    given, mask = call.get("position_ids"), call.get("attention_mask")
    rest = torch.ones(len(ids), seen + ids.shape[1], dtype=torch.long, device=ids.device)
    arguments["attention_mask"] = _mask(known, mask, rest)
    if given is None:
        positions = family.position_ids(_after(known, seen, ids.shape[1]), torch.ones(ids.shape))
        if positions.ndim == 3:  # the first row counts the columns of the cache
            positions[0] = positions[0] + length
        arguments["position_ids"] = positions.to(ids.device)
    else:
        arguments["position_ids"] = given - known.shift[:, None].to(given.device)
    return {"input_ids": ids, **arguments}


def _refuse_images(known: ShortCall, ids: Tensor) -> None:
    marks = known.ids.cpu()[known.short.visual].unique()
    if bool(torch.isin(ids.cpu(), marks).any()):
        raise PruningError(
            "the prompt goes on with another image, but its cache holds a pruned prompt; leave "
            "past_key_values out, and the whole prompt is read again"
        )


def _after(known: ShortCall, start: int, count: int) -> Tensor:
    """Return the positions [A, B, count] of the tokens from `start` on after a pruned prompt."""
    positions = known.short.positions
    last = positions.amax(dim=(0, 2))[None, :, None]
    return (last + 1 + start + torch.arange(count)).expand(len(positions), -1, -1)


def _mask(known: ShortCall, given: Tensor | None, rest: Tensor) -> Tensor:
    """Return the mask of a pruned prompt and what follows it.

    Args:
        known: the prompt.
        given: the caller's mask [B, L + more] of the unpruned prompt, or None.
        rest: [B, more], what follows.
    """
    after = torch.ones_like(rest) if given is None else given[:, known.length :]
    return torch.cat([known.short.mask.to(after.device, after.dtype), after], dim=1)
