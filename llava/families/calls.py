"""A call of a pruned model: from the arguments of its caller to those that the model gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from llava.families.continuation import ShortCall, continued, next_step, remember
from llava.families.deep import DeepFeatures, hand_over, handing_over
from llava.families.prompts import PER_TOKEN, ImageColumns, Prompts, Short, shorten
from llava.families.splicing import splice
from llava.model.call_context import asking
from llava.pruning.active import record
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.stage import prune_visual_tokens

if TYPE_CHECKING:
    from llava.families.attachment import Attachment


# The pruned call that `forward` is at, for the hook after it.
_current: ContextVar[ShortCall | None] = ContextVar("pruned call", default=None)
# Whether the caller is inside `generate`, which hands deep features over itself.
_generating: ContextVar[bool] = ContextVar("generating", default=False)


def generate(
    target: Attachment,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Do as the model's own `generate`, with pruned prompts.

    Sequences come back with the prompts of the caller in front, placeholders of dropped tokens
    included, and `max_length` and `min_length` count these.

    Args:
        target: what stands for the model.
        original: its own `generate`.
        args, kwargs: of the caller. `questions`: what is asked about the images, one text a row,
            for methods that read it.
    """
    names = [*inspect.signature(original).parameters]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    ids = call.pop("inputs", None)
    ids = call.pop("input_ids", None) if ids is None else ids
    questions = call.pop("questions", None)
    with nullcontext() if questions is None else asking(questions), torch.no_grad():
        short = continued(target.family, ids, call) or shorten_call(target, ids, call, side="left")
    if short is None:
        given = {} if ids is None else {"inputs": ids}
        with inside_generate(None):
            return original(**given, **call)
    arguments = dict(short.arguments)
    removed = short.length - short.short.columns.shape[1]
    _count_lengths(target.model, arguments, removed)
    _refuse_chunks(arguments)
    if arguments.get("streamer") is not None:
        arguments["streamer"] = _WholePrompt(arguments["streamer"], ids)
    deep = short.deep
    if not takes_embeddings(target.model) and "inputs_embeds" in arguments:
        visual, levels = short.short.visual, [] if deep is None else deep.levels
        deep = DeepFeatures(visual, levels, arguments.pop("inputs_embeds"))
    with inside_generate(deep):
        output = original(inputs=short.ids, **arguments)
    sequences = output if isinstance(output, Tensor) else output.sequences
    whole = _with_prompts(sequences, ids, short.ids.shape[1])
    cache = call.get("past_key_values")
    if not isinstance(output, Tensor):
        output.sequences = whole
        cache = getattr(output, "past_key_values", cache)
    remember(cache, short)
    return whole if isinstance(output, Tensor) else output


def takes_embeddings(model: Any) -> bool:
    """Return whether the model's `generate` takes `inputs_embeds`; it looks at the same names."""
    return "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters


@contextmanager
def inside_generate(deep: DeepFeatures | None) -> Iterator[None]:
    """Leave calls of `forward` as `generate` makes them, but for these features."""
    token = _generating.set(True)
    try:
        with handing_over(deep):
            yield
    finally:
        _generating.reset(token)


def before_forward(
    target: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments that `forward` gets instead; None where nothing changes."""
    _current.set(None)
    if _generating.get():
        return None
    hand_over(None)
    names = [*inspect.signature(target.model.forward).parameters]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    ids = call.pop("input_ids", None)
    step = next_step(target.family, ids, call)
    if step is not None:
        return (), step
    questions = call.pop("questions", None)
    with nullcontext() if questions is None else asking(questions):
        short = shorten_call(target, ids, call, side=_padding_side(call))
    if short is None:
        return None
    hand_over(short.deep)
    _current.set(short)
    return (), short.arguments


def after_forward(output: Any) -> None:
    """Note which cache holds the prompt that `forward` has read."""
    short = _current.get()
    if short is not None:
        _current.set(None)
        hand_over(None)
        remember(getattr(output, "past_key_values", None), short)


def shorten_call(
    target: Attachment, ids: Tensor | None, call: Mapping[str, Any], side: str
) -> ShortCall | None:
    """Prune the images of a call and leave their tokens out of its prompts.

    Args:
        target: what stands for the model.
        ids: LongTensor [B, L].
        call: the other arguments.
        side: where rows are padded.

    Returns:
        None where nothing is pruned: no images, or every budget holds all tokens.

    Raises:
        PruningError: arguments that cannot be pruned, or that do not fit each other.
    """
    family, model, config = target.family, target.model, target.pruning
    family.check(call)
    if config is None or all(call.get(name) is None for name in family.shown):
        if call.get("mm_encoder_outputs"):
            raise PruningError(
                "mm_encoder_outputs were computed without the pruning stage; give pixel_values, or "
                "switch pruning off for this call: with prune(model): ..."
            )
        return None
    if ids is None:
        raise PruningError(
            "images can be pruned in prompts of input_ids only, not in inputs_embeds; pass "
            "input_ids"
        )
    inputs = {name: call.get(name) for name in family.pixels}
    host = ids.cpu()
    mask = call.get("attention_mask")
    if mask is not None and mask.shape != host.shape:
        raise PruningError(
            f"attention_mask must be {[*host.shape]} like input_ids to be pruned, got "
            f"{[*mask.shape]}; make both with one call of the model's processor"
        )
    host_mask = torch.ones_like(host, dtype=torch.bool) if mask is None else mask.cpu().bool()
    found = family.find(model, inputs, host, host_mask)
    if _keeps_all(config, found):
        return None
    visual = family.encode(model, inputs, host, set(config.pruner.collects)).visual
    # Where pictures and videos mix, from the order of the arguments to that of the prompts.
    order = sorted(range(len(found)), key=lambda number: found[number].first)
    images = [found[number] for number in order]
    if order != sorted(order):
        visual = visual.take_images(order)
    visual = family.with_prompts(model, visual, [image.row for image in images], len(ids))
    kept = prune_visual_tokens(visual, config)
    record(target, kept, partial(family.located, model))
    if kept is visual:
        return None
    kept.settle()
    given = call.get("position_ids")
    positions = (
        family.positions(model, call, host, host_mask) if given is None else _as_axes(given.cpu())
    )
    short = shorten(Prompts(host, host_mask, images, positions), kept, side)
    return _short_call(target, ids, call, short, positions, kept)


def _keeps_all(config: PruningConfig, images: Sequence[ImageColumns]) -> bool:
    """Return whether the budget of every prompt holds all tokens of its images."""
    prompts: dict[int, list[int]] = {}
    for image in images:
        prompts.setdefault(image.row, []).append(len(image.columns))
    return config.pruner.budgeted and all(
        config.num_kept_of_prompt(lengths) == lengths for lengths in prompts.values()
    )


def _short_call(
    target: Attachment,
    ids: Tensor,
    call: Mapping[str, Any],
    short: Short,
    positions: Tensor,
    kept: Any,
) -> ShortCall:
    """Put the arguments of the model together."""
    family = target.family
    spliced = splice(family, target.model, ids, short, kept)
    arguments = {name: value for name, value in call.items() if name not in family.pixels}
    mask = call.get("attention_mask")
    arguments["inputs_embeds"] = spliced.embeds
    arguments["attention_mask"] = spliced.mask.to(torch.long if mask is None else mask.dtype)
    arguments["position_ids"] = spliced.position_ids
    for name, padding in PER_TOKEN.items():
        if call.get(name) is not None:
            arguments[name] = short.take(call[name], padding)
    last = positions.amax(dim=(0, 2)) - short.positions.amax(dim=(0, 2))
    return ShortCall(arguments, spliced.ids, short, ids.shape[1], last, spliced.deep)


def _as_axes(position_ids: Tensor) -> Tensor:
    """Return position_ids [B, L], [3, B, L] or [4, B, L] as one axis or three."""
    if position_ids.ndim == 2:
        return position_ids[None]
    return position_ids[-3:]


def _padding_side(call: Mapping[str, Any]) -> str:
    """Return the side on which the caller's rows are padded; left where none is."""
    mask = call.get("attention_mask")
    if mask is None or mask.ndim != 2 or not bool((mask[:, -1] == 0).any()):
        return "left"
    return "right"


def _count_lengths(model: Any, arguments: dict[str, Any], removed: int) -> None:
    """Lower `max_length` and `min_length`, which count the caller's prompt, by what it lost."""
    own = arguments.get("generation_config")
    configs = [model.generation_config] if own is None else [own, model.generation_config]
    for name in ("max_length", "min_length"):
        values = [arguments.get(name), *(getattr(config, name, None) for config in configs)]
        value = next((value for value in values if value is not None), None)
        if value:
            arguments[name] = max(value - removed, 0)


def _refuse_chunks(arguments: Mapping[str, Any]) -> None:
    """Refuse a prompt read in parts: `generate` splits its ids, not its embeddings."""
    own = arguments.get("generation_config")
    size = arguments.get("prefill_chunk_size") or getattr(own, "prefill_chunk_size", None)
    if size:
        raise PruningError(
            f"prefill_chunk_size={size} cannot split a pruned prompt; leave it out, the prompt is "
            "shorter than the unpruned one"
        )


class _WholePrompt(BaseStreamer):
    """Gives a streamer the caller's own prompt instead of the pruned one."""

    def __init__(self, streamer: Any, ids: Tensor) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = ids

    def put(self, value: Tensor) -> None:
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


def _with_prompts(sequences: Tensor, ids: Tensor, length: int) -> Tensor:
    """Put the caller's prompts [B, L] before what follows the pruned ones of `length` columns."""
    times = len(sequences) // len(ids)
    prompts = ids.to(sequences.device).repeat_interleave(times, dim=0)
    return torch.cat([prompts, sequences[:, length:]], dim=1)
