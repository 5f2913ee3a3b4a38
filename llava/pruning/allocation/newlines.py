"""`newline="keep"`: patches and the newlines of their rows, together exactly the budget."""

from torch import Tensor

from llava.pruning.allocation.strategy import MethodRun, Selection, Strategy
from llava.pruning.errors import PruningError
from llava.pruning.layout import ImageLayout


def keep_newlines(strategy: Strategy, run: MethodRun, budgets: list[int | None]) -> Selection:
    """Select by `strategy`, and keep the newline of every row that still has a patch.

    At first every row's newline is reserved. What rows without a patch give back goes to more
    patches, half of it at a time, because a new patch may need the newline of its row as well. If
    too little is left for that, it keeps newlines of the first rows without a patch. The host waits
    for every selection, to count its rows.

    Args:
        strategy: selects everything that is not a newline.
        run, budgets: see `Strategy`.

    Raises:
        PruningError: a budget leaves no patch.
    """
    layouts = {
        image: layout
        for image, layout in enumerate(run.visual.layouts or ())
        if layout.newline and budgets[image] is not None
    }
    limits = {image: budgets[image] or 0 for image in layouts}

    def attempt(patches: dict[int, int]) -> tuple[Selection, dict[int, int]]:
        """Select so many patches, and count the rows that they are in."""
        selected = strategy(run, [patches.get(i, k) for i, k in enumerate(budgets)])
        places = selected.places()
        rows = {i: sum(_used_rows(layout, places[i])) for i, layout in layouts.items()}
        return selected, rows

    patches = {i: _without_newlines(i, layout, limits[i]) for i, layout in layouts.items()}
    _, rows = attempt(patches)
    growing = set(layouts)
    while growing:
        more = dict(patches)
        for i in growing:
            step = max(1, (limits[i] - patches[i] - rows[i]) // 2)
            more[i] = min(patches[i] + step, sum(layouts[i].tile_sizes))
        _, needed = attempt(more)
        growing = {i for i in growing if more[i] > patches[i] and more[i] + needed[i] <= limits[i]}
        for i in growing:
            patches[i], rows[i] = more[i], needed[i]
    selected, _ = attempt(patches)
    places = selected.places()
    for i, layout in layouts.items():
        used = _used_rows(layout, places[i])
        # The sort is stable: rows with a patch, then the others from the top.
        order = sorted(range(len(used)), key=[not has_patch for has_patch in used].__getitem__)
        layout.newline_grid(places[i])[order[: limits[i] - patches[i]], -1] = True
    return run.keep_places(places, selected.margins)


def _without_newlines(image: int, layout: ImageLayout, budget: int) -> int:
    """Count the patches of `image` that a budget leaves if all newlines are kept."""
    rows = layout.newline_rows[0]
    if budget <= rows:
        raise PruningError(
            f"newline='keep' reserves {rows} tokens of image {image} for the ends of its rows, "
            f"so {budget} tokens leave none for patches; keep at least {rows + 1}, or use "
            "newline='drop'"
        )
    return min(budget - rows, sum(layout.tile_sizes))


def _used_rows(layout: ImageLayout, places: Tensor) -> list[bool]:
    """Say of every row that a newline ends whether one of its patches is kept."""
    return layout.newline_grid(places)[:, :-1].any(dim=1).tolist()
