"""Merge text and images inside the forward pass of a LLaVA that trains.

DDP, ZeRO-3 and PEFT wrap the model and must see all of its work, the projector's too, in one call.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations import is_deepspeed_zero3_enabled

from llava.constants import IGNORE_INDEX
from llava.model.call_context import padding_side, steps_run_by
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.train.zero import gathered
from llava.utils import UserInputError

logger = logging.getLogger(__name__)

# What a `Collator` makes.
_BATCH = ("input_ids", "labels", "turns", "attention_mask", "images", "image_sizes", "names")
# Attention that adds a mask [B, 1, L, L]; others know causal order and padding only.
_MASKED_ATTENTION = ("eager", "sdpa")
_NO_SAMPLE = -1


class Rows(NamedTuple):
    """Merged samples, padded on the right.

    Attributes:
        embeds: `[B, L, D]`.
        labels, turns: int64 `[B, L]`.
        positions: int64 `[B, L]`; None where tokens are counted from the start of their row.
        lengths: int64 `[B]`, without padding.
        samples: int64 `[B, L]`, the number of each token's sample; None where a row is a sample.
    """

    embeds: Tensor
    labels: Tensor
    turns: Tensor
    positions: Tensor | None
    lengths: Tensor
    samples: Tensor | None = None


@contextmanager
def merging(
    model: nn.Module, *, packing: bool = False, cached: bool = False, skipping: bool = False
) -> Iterator[None]:
    """Let the LLaVA in `model` take batches of a `Collator` as keyword arguments inside.

    Other calls pass untouched, and so do other keyword arguments of the same call. Hooks run in
    the order they were added, and ZeRO-3's must come first: enter this after the model is wrapped,
    for one call or for many.

    Args:
        model: a LLaVA, perhaps wrapped by PEFT, DDP or DeepSpeed.
        packing: put several short samples into one row, see `pack`.
        cached: images are features of the tower that were computed before.
        skipping: a sample of which the length limit leaves no answer adds nothing to the loss and
            is reported; otherwise it is an error.

    Raises:
        UserInputError: there is no LLaVA in the model, or its attention takes no mask for packed
            samples. Calls inside raise it for a sample without an answer to learn.
    """
    llava = find_llava(model)
    if packing:
        check_attention(llava, "--pack_samples")
    hook = partial(_merge_call, packing=packing, cached=cached, skipping=skipping)
    handle = llava.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def find_llava(model: nn.Module) -> Any:
    """Return the LLaVA below the wrappers of `model`.

    Raises:
        UserInputError: there is none.
    """
    for module in model.modules():
        if isinstance(module, LlavaMetaForCausalLM):
            return module
    raise UserInputError(f"{type(model).__name__} is not a LLaVA and holds none; train a LLaVA")


def check_attention(llava: Any, asking: str) -> None:
    """Refuse attention that cannot keep apart what stands in one row.

    Args:
        llava: the model.
        asking: the argument that needs it.

    Raises:
        UserInputError: names what to use instead.
    """
    used = llava.config._attn_implementation
    if used not in _MASKED_ATTENTION:
        raise UserInputError(
            f"{asking} needs attention that takes a mask of its own, and {used!r} takes none; load "
            f"the model with attn_implementation 'sdpa', or leave {asking} out"
        )


def _merge_call(
    llava: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    packing: bool,
    cached: bool,
    skipping: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Turn the keyword arguments of a call into those of the language model, if they are a batch.

    Raises:
        UserInputError: a sample of which the length limit leaves no answer.
    """
    if "turns" not in kwargs:
        return None
    rows = splice_batch(llava, kwargs, cached)
    summed = kwargs.get("num_items_in_batch") is not None
    _check_learnt(llava, kwargs["names"], rows.labels, skipping, summed)
    others = {key: value for key, value in kwargs.items() if key not in _BATCH}
    return args, {**others, **_arguments(llava, rows, packing)}


def merge(
    model: nn.Module, batch: dict[str, Any], *, packing: bool = False, cached: bool = False
) -> dict[str, Any]:
    """Put the images of a `Collator`'s batch in their places in the text.

    Args:
        model: a LLaVA, perhaps wrapped.
        batch: `input_ids`, `labels`, `turns` and `attention_mask` `[B, L]`; `images`
            and `image_sizes` where a row has an image mark.
        packing, cached: as of `merging`.

    Returns:
        Keyword arguments of the model, with `labels` of the merged length.
    """
    llava = find_llava(model)
    return _arguments(llava, splice_batch(llava, batch, cached), packing)


def splice_batch(llava: Any, batch: dict[str, Any], cached: bool) -> Rows:
    """Encode the images of a batch and splice them into its rows; see `merge`."""
    ids, mask, images = batch["input_ids"], batch["attention_mask"], batch.get("images")
    sizes = batch.get("image_sizes")
    if images is None and is_deepspeed_zero3_enabled():
        images = _blank_images(llava, len(ids), cached)
    zeros = _touch_vision(llava, images is not None, cached)
    # The places of tokens travel as labels, so that the splice itself says which token came from
    # where: images of any length, and cuts, need no arithmetic here.
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with padding_side("right"):
        if images is None:
            parts = llava.splice_visual_tokens(None, ids, None, mask, places)
            positions, mask, embeds, places = parts
        else:
            with steps_run_by(partial(_run_step, llava)):
                parts = llava.prepare_inputs_labels_for_multimodal(
                    ids, None, mask, None, places, images, sizes
                )
            _, positions, mask, _, embeds, places = parts
    for zero in zeros:
        embeds = embeds + zero.to(embeds)
    if torch.is_grad_enabled() and not embeds.requires_grad:
        # Re-entrant checkpoints give no gradients to what is inside if nothing that enters has one.
        embeds.requires_grad_()
    # Image marks belong to turn 0.
    labels, turns = (_at(batch["labels"], places, IGNORE_INDEX), _at(batch["turns"], places, 0))
    return Rows(embeds, labels, turns, positions, mask.sum(1))


def _run_step(llava: Any, name: str, step: Callable[..., Any], *arguments: Any) -> Any:
    """Run a step of `prepare_inputs_labels_for_multimodal`.

    Methods read the projector's weights without calling it, so pruning needs them whole.
    """
    whole = llava.get_model().mm_projector.parameters() if name == "prune" else ()
    with gathered(whole):
        return step(*arguments)


def _at(values: Tensor, places: Tensor, fill: int) -> Tensor:
    """Return `values` `[B, L]` at `places` `[B, L']`, `fill` where a place is not in the text."""
    of_text = places != IGNORE_INDEX
    return torch.where(of_text, values.gather(1, places.clamp(min=0)), fill)


def _touch_vision(llava: Any, has_images: bool, cached: bool) -> list[Tensor]:
    """Return zeros whose gradients reach all trained parts of the vision side that a batch omits.

    Processes that train together wait for one another's gradients, and optimisers count a gradient
    of zero as a step, so one process does alike.

    Args:
        llava: the model.
        has_images: whether the batch runs tower and projector anyway.
        cached: images are features of the tower, so no batch runs the tower.

    Returns:
        Scalars; none where nothing waits.
    """
    if not torch.is_grad_enabled():
        return []
    inner = llava.get_model()
    parts: list[nn.Module] = []
    if not has_images:
        parts = [inner.mm_projector] if cached else [llava.get_vision_tower(), inner.mm_projector]
    touched = [weight for part in parts for weight in part.parameters() if weight.requires_grad]
    newline = getattr(inner, "image_newline", None)
    if newline is not None and (newline.requires_grad or is_deepspeed_zero3_enabled()):
        touched.append(newline)
    return [(weight * 0).sum() for weight in touched]


def _blank_images(llava: Any, rows: int, cached: bool) -> Tensor:
    """Return a zero image for every row of a batch of text, which takes no place in its row.

    Under ZeRO-3 processes wait for one another to ask for the shards of each parameter, so a batch
    of text takes the same way through the model as one with images; LLaVA does so always.
    """
    tower = llava.get_vision_tower()
    if cached:
        return torch.zeros(rows, tower.num_tokens, llava.config.mm_hidden_size)
    side = tower.config.image_size
    return torch.zeros(rows, 3, side, side)


def _check_learnt(
    llava: Any, names: Sequence[str], labels: Tensor, skipping: bool, summed: bool
) -> None:
    """Refuse samples of which the length limit leaves no answer, or report them.

    Args:
        llava: the model.
        names: of the samples.
        labels: int64 `[B, L]`.
        skipping: report them, if the loss can do without.
        summed: the loss is a sum over a known number of items; a mean over none is not a number.

    Raises:
        UserInputError: names the first of them.
    """
    unlearnt = (labels == IGNORE_INDEX).all(dim=1).tolist()
    if not any(unlearnt):
        return
    lost = [name for name, nothing in zip(names, unlearnt, strict=True) if nothing]
    limit = llava.config.tokenizer_model_max_length
    fault = (
        f"its first answer begins behind the length limit of {limit} tokens, so nothing of it "
        "would be learnt"
    )
    if not skipping or (all(unlearnt) and not summed):
        raise UserInputError(
            f"{lost[0]}: {fault}; give a larger --model_max_length, or shorten or remove the sample"
        )
    for name in lost:
        logger.warning("%s adds nothing to the loss: %s", name, fault)


def _arguments(llava: Any, rows: Rows, packing: bool) -> dict[str, Any]:
    """Return the language model's keyword arguments for merged rows."""
    if packing:
        check_attention(llava, "--pack_samples")
        rows = pack(rows)
    mask = None
    if rows.samples is not None or bool(rows.turns.any()):
        check_attention(llava, "--parallel_turns")
        _check_window(llava, rows.labels.shape[1])
        mask = block_mask(rows.turns, rows.samples, rows.embeds.dtype)
    return {
        "inputs_embeds": rows.embeds,
        "attention_mask": mask,
        "position_ids": rows.positions,
        "labels": rows.labels,
    }


def pack(rows: Rows) -> Rows:
    """Put several short samples into one row each, where that saves a row.

    No row becomes longer than the longest sample, so a packed batch never costs more than a padded
    one. It pays where lengths in a batch differ much, as of text beside images, and does nothing
    where they are alike, as `ModalityLengthSampler` makes them.

    Args:
        rows: one sample each.

    Returns:
        Fewer rows, or `rows` itself. Samples stand one after the other, each with positions of its
        own; `samples` says which token is whose, and is -1 for padding.
    """
    lengths = rows.lengths.tolist()
    filled = first_fit(lengths)
    if len(filled) == len(lengths):
        return rows
    positions = rows.positions
    if positions is None:
        positions = torch.arange(max(lengths), device=rows.labels.device).expand_as(rows.labels)
    # Nothing predicts the first token of a sample, as in a row of its own.
    labels = rows.labels.clone()
    labels[:, 0] = IGNORE_INDEX
    numbers = torch.arange(len(lengths), device=labels.device)[:, None].expand_as(labels)

    def repack(values: Tensor, fill: int) -> Tensor:
        packed = [torch.cat([values[i, : lengths[i]] for i in row]) for row in filled]
        return pad_sequence(packed, batch_first=True, padding_value=fill)

    return Rows(
        repack(rows.embeds, 0),
        repack(labels, IGNORE_INDEX),
        repack(rows.turns, 0),
        repack(positions, 0),
        torch.stack([rows.lengths[row].sum() for row in filled]),
        repack(numbers, _NO_SAMPLE),
    )


def first_fit(lengths: Sequence[int]) -> list[list[int]]:
    """Distribute samples over rows of the longest one's length: the longest first, first fit.

    Returns:
        The samples of each row.
    """
    room: list[int] = []
    filled: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda sample: -lengths[sample]):
        free = (row for row, left in enumerate(room) if left >= lengths[sample])
        row = next(free, len(room))
        if row == len(room):
            room.append(max(lengths))
            filled.append([])
        room[row] -= lengths[sample]
        filled[row].append(sample)
    return filled


def block_mask(turns: Tensor, samples: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Make the additive mask `[B, 1, L, L]` of turns and samples that do not see one another.

    A token sees what is before it in its own turn and in turn 0, which all turns of a sample share.

    Args:
        turns: int64 `[B, L]`.
        samples: int64 `[B, L]`; None where a row is a sample.
        dtype: of the mask.
    """
    length = turns.shape[1]
    key = turns[:, None, :]
    seen = (key == 0) | (key == turns[:, :, None])
    if samples is not None:
        seen &= samples[:, None, :] == samples[:, :, None]
    seen &= torch.ones(length, length, dtype=torch.bool, device=turns.device).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=turns.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _check_window(llava: Any, length: int) -> None:
    """Refuse rows that a sliding window would cut: a mask of our own replaces the window's.

    Raises:
        UserInputError: a row of `length` tokens does not fit into the window.
    """
    window = getattr(llava.config, "sliding_window", None)
    if window is not None and length > window:
        raise UserInputError(
            f"a row of {length} tokens is longer than the model's sliding_window of {window}, "
            "which --pack_samples and --parallel_turns replace by a mask of their own; leave them "
            f"out, or give --model_max_length {window}"
        )
