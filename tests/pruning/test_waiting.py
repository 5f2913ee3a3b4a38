"""Scores and selections read no tensor values on an accelerator: they run on meta tensors.

Meta tensors have shapes but no data, so whatever would make the host wait for the device raises.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pruning_inputs import GRID, N, visual_for
from torch import Tensor

from llava.pruning import VisualTokens, get_method, list_methods
from llava.pruning.late_checks import collecting
from llava.pruning.method import Merged, Picks, PruningMethod
from llava.pruning.registry import make_method

# Methods that wait, and why they must.
WAITING = {
    "agilepruner": "its threshold is a function of eigenvalues, whose solver waits by itself, and "
    "how many tokens each step removes depends on it",
    "prumerge": "how many neighbours are merged twice is part of the shapes",
    "prumerge-plus": "as prumerge",
}
# Options that wait, beside defaults that do not.
OPTIONS = [
    ("cen-prune", {"host": "cdpruner"}),
    ("cen-prune", {"host": "zoo-exact", "form": "qwen"}),
    ("cdpruner", {"relevance": "none", "tokens": "projected"}),
    ("divprune", {"precision": "model"}),
    ("fopru", {"strategy": "row"}),
    ("hiprune", {"wrap_neighbours": False, "alpha": 2.0}),
    ("mmtok", {"text": "none"}),
    ("scope", {"combine": "sum"}),
    ("visionzip", {"ctx_merge": "mean"}),
    ("vispruner", {"important_ratio": 0.2}),
    ("zoo", {"fusion": "sum"}),
    ("zoo-exact", {"fusion": "sensitivity"}),
]
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


def run(method: PruningMethod, visual: VisualTokens) -> Picks | Merged:
    """Score and select, or merge, 9 tokens of one tile and 5 of the other."""
    counts = torch.tensor([9, 5])
    with torch.no_grad(), collecting():
        if method.merges:
            return method.merge(visual, counts)
        return method.select(method.rows(visual, method.score(visual), counts))


METHODS = [name for name in list_methods() if get_method(name).budgeted]


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(WAITING)))
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_no_method_waits(name: str, padded: bool) -> None:
    if padded and name in PLACES:
        pytest.skip(PLACES[name])
    made = run(make_method(name, {}), without_data(name, padded=padded))
    tokens = made.projected if isinstance(made, Merged) else made.indices
    assert tokens.is_meta
    assert tokens.shape[:2] == (2, 9)


PLACES = dict.fromkeys(("grid", "pool"), "the rectangle of a padded tile is read from its mask")


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_no_option_waits(name: str, options: dict[str, Any], padded: bool) -> None:
    method = make_method(name, options)
    host = options.get("host", name)
    assert run(method, without_data(host, padded=padded))[0].is_meta


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
