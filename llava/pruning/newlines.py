"""newline="keep": patches and the newlines of their rows, together exactly the budget."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.layout import ImageLayout
from llava.pruning.selector import Selector

Pick = Callable[[list[int | None]], Tensor]


def choose_with_newlines(selector: Selector, budgets: list[int | None], pick: Pick) -> Tensor:
    """BoolTensor over flat ids: patches, and the newlines of rows that still have a patch.

    At first every row's newline is reserved. What rows without a patch give back goes to more
    patches, half of it at a time, because a new patch may need the newline of its row as well. A
    rest of too little for that keeps newlines of the first rows without a patch.

    Args:
        budgets: tokens of every image, None for images kept whole.
        pick: chooses the given number of patches of every image.

    Raises PruningError where a budget leaves no patch.
    """
    layouts = _layouts_with_newlines(selector, budgets)
    patches = list(budgets)
    for image, (layout, budget) in layouts.items():
        rows = layout.newline_rows[0]
        if budget <= rows:
            raise PruningError(
                f"newline='keep' reserves {rows} tokens of image {image} for the ends of its rows, "
                f"so {budget} tokens leave none for patches; keep at least {rows + 1}, or use "
                "newline='drop'"
            )
        patches[image] = min(budget - rows, sum(layout.tile_sizes))
    spent = _spent(selector, layouts, patches, pick(patches))
    growing = set(layouts)
    while growing:
        trial = list(patches)
        for image in growing:
            layout, budget = layouts[image]
            more = spent[image][0] + max(1, (budget - sum(spent[image])) // 2)
            trial[image] = min(more, sum(layout.tile_sizes))
        attempt = _spent(selector, layouts, trial, pick(trial))
        growing = {
            image
            for image in growing
            if attempt[image][0] > spent[image][0] and sum(attempt[image]) <= layouts[image][1]
        }
        for image in growing:
            patches[image], spent[image] = trial[image], attempt[image]
    chosen = pick(patches)
    for image, (layout, budget) in layouts.items():
        used = _rows_with_patches(selector, layout, chosen, image)
        empty = [row for row, has_patch in enumerate(used) if not has_patch]
        rows_kept = [row for row, has_patch in enumerate(used) if has_patch]
        rows_kept += empty[: budget - sum(spent[image])]
        chosen[layout.newline_grid(selector.ids[image])[rows_kept, -1]] = True
    return chosen


def _layouts_with_newlines(
    selector: Selector, budgets: list[int | None]
) -> dict[int, tuple[ImageLayout, int]]:
    """Layout and budget of every image that has newlines and something to remove."""
    return {
        image: (layout, budget)
        for image, (layout, budget) in enumerate(
            zip(selector.visual.layouts or (), budgets, strict=False)
        )
        if layout.newline and budget is not None
    }


def _spent(
    selector: Selector,
    layouts: dict[int, tuple[ImageLayout, int]],
    patches: list[int | None],
    chosen: Tensor,
) -> dict[int, tuple[int, int]]:
    """(patches, newlines that they need) of every image in `layouts`."""
    return {
        image: (patches[image] or 0, sum(_rows_with_patches(selector, layout, chosen, image)))
        for image, (layout, _) in layouts.items()
    }


def _rows_with_patches(
    selector: Selector, layout: ImageLayout, chosen: Tensor, image: int
) -> list[bool]:
    """For every row that a newline ends: whether one of its patches is chosen."""
    ids = layout.newline_grid(selector.ids[image])
    return chosen[ids[:, :-1]].any(dim=1).tolist()
