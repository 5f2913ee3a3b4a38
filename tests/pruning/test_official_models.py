"""What the language model reads equals recorded runs of the methods' released repositories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from official import Official, cases

from llava.pruning import PruningConfig

WRAP = {"wrap_neighbours": True}


def check(
    case: Official,
    run: dict[str, Any],
    config: PruningConfig,
    record_error,
    suffix: str = "",
    **how: Any,
) -> None:
    got = case.embeds(config, {}, **how)
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
