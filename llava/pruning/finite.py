"""Refuse tokens that are NaN or inf."""

from functools import partial

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.late_checks import refuse_if
from llava.pruning.tokens import ENCODER_EXTRAS, VisualTokens


def refuse_non_finite(visual: VisualTokens) -> None:
    """Refuse valid tokens with NaN or inf, which would make every comparison wrong.

    The same goes for what was read of them in the tower, which can overflow where features do not.

    Raises:
        PruningError: there is such a token; on an accelerator later, see `refuse_if`.
    """
    held = {"features": visual.features, "projected": visual.projected}
    # Pre-activations of the projector are left out: what they hold is in `projected`.
    for name in ("clip_image", *ENCODER_EXTRAS):
        values = visual.extras.get(name, ())
        if len(values) and all(isinstance(value, Tensor) for value in values):
            held[name] = torch.stack(list(values))
    for name, values in held.items():
        if values.numel() == 0:
            continue
        of_tokens = name != "cls_feature"
        valid = visual.valid if of_tokens else None
        # One number a token, the largest of its own, says as much: NaN and inf come through.
        values = values.detach()
        largest = values.abs() if values.dim() == 1 + of_tokens else largest_of_last(values)
        bad = partial(_not_finite, largest, valid)
        refuse_if(largest.device, bad, partial(_explain, name, bad))


def largest_of_last(values: Tensor) -> Tensor:
    """Return the largest absolute value along the last axis, NaN where there is one."""
    if values.device.type == "cpu":  # the norm is 20 times slower there
        return torch.maximum(values.amax(dim=-1), -values.amin(dim=-1))
    return torch.linalg.vector_norm(values, torch.inf, dim=-1)


def _not_finite(largest: Tensor, valid: Tensor | None) -> Tensor:
    bad = ~largest.isfinite()
    return bad if valid is None else bad & valid.to(bad.device)


def _explain(name: str, find: partial[Tensor]) -> PruningError:
    bad = find()
    tile, *token = bad.nonzero()[0].tolist()
    place = f"tile {tile}, token {token[0]}" if token else f"tile {tile}"
    return PruningError(
        f"{name} of {place} is NaN or inf "
        f"({int(bad.sum())} such {'tokens' if token else 'tiles'}), so pruning would pick "
        "at random; check the pixels and the weights, or load the model in float32"
    )
