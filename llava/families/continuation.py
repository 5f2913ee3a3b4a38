"""Go on from a cache that holds a pruned prompt.

A caller counts the columns of its own prompt; the cache has fewer. So the cache is marked with what
it holds, and masks and positions of later calls are brought to the smaller count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.families.deep import DeepFeatures
from llava.families.prompts import PER_TOKEN, PrunedPrompts
from llava.pruning.errors import PruningError

if TYPE_CHECKING:
    from llava.families.family import Family

# Attribute of a cache: it goes along when the cache is copied.
_MARK = "_pruned_prompts"
_READ_AGAIN = "leave past_key_values out, and the whole prompt is read again"


class PrunedCall(NamedTuple):
    """A call with pruned prompts.

    Attributes:
        arguments: those of the model, without its ids.
        ids: LongTensor [B, L'], placeholders for the tokens of images.
        prompts: which columns are left.
        length: L, columns of the unpruned prompts.
        shift: LongTensor [B], by how much the positions after the prompts moved up.
        deep: features for inner layers.
    """

    arguments: dict[str, Any]
    ids: Tensor
    prompts: PrunedPrompts
    length: int
    shift: Tensor
    deep: DeepFeatures | None

    def repeated(self, times: int) -> PrunedCall:
        """Return the call without its arguments, every row `times` times."""
        ids, shift = (rows.repeat_interleave(times, 0) for rows in (self.ids, self.shift))
        return PrunedCall({}, ids, self.prompts.repeated(times), self.length, shift, None)


def remember(cache: Any, call: PrunedCall) -> None:
    """Mark a cache that begins with the prompts of a call."""
    if not hasattr(cache, "get_seq_length"):
        return
    # Beams and several answers have more rows than prompts.
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    rows = len(call.ids) if keys is None else len(keys)
    setattr(cache, _MARK, call.repeated(max(1, rows // len(call.ids))))


def is_pruned(cache: Any) -> bool:
    """Return whether a cache holds a pruned prompt."""
    return _known(cache)[0] is not None


def _known(cache: Any) -> tuple[PrunedCall | None, int]:
    """Return the pruned prompts that a cache begins with, and the cache's columns.

    Raises:
        PruningError: the cache was cut inside them.
    """
    known: PrunedCall | None = getattr(cache, _MARK, None)
    length = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if known is None or length >= known.prompts.width:
        return known, length
    # It was emptied for another prompt, or cut to the text before the first image.
    left = known.prompts.columns[:, :length]
    if known.prompts.visual[:, :length].any() or (left != torch.arange(length)).any():
        raise PruningError(
            f"the cache was cut to {length} of the {known.prompts.width} tokens of a pruned "
            f"prompt; {_READ_AGAIN}"
        )
    delattr(cache, _MARK)
    return None, length


def continued(family: Family, ids: Tensor | None, call: Mapping[str, Any]) -> PrunedCall | None:
    """Return a `generate` call that goes on from the cache of a pruned prompt; None for another.

    Args:
        family: of the model.
        ids: LongTensor [B, L + more]: the unpruned prompt, its answer and what is said next.
        call: the other arguments.

    Raises:
        PruningError: what is said next has an image, or is not there.
    """
    known, _ = _known(call.get("past_key_values"))
    if known is None or ids is None:
        return None
    if ids.shape[1] <= known.length or len(ids) != len(known.ids):
        raise PruningError(
            f"the cache holds pruned prompts of {[len(known.ids), known.length]} tokens, the "
            f"prompts given with it have {[*ids.shape]}; give the whole conversation, or "
            f"{_READ_AGAIN}"
        )
    new = ids[:, known.length :]
    _refuse_images(known, new)
    more = new.shape[1]
    columns = torch.arange(known.length, ids.shape[1]).expand(len(ids), -1)
    prompts = PrunedPrompts(
        torch.cat([known.prompts.columns, columns], dim=1),
        torch.cat([known.prompts.positions, _after(known, 0, more)], dim=2),
        pad(known.prompts.visual, (0, more)),
    )
    dropped = (*family.pixels, *PER_TOKEN)
    arguments = {name: value for name, value in call.items() if name not in dropped}
    arguments["attention_mask"] = _mask(known, call.get("attention_mask"), new)
    arguments["position_ids"] = family.position_ids(prompts.positions, prompts.mask).to(ids.device)
    own = torch.cat([known.ids.to(ids.device), new], dim=1)
    return PrunedCall(arguments, own, prompts, ids.shape[1], known.shift, None)


def next_step(family: Family, ids: Tensor | None, call: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a `forward` call that goes on from the cache of a pruned prompt.

    Args:
        family: of the model.
        ids: LongTensor [B, S], the next tokens.
        call: the other arguments; mask and positions count the unpruned prompt, as everywhere.

    Returns:
        None for any other call.

    Raises:
        PruningError: the next tokens have an image, or are not of these prompts.
    """
    known, length = _known(call.get("past_key_values"))
    if known is None or ids is None:
        return None
    if len(ids) != len(known.ids):
        raise PruningError(
            f"the cache holds {len(known.ids)} pruned prompts, but {len(ids)} rows go on from it; "
            f"give one row for each, or {_READ_AGAIN}"
        )
    _refuse_images(known, ids)
    seen = length - known.prompts.width
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


def _refuse_images(known: PrunedCall, ids: Tensor) -> None:
    marks = known.ids.cpu()[known.prompts.visual].unique()
    if bool(torch.isin(ids.cpu(), marks).any()):
        raise PruningError(
            "the prompt goes on with another image, but its cache holds a pruned prompt; "
            f"{_READ_AGAIN}"
        )


def _after(known: PrunedCall, start: int, count: int) -> Tensor:
    """Return the positions [A, B, count] of the tokens from `start` on after a pruned prompt."""
    positions = known.prompts.positions
    last = positions.amax(dim=(0, 2))[None, :, None]
    return (last + 1 + start + torch.arange(count)).expand(len(positions), -1, -1)


def _mask(known: PrunedCall, given: Tensor | None, rest: Tensor) -> Tensor:
    """Return the mask of a pruned prompt and what follows it.

    Args:
        known: the prompt.
        given: the caller's mask [B, L + more] of the unpruned prompt, or None.
        rest: [B, more], what follows.
    """
    after = torch.ones_like(rest) if given is None else given[:, known.length :]
    return torch.cat([known.prompts.mask.to(after.device, after.dtype), after], dim=1)
