"""The pruning stage: count budgets, select or merge, gather what is left."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from llava.pruning.allocation import choose_strategy, image_budgets
from llava.pruning.allocation.budgets import fit_prompts, tile_counts
from llava.pruning.allocation.strategy import (
    MethodRun,
    Selection,
    Strategy,
    filled_slots,
    places_of,
    renumbered,
    whole_tiles,
)
from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.indices import constant, gather_slots
from llava.pruning.late_checks import LateChecks, collecting
from llava.pruning.precision import outside_autocast
from llava.pruning.ragged import RaggedTokens
from llava.pruning.selection.rows import Merged
from llava.pruning.sequences import TokenSequence
from llava.pruning.tokens import ImageTokens, PrunedTokens, VisualTokens
from llava.utils import describe_value


@outside_autocast()
def prune_visual_tokens(
    visual: VisualTokens | RaggedTokens, config: PruningConfig | None
) -> ImageTokens:
    """Reduce every image of `visual` to `config.num_kept(its tokens)`.

    Scores and selection run without gradients and outside autocast; kept tokens keep their
    gradients. The same object comes back when there is nothing to remove (no config, `none`, or
    a budget of at least every image's tokens), so an unpruned run is the unpruned model bit for
    bit.

    Where a prompt leaves less room than that (`visual.prompts`), its images keep what there is, and
    one warning says how many.

    Images of different grids (`RaggedTokens`) are pruned group by group, each as it would be alone;
    their budgets are counted over all groups at once.

    Returns:
        PrunedTokens, or RaggedTokens of them; or `visual` itself.

    Raises:
        PruningError: NaN or inf tokens, or a budget that the method cannot meet.
    """
    if config is None:
        return visual
    asked = image_budgets(visual, config)
    if all(budget is None for budget in asked):
        return visual
    strategy = choose_strategy(visual, config)
    with fit_prompts(visual, asked) as budgets:
        if isinstance(visual, RaggedTokens):
            return _prune_groups(visual, config, strategy, budgets)
        return _prune(visual, config, strategy, budgets)


def _prune(
    visual: VisualTokens, config: PruningConfig, strategy: Strategy, budgets: list[int | None]
) -> PrunedTokens:
    """Reduce every image to its budget; None keeps all of it."""
    visual = replace(visual, compute=config.compute)
    with collecting() as checks:
        run = MethodRun(visual, config, budgets)
        pruned = _merge(run) if config.pruner.merges else _gather(run, strategy(run, budgets))
    pruned.checks = LateChecks([*visual.checks, *checks])
    return pruned


def _prune_groups(
    visual: RaggedTokens, config: PruningConfig, strategy: Strategy, budgets: list[int | None]
) -> RaggedTokens:
    """Reduce every image of every group to its budget; None keeps all of it."""
    groups = tuple(
        _prune(group, config, strategy, [budgets[image] for image in visual.images_of(number)])
        for number, group in enumerate(visual.encoded)
    )
    pruned = RaggedTokens(groups, visual.places)
    pruned.deep = pruned.deep_left(visual.deep)
    pruned.trace = pruned.join_traces()
    return pruned


def _gather(run: MethodRun, selected: Selection) -> PrunedTokens:
    """Gather what was selected into [T, Kmax, D]."""
    kept, padded, sequences, margins = selected
    projected = gather_slots(run.visual.projected, kept, padded)
    return run.result(projected, kept >= 0, sequences, margins, kept=kept)


def _merge(run: MethodRun) -> PrunedTokens:
    """Replace the tokens of every tile that has too many by new ones; newlines go.

    An image without a budget keeps its tokens and newlines; they are their own single source.
    """
    visual, counts = run.visual, tile_counts(run.visual, run.budgets)
    sizes, device = visual.tile_sizes(), visual.projected.device
    whole = [k if k == n else 0 for k, n in zip(counts, sizes, strict=True)]
    work = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if 0 < k < n]
    merged = None
    if work:  # a budget of all patches only drops newlines
        asked = [counts[tile] for tile in work]
        merged = run.merge(visual.subset(work), asked)
        for tile, count in zip(work, merged.counts or asked, strict=True):
            counts[tile] = count
    width = max(counts)
    kept, margins = whole_tiles(visual, whole, width)
    projected, sources, places, _ = Merged.as_picked(visual, kept, whole)
    if merged is not None:
        at, free = constant(tuple(work), device), width - merged.projected.shape[1]
        projected = projected.index_copy(0, at, pad(merged.projected, (0, 0, 0, free)))
        sources = sources.index_copy(0, at, pad(merged.sources, (0, 0, 0, free)))
        if merged.places is not None:
            places = kept.index_copy(0, at, pad(merged.places, (0, free)))
    sequences = [
        renumbered(run, image, width)
        if budget is None
        else _merged_sequence(visual, image, counts, places, width)
        for image, budget in enumerate(run.budgets)
    ]
    filled = torch.arange(width, device=device) < constant(tuple(counts), device)[:, None]
    return run.result(projected, filled, sequences, margins, sources=sources)


def _merged_sequence(
    visual: VisualTokens, image: int, counts: list[int], places: Tensor | None, width: int
) -> TokenSequence:
    """Return the merged tokens of an image in reading order, see `Merged.places`.

    Args:
        visual: the tokens before.
        image: its number.
        counts: tokens of every tile.
        places: LongTensor [T, width]; None for the order of the tiles' own tokens.
        width: slots of a tile.
    """
    tiles = visual.tiles_of(image)
    own = slice(tiles[0], tiles[-1] + 1)
    source = filled_slots(tuple(counts[own]), width, visual.projected.device)
    total = visual.lengths()[image]
    place_of = places_of(visual, image, own)
    if places is None:
        return TokenSequence(source, None, total, place_of)
    place, tile = places[own].flatten()[source], source // width
    patch = tile * visual.projected.shape[1] + place.clamp(min=0)
    rank = patch if place_of is None else place_of[patch]
    key = torch.where(place >= 0, rank, total * -place)
    # The base view stays as it is, before everything else; the sort is stable.
    order = key.masked_fill(tile == 0, -1).argsort(stable=True)
    return TokenSequence(source[order], None, total, place_of)


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
    """Select tokens of one image without any LLaVA model.

    Args:
        method: registered name of a method that selects.
        projected: floating point [N, D], tokens as the language model would see them.
        keep_tokens: how many to keep; N or more keeps all.
        features: floating point [N, Dv], tokens before the projector, for methods that need them.
        projector: the module between the two, for methods that need it.
        grid: (rows, cols); by default a square if N is one, else a single row.
        extras: what else the method needs, lists of one entry, see `VisualTokens.extras`.
        options: options of the method.

    Returns:
        LongTensor [min(keep_tokens, N)], ascending.

    Raises:
        PruningError: an input or a setting that the method cannot take.
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
    pruned.settle()
    if pruned.kept is None:
        return torch.arange(count, device=projected.device)
    return pruned.kept[0]


def _check_tokens(name: str, tokens: Any) -> None:
    """Refuse `tokens` that are not floating point [N >= 1, D]."""
    real = isinstance(tokens, Tensor) and tokens.is_floating_point()
    if not real or tokens.ndim != 2 or len(tokens) == 0:
        raise PruningError(
            f"{name} must be the tokens of one image, a floating point tensor [N, D]; "
            f"got {describe_value(tokens)}"
        )


def _grid(grid: Any, count: int) -> tuple[int, int]:
    """Return (rows, cols) of `count` tokens: as given, or a square, or one row."""
    if grid is None:
        side = round(count**0.5)
        return (side, side) if side * side == count else (1, count)
    pair = isinstance(grid, (tuple, list)) and len(grid) == 2
    if not pair or any(type(edge) is not int or edge < 1 for edge in grid):
        raise PruningError(f"grid must be two whole numbers (rows, cols), got {grid!r}")
    return grid[0], grid[1]


@outside_autocast()
def importance_of(config: PruningConfig, visual: VisualTokens) -> Tensor:
    """Return the raw scores [T, N] that the method of `config` gives every token.

    Raises:
        PruningError: the method does not score tokens.
    """
    visual.settle()
    with torch.no_grad(), collecting() as checks:
        importance = config.pruner.score(replace(visual, compute=config.compute))
    checks.settle()
    if importance is None:
        raise PruningError(f"method {config.method!r} does not score tokens")
    return importance
