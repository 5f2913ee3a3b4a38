"""What the language model reads equals recorded runs of the methods' released repositories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from official import Official, cases

from llava.anyres import RELEASED_GRIDS, select_filled_resolution
from llava.mm_utils import select_best_resolution
from llava.pruning import PruningConfig

WRAP = {"wrap_neighbours": True}


def check(
    case: Official,
    run: dict[str, Any],
    config: PruningConfig,
    record_error,
    suffix: str = "",
    settings: Mapping[str, Any] | None = None,
    **how: Any,
) -> None:
    got = case.embeds(config, settings or {}, **how)
    want = case.outputs[f"{run['key']}__inputs_embeds{suffix}"]
    assert got.shape == want.shape
    error = float((got - want).abs().max())
    record_error(f"{case.about['method']} model: inputs_embeds", error)
    assert error < 1e-4


@pytest.mark.parametrize("name", cases("prumerge", "e2e_v15*") + cases("prumerge-plus", "e2e_v15*"))
def test_prumerge(name: str, record_error) -> None:
    case = Official(name)
    for run in case.about["runs"]:
        config = PruningConfig.of(case.about["method"], keep_tokens=575, adaptive=True)
        check(case, run, config, record_error)


@pytest.mark.parametrize("name", cases("hiprune", "e2e_v15*"))
def test_hiprune(name: str, record_error) -> None:
    case = Official(name)
    for run in case.about["runs"]:
        # The released code divides its budget among all images of a call.
        budget = run["k"] // len(run["crops"])
        config = PruningConfig.of("hiprune", keep_tokens=budget, alpha=run["alpha"], **WRAP)
        check(case, run, config, record_error)


@pytest.mark.parametrize("name", cases("scope", "e2e_v15*"))
def test_scope(name: str, record_error) -> None:
    case = Official(name)
    for run in case.about["runs"]:
        # The released code divides its budget among all images of a call.
        config = PruningConfig("scope", keep_tokens=run["k"] // len(run["crops"]))
        check(case, run, config, record_error)


@pytest.mark.parametrize("name", cases("fastervlm", "e2e_v15*"))
def test_fastervlm(name: str, record_error) -> None:
    case = Official(name)
    for run in case.about["runs"]:
        check(case, run, PruningConfig("fastervlm", keep_tokens=run["k"]), record_error)


@pytest.mark.parametrize("name", cases("vispruner", "e2e_v15*"))
def test_vispruner(name: str, record_error) -> None:
    case = Official(name)
    for run in case.about["runs"]:
        config = PruningConfig.of("vispruner", keep_tokens=run["k"], important_ratio=run["r"])
        check(case, run, config, record_error, "_f64run", dtype=torch.float64)


# LLaVA-1.6. A budget for every tile, times five; HiPrune and SCOPE name that of all tiles.
SPATIAL = {"mm_next_protocol": "spatial"}
FILLED = {"mm_next_protocol": "spatial-filled"}


@pytest.mark.parametrize("name", cases("fastervlm", "e2e_v16*"))
def test_fastervlm_in_tiles(name: str, record_error) -> None:
    case = Official(name)
    for run in case.about["runs"]:
        config = PruningConfig("fastervlm", keep_tokens=5 * run["k"])
        check(case, run, config, record_error, settings=FILLED)
        (size,) = case.about["image_sizes_wh"]
        for rule, key in ((select_filled_resolution, ""), (select_best_resolution, "_of_llava")):
            canvases = [(336 * cols, 336 * rows) for cols, rows in RELEASED_GRIDS]
            assert list(rule(tuple(size), canvases)) == run[f"canvas_wh{key}"]


@pytest.mark.parametrize("name", cases("hiprune", "e2e_v16*"))
def test_hiprune_in_tiles(name: str, record_error) -> None:
    case = Official(name)
    for run in case.about["runs"]:
        config = PruningConfig.of("hiprune", keep_tokens=run["k"], alpha=run["alpha"], **WRAP)
        check(case, run, config, record_error, settings=SPATIAL)


@pytest.mark.parametrize("name", cases("scope", "e2e_v16*"))
def test_scope_in_tiles(name: str, record_error) -> None:
    case = Official(name)
    for run in case.about["runs"]:
        config = PruningConfig("scope", keep_tokens=run["k"])
        check(case, run, config, record_error, settings=SPATIAL)


@pytest.mark.parametrize("name", cases("mmtok", "e2e_v16*"))
def test_mmtok_in_tiles(name: str, record_error) -> None:
    case = Official(name)
    words = case.inputs["word_ids"]
    for run in case.about["runs"]:
        config = PruningConfig("mmtok", keep_tokens=5 * run["k"])
        check(case, run, config, record_error, settings=SPATIAL, word_ids=words)


@pytest.mark.parametrize("name", cases("visionzip", "tower_v16*"))
def test_visionzip_in_tiles(name: str, record_error) -> None:
    case = Official(name)
    for run in case.about["runs"]:
        few, per_tile = run["contextual"], run["tokens_per_view"]
        run["key"] = f"dom{run['dominant_patches']}_ctx{few}"
        config = PruningConfig.of("visionzip", keep_tokens=5 * per_tile, contextual=few)
        check(case, run, config, record_error, settings=SPATIAL)
