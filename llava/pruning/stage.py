"""The pruning stage: budget per tile, select, gather, trace. Nothing else compacts tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.pruning.config import PruningConfig
from llava.pruning.errors import PruningError
from llava.pruning.methods.base import Merged, Outcome
from llava.pruning.tokens import VisualTokens
from llava.pruning.trace import PruningTrace


def prune_visual_tokens(visual: VisualTokens, config: PruningConfig | None) -> VisualTokens:
    """Reduce every image of `visual` to `config.num_kept(its tokens)`.

    Scores and selection run without gradients; kept tokens keep theirs. The **same object** comes
    back when there is nothing to remove (no config, `none`, or a budget of at least every image's
    tokens), so an unpruned run is the unpruned model bit for bit.

    Returns VisualTokens with projected [T, Kmax, D], valid [T, Kmax], kept (or sources), trace.
    Raises PruningError for NaN or inf tokens and for budgets the method cannot meet.
    """
    if config is None:
        return visual
    sizes = visual.tile_sizes()
    counts = tile_counts(visual, config, sizes)
    if counts == sizes:
        return visual
    # Whole and empty tiles need no choice, so they never reach the method.
    work = [t for t, (k, n) in enumerate(zip(counts, sizes, strict=True)) if 0 < k < n]
    outcome = None
    if work:
        outcome = config.pruner.run(visual.subset(work), [counts[t] for t in work])
    return _compact(visual, config, counts, work, outcome)


def tile_counts(visual: VisualTokens, config: PruningConfig, sizes: list[int]) -> list[int]:
    """Tokens every tile keeps: each image's budget, shared out among its tiles."""
    counts = [0] * len(sizes)
    for image in range(visual.num_images):
        tiles = visual.tiles_of(image)
        capacity = [sizes[t] for t in tiles]
        shares = share_out(config.num_kept(sum(capacity)), capacity)
        for tile, share in zip(tiles, shares, strict=True):
            counts[tile] = share
    return counts


def share_out(budget: int, capacity: list[int]) -> list[int]:
    """Per-tile allocation: equal floor shares, the remainder to the first (base) tile.

    What a short tile cannot hold goes to the other tiles in tile order. The result sums to
    min(budget, sum(capacity)).
    """
    if not capacity:
        return []
    floor, rest = divmod(budget, len(capacity))
    shares = [min(floor + (rest if t == 0 else 0), room) for t, room in enumerate(capacity)]
    left = min(budget, sum(capacity)) - sum(shares)
    for tile, room in enumerate(capacity):
        extra = min(left, room - shares[tile])
        shares[tile] += extra
        left -= extra
    return shares


def _compact(
    visual: VisualTokens,
    config: PruningConfig,
    counts: list[int],
    work: list[int],
    outcome: Outcome | None,
) -> VisualTokens:
    """Gather the chosen tokens of worked tiles and the whole tiles into [T, Kmax, D]."""
    device = visual.projected.device
    tiles, slots = len(counts), max(counts, default=0)
    filled = torch.arange(slots)[None] < torch.tensor(counts)[:, None]
    filled = filled.to(device)
    kept = _kept_whole(visual, counts, slots)
    margins = torch.full((tiles, slots), torch.inf, device=device)
    if outcome is not None:
        width = outcome.margins.shape[1]
        margins[work, :width] = outcome.margins.to(margins.dtype)
        if outcome.kept is not None:
            kept[work, :width] = outcome.kept
    rows = kept.clamp(min=0)[..., None].expand(-1, -1, visual.projected.shape[-1])
    projected = visual.projected.gather(1, rows).masked_fill(~filled[..., None], 0)
    sources = None
    if config.pruner.merges:
        merged = outcome.merged if outcome is not None else None
        projected, sources = _place_merged(visual, projected, kept, work, merged)
    trace = PruningTrace(
        method=config.method,
        kept=None if config.pruner.merges else kept,
        margins=margins,
        tokens_before=_per_image(visual, visual.tile_sizes()),
        tokens_after=_per_image(visual, counts),
        score_seconds=outcome.score_seconds if outcome is not None else 0.0,
        select_seconds=outcome.select_seconds if outcome is not None else 0.0,
    )
    return replace(
        visual, projected=projected, valid=filled, kept=trace.kept, sources=sources, trace=trace
    )


def _kept_whole(visual: VisualTokens, counts: list[int], slots: int) -> Tensor:
    """LongTensor [T, slots]: all valid indices of tiles kept whole, -1 everywhere else."""
    device = visual.projected.device
    kept = torch.full((len(counts), slots), -1, dtype=torch.long, device=device)
    for tile, (count, size) in enumerate(zip(counts, visual.tile_sizes(), strict=True)):
        if count == size and size > 0:
            row = torch.arange(visual.projected.shape[1], device=device)
            kept[tile, :size] = row if visual.valid is None else row[visual.valid[tile]]
    return kept


def _place_merged(
    visual: VisualTokens, projected: Tensor, kept: Tensor, work: list[int], merged: Merged | None
) -> tuple[Tensor, Tensor]:
    """Put merged tokens beside tiles kept whole; those are their own single source."""
    tokens = torch.arange(visual.projected.shape[1], device=kept.device)
    sources = kept[..., None] == tokens
    if merged is not None:
        width = merged.projected.shape[1]
        rows = torch.tensor(work, device=kept.device)
        pad = (0, 0, 0, projected.shape[1] - width)
        projected = projected.index_copy(0, rows, nn.functional.pad(merged.projected, pad))
        sources[rows, :width] = merged.sources
    return projected, sources


def _per_image(visual: VisualTokens, per_tile: list[int]) -> list[int]:
    return [sum(per_tile[t] for t in visual.tiles_of(i)) for i in range(visual.num_images)]


def select(
    method: str,
    *,
    projected: Tensor,
    keep_tokens: int,
    features: Tensor | None = None,
    projector: nn.Module | None = None,
    grid: tuple[int, int] | None = None,
    **options: Any,
) -> Tensor:
    """Choose tokens of one image without any LLaVA model.

    Args:
        method: registered name of a method that selects.
        projected: [N, D] tokens as the language model would see them.
        keep_tokens: how many to keep; N or more keeps all.
        features: [N, Dv] tokens before the projector, for methods that need them.
        projector: the module between the two, for methods that need it.
        grid: (rows, cols); by default a square if N is one, else a single row.
        options: options of the method.

    Returns LongTensor [min(keep_tokens, N)], ascending. Raises PruningError.
    """
    config = PruningConfig.of(method, keep_tokens=keep_tokens, **options)
    for need, value in (("features", features), ("projector", projector)):
        if need in config.pruner.needs and value is None:
            raise PruningError(f"method {method!r} needs {need}=")
    if config.pruner.merges:
        raise PruningError(f"method {method!r} makes new tokens, it has no indices to select")
    count = projected.shape[0]
    side = round(count**0.5)
    visual = VisualTokens(
        features=projected[None, :, :0] if features is None else features[None],
        projected=projected[None],
        projector=nn.Identity() if projector is None else projector,
        image_index=torch.zeros(1, dtype=torch.long),
        grid=grid or ((side, side) if side * side == count else (1, count)),
    )
    pruned = prune_visual_tokens(visual, config)
    if pruned.kept is None:
        return torch.arange(count, device=projected.device)
    return pruned.kept[0]


def importance_of(config: PruningConfig, visual: VisualTokens) -> Tensor:
    """[T, N] raw importance a method gives every token; PruningError if it scores none."""
    with torch.no_grad():
        importance = config.pruner.importance(visual)
    if importance is None:
        raise PruningError(f"method {config.method!r} does not score tokens")
    return importance


@contextmanager
def prune(
    model: Any, config: PruningConfig | str | None = None, **settings: Any
) -> Iterator[PruningConfig | None]:
    """`with prune(model, "zoo", keep_tokens=64): model.generate(...)`.

    Works on any object with a `pruning` attribute. The previous setting comes back on exit, also
    after an exception. `prune(model)` switches pruning off inside the block.

    Args:
        model: the model.
        config: a PruningConfig, or a method name with budget and options in `settings`.

    Raises PruningError if the model has no `pruning` attribute or the settings are wrong.
    """
    if not hasattr(model, "pruning"):
        raise PruningError(
            f"{type(model).__name__} has no `pruning` attribute; load the model with "
            "llava.model.builder.load_pretrained_model"
        )
    if isinstance(config, str):
        config = PruningConfig.of(config, **settings)
    elif settings:
        words = ", ".join(sorted(settings))
        raise PruningError(f"{words}: settings go with a method name, prune(model, 'zoo', ...)")
    previous = model.pruning
    model.pruning = config
    try:
        yield config
    finally:
        model.pruning = previous
