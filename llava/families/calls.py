"""A call of a pruned model: from the arguments of its caller to those that the model gets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava.families.between_layers import (
    LayerPruning,
    between_layers,
    check_layers,
    check_next,
    goes_on,
    visual_columns,
)
from llava.families.call_state import current_call, enter_call, inside_generate, leave_call
from llava.families.continuation import PrunedCall, continued, next_step, remember
from llava.families.deep import DeepFeatures
from llava.families.generate_settings import (
    assisted,
    check_settings,
    check_settings_between_layers,
    inferred_mask,
)
from llava.families.prompts import PER_TOKEN, ImageColumns, Prompts, PrunedPrompts, prune_prompts
from llava.families.splicing import splice
from llava.families.whole_prompts import WholePrompts
from llava.model.call_context import asking
from llava.pruning.active import record
from llava.pruning.config import PruningConfig
from llava.pruning.decoder.call import is_decoding
from llava.pruning.errors import PruningError
from llava.pruning.stage import prune_visual_tokens

if TYPE_CHECKING:
    from llava.families.attachment import Attachment


def generate(
    target: Attachment,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Do as the model's own `generate`, with pruned prompts.

    Sequences come back with the prompts of the caller in front, placeholders of dropped tokens
    included. `max_length` and `min_length` count these; streamers, stopping criteria and logits
    processors of the caller see them.

    Args:
        target: what prunes the model.
        original: its own `generate`.
        args, kwargs: arguments of the caller. `questions`: what is asked about the images, one text
            a row, for methods that read it.
    """
    model, module = target.model, target.family.language_model(target.model)
    names = [*inspect.signature(original).parameters]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    ids = call.pop("inputs", None)
    ids = call.pop("input_ids", None) if ids is None else ids
    questions = call.pop("questions", None)
    mask = None if ids is None else inferred_mask(model, call, ids)
    if mask is not None:
        call["attention_mask"] = mask
    with nullcontext() if questions is None else asking(questions), torch.no_grad():
        pruned, layers = _read_prompts(target, ids, call)
    if layers is not None:
        check_settings_between_layers(model, call)
    inside = nullcontext() if layers is None else between_layers(target, layers, generating=True)
    if pruned is None or ids is None:
        given = {} if ids is None else {"inputs": ids}
        with inside_generate(target, module, None, stock=True), inside:
            return original(**given, **call)
    check_settings(model, call, ids)
    whole = WholePrompts(ids, pruned.prompts.width)
    arguments = whole.arguments(model, pruned.arguments)
    deep = pruned.deep
    with ExitStack() as stack:
        if "inputs_embeds" in arguments and not _takes_embeddings(model, arguments):
            levels = [] if deep is None else deep.levels
            deep = DeepFeatures(pruned.prompts.visual, levels, arguments.pop("inputs_embeds"))
            if not target.family.hands_over(model):
                stack.callback(target.hook_language_model().remove)
        stack.enter_context(inside_generate(target, module, deep))
        stack.enter_context(inside)
        output = original(inputs=pruned.ids, **arguments)
    cache = call.get("past_key_values")
    if isinstance(output, Tensor):
        remember(cache, pruned)
        return whole.restored(output)
    output.sequences = whole.restored(output.sequences)
    remember(getattr(output, "past_key_values", cache), pruned)
    return output


def _read_prompts(
    target: Attachment, ids: Tensor | None, call: dict[str, Any]
) -> tuple[PrunedCall | None, LayerPruning | None]:
    """Return what `generate` prunes, or goes on from; images that a cache holds leave `call`."""
    on_cache = goes_on(call.get("past_key_values"))
    pruned = continued(target.family, ids, call)
    if pruned is not None:
        return pruned, LayerPruning() if on_cache else None
    if not on_cache:
        return prune_call(target, ids, call, side="left")
    left = check_next(target.family, target.model, ids, call, whole=True)
    call.clear()
    call.update(left)
    return None, LayerPruning()


def takes_embeddings(model: Any) -> bool:
    """Return whether the model's `generate` takes `inputs_embeds`; it looks at the same names."""
    return "inputs_embeds" in inspect.signature(model.prepare_inputs_for_generation).parameters


def _takes_embeddings(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether this call of `generate` takes them: assisted decoding reads ids alone."""
    return takes_embeddings(model) and not assisted(model, arguments)


def before_forward(
    target: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments that `forward` gets instead; None where nothing changes."""
    outer, family = current_call(), target.family
    names = [*inspect.signature(target.model.forward).parameters]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    shows = any(call.get(name) is not None for name in family.shown)
    generating = outer is not None and outer.generating and outer.target is target
    # `generate` brings images only where it got the caller's; else code inside it does.
    if outer is not None and generating and (outer.stock or not shows) and outer.makes(call):
        return None
    ids, questions = call.pop("input_ids", None), call.pop("questions", None)
    pruned, layers = None, None
    on_cache = goes_on(call.get("past_key_values"))
    step = next_step(family, ids, call)
    if on_cache:
        layers = LayerPruning()
        if step is None:
            left = check_next(family, target.model, ids, call, whole=False)
            step = left if ids is None else {"input_ids": ids, **left}
    elif step is None and target.pruning is not None:
        _refuse_unpruned_cache(call, shows)
        with nullcontext() if questions is None else asking(questions):
            pruned, layers = prune_call(target, ids, call, side=_padding_side(call))
    if pruned is not None or layers is not None or outer is not None:
        # What the call around this one hands over is not for this one.
        target.hold()
        features, undo = None if pruned is None else pruned.deep, ExitStack()
        module = family.language_model(target.model)
        if layers is not None or is_decoding(module):
            own_layers = LayerPruning() if layers is None else layers
            undo.enter_context(between_layers(target, own_layers, generating=False))
        enter_call(target, module, features, pruned, undo)
    if step is not None:
        return (), step
    return None if pruned is None else ((), pruned.arguments)


def after_forward(target: Attachment, kwargs: Mapping[str, Any], output: Any) -> None:
    """End the call of `forward`, also where it failed, and mark the cache that it filled."""
    left, pruned = leave_call(target)
    if not left:
        return
    target.release()
    if pruned is not None and output is not None:
        remember(getattr(output, "past_key_values", None), pruned)
        remember(kwargs.get("past_key_values"), pruned)


def _refuse_unpruned_cache(call: Mapping[str, Any], shows: bool) -> None:
    cache: Any = call.get("past_key_values")
    if shows and hasattr(cache, "get_seq_length") and int(cache.get_seq_length()):
        raise PruningError(
            "an image after a cache cannot be pruned; give the whole prompt without "
            "past_key_values, or switch pruning off for this call: with prune(model): ..."
        )


def prune_call(
    target: Attachment, ids: Tensor | None, call: Mapping[str, Any], side: str
) -> tuple[PrunedCall | None, LayerPruning | None]:
    """Prune the images of a call and leave their tokens out of its prompts.

    Args:
        target: what prunes the model.
        ids: LongTensor [B, L].
        call: the other arguments.
        side: where rows are padded.

    Returns:
        The call, None where nothing is pruned: no images, or every budget holds all tokens. And
        what is to be pruned between layers, None for nothing.

    Raises:
        PruningError: arguments that cannot be pruned, or that do not fit each other.
    """
    family, model, config = target.family, target.model, target.pruning
    family.check(call)
    if config is None or all(call.get(name) is None for name in family.shown):
        _refuse_encoded(config, call)
        return None, None
    check_layers(family, model, config, call.get("past_key_values"))
    host, mask = _on_host(ids, call)
    inputs = {name: call.get(name) for name in family.pixels}
    found = family.find(model, inputs, host, mask)
    locate = partial(family.located, model)
    if _keeps_all(config, found):
        outline = family.outline(model, inputs, host)
        record(target, outline, locate)
        return None, _layer_pruning(config, Prompts(host, mask, found, host[None]), outline)
    visual = family.encode(model, inputs, host, set(config.pruner.collects))
    # Where pictures and videos mix, from the order of the arguments to that of the prompts.
    order = sorted(range(len(found)), key=lambda number: found[number].first)
    images = [found[number] for number in order]
    if order != sorted(order):
        visual = visual.take_images(order)
    visual = family.with_prompts(model, visual, [image.row for image in images], len(host))
    kept = prune_visual_tokens(visual, config)
    record(target, kept, locate)
    if kept is visual:
        unpruned = Prompts(host, mask, images, host[None])
        return None, _layer_pruning(config, unpruned, kept)
    kept.settle()
    given = call.get("position_ids")
    positions = (
        family.positions(model, call, host, mask) if given is None else _as_axes(given.cpu())
    )
    whole = Prompts(host, mask, images, positions)
    prompts = prune_prompts(whole, kept, side)
    pruned = _pruned_call(target, ids, call, prompts, positions, kept)
    return pruned, _layer_pruning(config, whole, kept, prompts)


def _layer_pruning(
    config: PruningConfig, whole: Prompts, tokens: Any, pruned: PrunedPrompts | None = None
) -> LayerPruning | None:
    if config.decoder is None:
        return None
    return LayerPruning(config.decoder, visual_columns(whole, tokens, pruned))


def _refuse_encoded(config: PruningConfig | None, call: Mapping[str, Any]) -> None:
    if config is not None and call.get("mm_encoder_outputs"):
        raise PruningError(
            "mm_encoder_outputs were computed without the pruning stage; give pixel_values, or "
            "switch pruning off for this call: with prune(model): ..."
        )


def _on_host(ids: Tensor | None, call: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return ids [B, L] and BoolTensor mask [B, L] of a call on the CPU.

    Raises:
        PruningError: there are no ids, or the mask is not one entry a token.
    """
    if ids is None:
        raise PruningError(
            "images can be pruned in prompts of input_ids only, not in inputs_embeds; pass "
            "input_ids"
        )
    mask = call.get("attention_mask")
    if mask is None:
        return ids.cpu(), torch.ones(ids.shape, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        got = [*mask.shape] if isinstance(mask, Tensor) else type(mask).__name__
        raise PruningError(
            f"attention_mask must be {[*ids.shape]} like input_ids to be pruned, got {got}; make "
            "both with one call of the model's processor"
        )
    return ids.cpu(), mask.cpu().bool()


def _keeps_all(config: PruningConfig, images: Sequence[ImageColumns]) -> bool:
    """Return whether every image of a prompt keeps all its tokens, as far as budgets say."""
    if config.method == "none":
        return True
    prompts: dict[int, list[int]] = {}
    for image in images:
        prompts.setdefault(image.row, []).append(len(image.columns))
    return config.pruner.budgeted and all(
        config.num_kept_of_prompt(lengths) == lengths for lengths in prompts.values()
    )


def _pruned_call(
    target: Attachment,
    ids: Any,
    call: Mapping[str, Any],
    prompts: PrunedPrompts,
    positions: Tensor,
    kept: Any,
) -> PrunedCall:
    """Put the arguments of the model together."""
    family = target.family
    if isinstance(call.get("logits_to_keep"), Tensor):
        raise PruningError(
            "logits_to_keep as a tensor names columns that a pruned prompt does not have; give how "
            "many of the last logits to keep, or none"
        )
    spliced = splice(family, target.model, ids, prompts, kept)
    arguments = {name: value for name, value in call.items() if name not in family.pixels}
    mask = call.get("attention_mask")
    arguments["inputs_embeds"] = spliced.embeds
    arguments["attention_mask"] = spliced.mask.to(torch.long if mask is None else mask.dtype)
    arguments["position_ids"] = spliced.position_ids
    for name, padding in PER_TOKEN.items():
        if call.get(name) is not None:
            arguments[name] = prompts.take(call[name], padding)
    shift = positions.amax(dim=(0, 2)) - prompts.positions.amax(dim=(0, 2))
    return PrunedCall(arguments, spliced.ids, prompts, ids.shape[1], shift, spliced.deep)


def _as_axes(position_ids: Tensor) -> Tensor:
    """Return position_ids [B, L], [3, B, L] or [4, B, L] as one axis or three."""
    if position_ids.ndim == 2:
        return position_ids[None]
    return position_ids[-3:]


def _padding_side(call: Mapping[str, Any]) -> str:
    """Return the side on which the caller's rows are padded; left where none is."""
    mask = call.get("attention_mask")
    padded = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, -1] == 0).any())
    return "right" if padded else "left"
