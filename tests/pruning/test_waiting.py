"""Scores and selections read no tensor values on an accelerator: they run on meta tensors.

Meta tensors have shapes but no data, so whatever would make the host wait for the device raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from pruning_inputs import GRID, N, visual_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava.model.layouts import padding_mask
from llava.pruning import (
    PruningConfig,
    RaggedTokens,
    VisualTokens,
    get_method,
    list_methods,
    prune_visual_tokens,
)
from llava.pruning.late_checks import collecting
from llava.pruning.layout import ImageLayout
from llava.pruning.method import Merged, Picks, PruningMethod
from llava.pruning.registry import make_method

# Methods that wait, and why they must.
WAITING = {
    "agilepruner": "its threshold is a function of eigenvalues, whose solver waits by itself, and "
    "how many tokens each step removes depends on it",
    "prumerge": "how many neighbours are merged twice is part of the shapes",
    "prumerge-plus": "as prumerge",
}
# Options to look at beside the defaults.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cdpruner": [{"relevance": "none", "tokens": "projected"}],
    "cen-prune": [{"host": "cdpruner"}, {"host": "zoo-exact", "form": "qwen"}],
    "divprune": [{"precision": "model"}],
    "fopru": [{"strategy": "row"}],
    "hiprune": [{"wrap_neighbours": False, "alpha": 2.0}],
    "mmtok": [{"text": "none"}],
    "scope": [{"combine": "sum"}],
    "visionzip": [{"ctx_merge": "mean"}],
    "vispruner": [{"important_ratio": 0.2}],
    "zoo": [{"fusion": "sum"}],
    "zoo-exact": [{"fusion": "sensitivity"}],
}
SIZES = (N, 24)


def on_meta(value: Any) -> Any:
    """Visual tokens, and everything in them, without data; what the host knows stays."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [on_meta(part) for part in value]
    return value


def without_data(name: str, *, padded: bool) -> VisualTokens:
    visual = visual_for(name, 2)
    valid = torch.ones(2, *GRID, dtype=torch.bool)
    valid[1, 4:] = False
    blank = torch.zeros(2, N, dtype=torch.bool)
    return replace(
        visual,
        features=on_meta(visual.features),
        projected=on_meta(visual.projected),
        projector=visual.projector.to("meta"),
        valid=on_meta(valid.view(2, N)) if padded else None,
        sizes=SIZES if padded else (N, N),
        blank=on_meta(blank),
        extras={key: on_meta(extra) for key, extra in visual.extras.items()},
    )


class NoCopies(TorchDispatchMode):
    """Refuse copies from the CPU to the device for which the host would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        values = args if func is torch.ops.aten.copy_.default else (made, *args)
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            to, source = values[:2]
            wait = not (args[2:] or [(kwargs or {}).get("non_blocking", False)])[0]
            if to.is_meta and not source.is_meta and wait:
                raise RuntimeError(f"{list(source.shape)} numbers are copied to the device")
        return made


def run(method: PruningMethod, visual: VisualTokens) -> Picks | Merged:
    """Score and select, or merge, 9 tokens of one tile and 5 of the other."""
    counts = torch.tensor([9, 5])
    with torch.no_grad(), collecting():
        if method.merges:
            return method.merge(visual, counts)
        return method.select(method.rows(visual, method.score(visual), counts))


def check(method: PruningMethod, name: str, *, padded: bool) -> None:
    visual = without_data(name, padded=padded)
    run(method, visual)  # directions and the like are copied to a device once
    with NoCopies():
        made = run(method, visual)
    tokens = made.projected if isinstance(made, Merged) else made.indices
    assert tokens.is_meta
    assert tokens.shape[:2] == (2, 9)


METHODS = [name for name in list_methods() if get_method(name).budgeted]


def cases() -> Iterator[Any]:
    """Every method that need not wait, with each of the options."""
    for name in sorted(set(METHODS) - set(WAITING)):
        for options in [{}, *OPTIONS.get(name, ())]:
            yield pytest.param(name, options, id=f"{name} {options or ''}")


@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_whole_tiles(name: str, options: dict[str, Any]) -> None:
    check(make_method(name, options), options.get("host", name), padded=False)


@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_padded_tiles(name: str, options: dict[str, Any]) -> None:
    if name in ("grid", "pool"):
        pytest.skip("the rectangle of a padded tile is read from its mask")
    check(make_method(name, options), options.get("host", name), padded=True)


def image_of_tiles(name: str) -> VisualTokens:
    """An image of LLaVA-1.6: base view and 2 x 2 crops, with padding and newlines."""
    layout = ImageLayout(GRID, crops=(2, 2), window=(2, 0, 8, 12), newline=True)
    visual = visual_for(name, 5, owners=[0] * 5, valid=padding_mask([layout]))
    return replace(visual, layouts=(layout,), newline=torch.ones(visual.projected.shape[-1]))


@pytest.mark.parametrize("tiled", [False, True], ids=["images", "tiles"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - set(WAITING)))
def test_the_whole_stage(name: str, tiled: bool) -> None:
    if tiled and name in ("grid", "pool"):
        pytest.skip("the rectangle of a padded tile is read from its mask")
    visual = image_of_tiles(name) if tiled else visual_for(name, 2)
    tensors = ("features", "projected", "valid", "newline")
    visual = replace(
        visual,
        projector=visual.projector.to("meta"),
        extras={key: on_meta(extra) for key, extra in visual.extras.items()},
        **{field: on_meta(getattr(visual, field)) for field in tensors},
    )
    config = PruningConfig(name, keep_tokens=12)
    prune_visual_tokens(visual, config)
    with NoCopies():
        pruned = prune_visual_tokens(visual, config)
    assert len(pruned.checks) > 0
    for image in range(visual.num_images):
        assert pruned.embeddings(image).shape == (12, visual.projected.shape[-1])


@pytest.mark.parametrize("name", ["zoo-exact", "visionzip"])
def test_images_of_different_grids(name: str) -> None:
    """Nor does it wait to put groups together, or for the coordinates of what is left."""
    images = []
    for grid in (GRID, (4, 6), GRID):
        visual = visual_for(name, 1, grid=grid)
        tensors = {field: on_meta(getattr(visual, field)) for field in ("features", "projected")}
        extras = {key: on_meta(extra) for key, extra in visual.extras.items()}
        projector = visual.projector.to("meta")
        images.append(replace(visual, projector=projector, extras=extras, **tensors))
    ragged, config = RaggedTokens.of(images), PruningConfig(name, keep_tokens=12)

    def use() -> RaggedTokens:
        pruned = prune_visual_tokens(ragged, config)
        for image, grid in enumerate((GRID, (4, 6), GRID)):
            coordinates = torch.empty(3, grid[0] * grid[1], dtype=torch.long, device="meta")
            assert pruned.mean_place(image, coordinates).shape == (3, 12)
            assert pruned.embeddings(image).shape == (12, visual.projected.shape[-1])
        return pruned

    use()
    with NoCopies():
        pruned = use()
    assert len(pruned.checks) == sum(len(group.checks) for group in pruned.groups) > 0


@pytest.mark.parametrize("name", WAITING)
def test_methods_that_wait_still_do(name: str) -> None:
    """Else the list above would be longer than it has to be."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(make_method(name, {}), without_data(name, padded=False))


def test_a_look_at_a_value_is_noticed() -> None:
    visual = without_data("norm", padded=False)
    with pytest.raises((RuntimeError, NotImplementedError)):
        visual.projected.amax().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((visual.projected > 0).all())
    numbers = torch.arange(3)
    with NoCopies():
        numbers.to("meta", non_blocking=True)
        with pytest.raises(RuntimeError, match="copied"):
            numbers.to("meta")
        with pytest.raises(RuntimeError, match="copied"):
            torch.empty(3, device="meta", dtype=torch.long).copy_(numbers)
