"""How much work the stage hands to an accelerator: launches, counted on tensors without data.

Seconds would not tell, on a machine without a GPU. Kernels are stood in for by functions of the
same shapes, which count their launches.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava.pruning import PruningConfig, VisualTokens, prune_visual_tokens
from llava.pruning.importance import normalise, sensitivity
from llava.pruning.selection import max_min
from llava.pruning.selection.rows import Picks

# Operations that start nothing on a device: other views of a tensor, and memory without content.
FREE = ("alias", "as_strided", "detach", "diagonal", "empty", "expand", "flatten", "lift_fresh")
FREE += ("new_empty", "permute", "reshape", "select", "slice", "split", "squeeze", "t", "transpose")
FREE += ("unbind", "unflatten", "unsqueeze", "view", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Names of the operations that start work on tensors of an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        first = made[0] if isinstance(made, (tuple, list)) else made
        name = func.overloadpacket.__name__
        if isinstance(first, Tensor) and first.is_meta and name not in FREE:
            self.names.append(name)
        return made


def kernel_module(name: str, **functions: Any) -> ModuleType:
    module = ModuleType(f"llava.pruning.kernels.{name}")
    vars(module).update(functions)
    return module


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """A counter, with kernels "usable" on tensors without data."""
    launches = Launches()

    def empty(kind: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        launches.names.append(kind)
        return torch.empty(shape, dtype=dtype, device="meta")

    def picks(gram, scale, weights, score, valid, counts, width, combine="multiply") -> Picks:
        rows = len(score)
        indices = torch.empty(rows, width, dtype=torch.long, device="meta")
        return Picks(indices, empty("kernel: max-min", rows, width))

    def derivative(hidden, kind, centre, slope, dtype) -> tuple[Tensor, Tensor]:
        made = empty("kernel: derivative", *hidden.shape, dtype=dtype)
        return made, torch.empty(len(hidden), device="meta")

    def form(d, u, linear=None, constant=None, width=1) -> Tensor:
        launches.names.append("kernel: join")
        return empty("kernel: triangle", len(d))

    fakes = [
        kernel_module("max_min", max_min_picks=picks),
        kernel_module("normalise", min_max=lambda s, v, f: empty("kernel: min-max", *s.shape)),
        kernel_module(
            "quadratic",
            derivative_kind=lambda act: "gelu",
            centred_derivative=derivative,
            quadratic_form=form,
        ),
    ]
    for fake in fakes:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        parent, _, name = fake.__name__.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], name, fake, raising=False)
    for module in (max_min, normalise, sensitivity):
        monkeypatch.setattr(module, "usable", lambda *_: True)
    return launches


def tokens(tiles: int, *, hidden: bool) -> VisualTokens:
    """LLaVA-1.5-7B's shapes in bfloat16, without data."""

    def without_data(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    layers = nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 4096)
    projector = nn.Sequential(*layers).to("meta", torch.bfloat16)
    return VisualTokens(
        without_data(tiles, 576, 1024),
        without_data(tiles, 576, 4096),
        projector,
        torch.zeros(tiles, dtype=torch.long),
        (24, 24),
        extras={"projector_hidden": [*without_data(tiles, 576, 4096)]} if hidden else {},
    )


def launches_of(counted: Launches, method: str, keep: int, tiles: int, hidden: bool) -> list[str]:
    visual = tokens(tiles, hidden=hidden)
    config = PruningConfig(method, keep_tokens=keep, **COMPUTE)
    prune_visual_tokens(visual, config)  # what is made once
    counted.names.clear()
    with counted:
        prune_visual_tokens(visual, config)
    return [*counted.names]


COMPUTE = {"compute": "bf16"}


@pytest.mark.parametrize(
    ("method", "tiles", "most"),
    [
        ("zoo-exact", 1, 22),
        ("zoo-exact", 5, 40),
        ("divprune", 1, 26),
        ("divprune", 5, 46),
        # 2 * 576 * 64 activations and their products, in chunks that memory allows.
        ("zoo", 1, 230),
        ("zoo", 5, 1040),
    ],
)
def test_launches(counted: Launches, method: str, tiles: int, most: int) -> None:
    names = launches_of(counted, method, 64 * tiles, tiles, hidden=True)
    assert len(names) <= most, names


@pytest.mark.parametrize("method", ["zoo-exact", "divprune"])
def test_launches_do_not_grow_with_the_budget(counted: Launches, method: str) -> None:
    few = launches_of(counted, method, 64, 1, hidden=True)
    assert launches_of(counted, method, 192, 1, hidden=True) == few


def test_the_first_layer_is_not_computed_again(counted: Launches) -> None:
    """Given its pre-activations, the one product left to the stage is that of similarities."""
    assert launches_of(counted, "zoo-exact", 64, 1, hidden=True).count("mm") == 1
    again = launches_of(counted, "zoo-exact", 64, 1, hidden=False)
    assert again.count("mm") + again.count("addmm") == 2
