"""The pruning stage: budgets, select, gather, trace. Nothing else compacts tokens."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.pruning.budget import image_budgets, tile_counts
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.layout import NEWLINE
from llava.pruning.merging import merge
from llava.pruning.newlines import choose_with_newlines
from llava.pruning.precision import outside_autocast
from llava.pruning.released import applies_to, check_released, extra_places, released_counts
from llava.pruning.room import fit_prompts
from llava.pruning.selector import Selector
from llava.pruning.tokens import TokenSequence, VisualTokens, raster_slots
from llava.pruning.trace import PruningTrace
from llava.utils import describe_value

logger = logging.getLogger(__name__)


@outside_autocast()
def prune_visual_tokens(visual: VisualTokens, config: PruningConfig | None) -> VisualTokens:
    """Reduce every image of `visual` to `config.num_kept(its tokens)`.

    Scores and selection run without gradients and outside autocast; kept tokens keep their
    gradients. The **same object** comes back when there is nothing to remove (no config, `none`, or
    a budget of at least every image's tokens), so an unpruned run is the unpruned model bit for
    bit.

    Where a prompt leaves less room than that (`visual.prompts`), its images keep what there is, and
    one warning says how many.

    Returns VisualTokens with projected [T, Kmax, D], valid [T, Kmax], kept (or sources), sequences
    and trace. Raises PruningError for NaN or inf tokens and for budgets the method cannot meet.
    """
    if config is None:
        return visual
    asked = image_budgets(visual, config)
    if all(budget is None for budget in asked):
        return visual
    if visual.released:
        check_released(config)
    budgets, lowered = fit_prompts(visual, asked)
    if lowered is None:
        return _prune(visual, config, budgets)
    try:
        pruned = _prune(visual, config, budgets)
    except PruningError as error:  # perhaps of a budget that nobody asked for
        raise PruningError(
            f"{error} ({lowered}; keep fewer tokens or shorten the prompt)"
        ) from error
    logger.warning(
        "%s; visual tokens are dropped before any text is cut: keep fewer tokens or shorten the "
        "prompt to choose the number yourself",
        lowered,
    )
    return pruned


def _prune(visual: VisualTokens, config: PruningConfig, budgets: list[int | None]) -> VisualTokens:
    if config.pruner.merges:
        return merge(visual, config, budgets)
    selector = Selector(visual, config, [i for i, k in enumerate(budgets) if k is not None])
    chosen = _choose(selector, budgets)
    return _compact(selector, budgets, chosen)


def _choose(selector: Selector, budgets: list[int | None]) -> Tensor:
    """BoolTensor over flat ids: what every image keeps."""
    visual, config = selector.visual, selector.config
    if visual.released:
        return _choose_as_released(selector, budgets)

    def pick(patches: list[int | None]) -> Tensor:
        if config.allocation == "global":
            return selector.globally(patches)
        return selector.per_tile(tile_counts(visual, patches))

    return (
        choose_with_newlines(selector, budgets, pick) if config.newline == "keep" else pick(budgets)
    )


def _choose_as_released(selector: Selector, budgets: list[int | None]) -> Tensor:
    """The rules of `llava.pruning.released` for images that they apply to."""
    visual, config = selector.visual, selector.config
    counts = tile_counts(visual, budgets)
    images = {
        image: budget
        for image, budget in enumerate(budgets)
        if budget is not None and applies_to(visual, image)
    }
    for image, budget in images.items():
        shares = released_counts(visual, config, image, budget)
        for tile, share in zip(visual.tiles_of(image), shares, strict=True):
            counts[tile] = share
    chosen = selector.per_tile(counts)
    for image in images:
        chosen[selector.ids[image][extra_places(visual, image)]] = True
    return chosen


def _compact(selector: Selector, budgets: list[int | None], chosen: Tensor) -> VisualTokens:
    """Gather what was chosen, and images kept whole, into [T, Kmax, D]."""
    visual, config = selector.visual, selector.config
    for image, budget in enumerate(budgets):
        if budget is None:
            chosen[selector.ids[image]] = True
    tiles, count = visual.projected.shape[:2]
    kept = raster_slots(chosen[: tiles * count].view(tiles, count))
    filled = kept >= 0
    rows = kept.clamp(min=0)[..., None].expand(-1, -1, visual.projected.shape[-1])
    projected = visual.projected.gather(1, rows).masked_fill(~filled[..., None], 0)
    sequences = _sequences(selector, chosen, kept)
    trace = PruningTrace(
        method=config.pruner.label(visual),
        kept=kept,
        margins=selector.margins,
        tokens_before=[len(ids) for ids in selector.ids],
        tokens_after=[len(sequence.source) for sequence in sequences],
        score_seconds=selector.score_seconds,
        select_seconds=selector.select_seconds,
    )
    return replace(
        visual,
        projected=projected,
        valid=filled,
        kept=kept,
        sequences=sequences,
        original_positions=config.positions == "original",
        trace=trace,
    )


def _sequences(selector: Selector, chosen: Tensor, kept: Tensor) -> tuple[TokenSequence, ...]:
    """Every image's sequence without what was not chosen."""
    tiles, slots = kept.shape
    count = selector.visual.features.shape[1]
    # The slot of every kept patch; the column at the end takes the padding of `kept`.
    slot_of = torch.full((tiles, count + 1), NEWLINE, device=kept.device)
    slot = torch.arange(slots, device=kept.device).expand_as(kept)
    slot_of.scatter_(1, kept.masked_fill(kept < 0, count), slot)
    slot_of = slot_of[:, :count]
    sequences = []
    for image, ids in enumerate(selector.ids):
        place = chosen[ids].nonzero().flatten()
        left = ids[place]
        is_patch = left < tiles * count
        flat = left.masked_fill(~is_patch, 0)
        first = selector.visual.tiles_of(image)[0]
        source = (flat // count - first) * slots + slot_of.flatten()[flat]
        sequences.append(
            TokenSequence(source.masked_fill(~is_patch, NEWLINE), place, total=len(ids))
        )
    return tuple(sequences)


def select(
    method: str,
    *,
    projected: Tensor,
    keep_tokens: int,
    features: Tensor | None = None,
    projector: nn.Module | None = None,
    grid: tuple[int, int] | None = None,
    extras: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Choose tokens of one image without any LLaVA model.

    Args:
        method: registered name of a method that selects.
        projected: floating point [N, D], tokens as the language model would see them.
        keep_tokens: how many to keep; N or more keeps all.
        features: floating point [N, Dv], tokens before the projector, for methods that need them.
        projector: the module between the two, for methods that need it.
        grid: (rows, cols); by default a square if N is one, else a single row.
        extras: what else the method needs, lists of one entry, see `VisualTokens.extras`.
        options: options of the method.

    Returns LongTensor [min(keep_tokens, N)], ascending. Raises PruningError.
    """
    config = PruningConfig.of(method, keep_tokens=keep_tokens, **options)
    for need, value in (("features", features), ("projector", projector)):
        if need in config.pruner.needs and value is None:
            raise PruningError(f"method {method!r} needs {need}=")
    if config.pruner.merges:
        raise PruningError(f"method {method!r} makes new tokens, it has no indices to select")
    _check_tokens("projected", projected)
    if features is not None:
        _check_tokens("features", features)
    count = projected.shape[0]
    visual = VisualTokens(
        features=projected[None, :, :0] if features is None else features[None],
        projected=projected[None],
        projector=nn.Identity() if projector is None else projector,
        image_index=torch.zeros(1, dtype=torch.long),
        grid=_grid(grid, count),
        extras=dict(extras or {}),
    )
    pruned = prune_visual_tokens(visual, config)
    if pruned.kept is None:
        return torch.arange(count, device=projected.device)
    return pruned.kept[0]


def _check_tokens(name: str, tokens: Any) -> None:
    """Raise PruningError unless `tokens` is what `select` takes, floating point [N >= 1, D]."""
    real = isinstance(tokens, Tensor) and tokens.is_floating_point()
    if not real or tokens.ndim != 2 or len(tokens) == 0:
        raise PruningError(
            f"{name} must be the tokens of one image, a floating point tensor [N, D]; "
            f"got {describe_value(tokens)}"
        )


def _grid(grid: Any, count: int) -> tuple[int, int]:
    """(rows, cols) of `count` tokens: as given, or a square, or one row."""
    if grid is None:
        side = round(count**0.5)
        return (side, side) if side * side == count else (1, count)
    pair = isinstance(grid, (tuple, list)) and len(grid) == 2
    if not pair or any(type(edge) is not int or edge < 1 for edge in grid):
        raise PruningError(f"grid must be two whole numbers (rows, cols), got {grid!r}")
    rows, cols = grid
    if rows * cols != count:
        raise PruningError(f"grid {(rows, cols)} does not hold {count} tokens")
    return rows, cols


@outside_autocast()
def importance_of(config: PruningConfig, visual: VisualTokens) -> Tensor:
    """[T, N] raw importance a method gives every token; PruningError if it scores none."""
    with torch.no_grad():
        importance = config.pruner.score(visual)
    if importance is None:
        raise PruningError(f"method {config.method!r} does not score tokens")
    return importance
