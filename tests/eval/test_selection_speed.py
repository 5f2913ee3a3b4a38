"""Selection beside the published rules: equal picks, and the tracked figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llava.eval import selection_speed
from llava.eval.__main__ import main
from llava.eval.results import ResultError
from llava.pruning import list_methods, max_min
from llava.pruning.selection.max_min import cosine

TRACKED = Path(__file__).parents[2] / "playground" / "results" / "selection-speed.json"


def test_arms_are_the_real_selection() -> None:
    """What is timed as ours picks what `max_min` picks, and the published rule agrees."""
    generator = torch.Generator().manual_seed(0)
    z, weights = torch.randn(40, 64, generator=generator), torch.rand(40, generator=generator)
    similarity = cosine(z)
    pairs = {
        "max-min, most isolated first": max_min(z[None], 12, first="isolated")[0],
        "max-min, weighted": max_min(z[None], 12, weights=weights[None])[0],
        "top-k": weights.argsort(descending=True)[:12],
    }
    assert pairs.keys() == selection_speed.RULES.keys()
    for name, want in pairs.items():
        rule = selection_speed.RULES[name]
        assert torch.equal(rule.ours(similarity.clone(), weights, 12), want)
        assert torch.equal(rule.baseline(similarity.clone(), weights, 12), want)


def test_command_writes_a_result(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(selection_speed, "BUDGETS", {30: (3, 6)})
    monkeypatch.setattr(selection_speed, "WIDTH", 8)
    file = tmp_path / "speed.json"
    assert main(["selection-speed", "--repeats", "1", "--save-result", str(file)]) == 0
    assert "times as fast" in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert [(row["tokens"], row["keep"]) for row in result["rows"]] == [(30, 3), (30, 6)] * 3
    assert result["run"]["command"].startswith("python -m llava.eval selection-speed")
    named = {method for row in result["rows"] for method in row["methods"]}
    assert named.isdisjoint(result["without_baseline"])
    assert named | set(result["without_baseline"]) == set(list_methods())
    assert main(["selection-speed", "--repeats", "0"]) == 2


def test_different_picks_give_no_result(monkeypatch) -> None:
    rule = selection_speed.RULES["top-k"]._replace(
        ours=lambda similarity, weights, k: torch.arange(k)
    )
    monkeypatch.setitem(selection_speed.RULES, "top-k", rule)
    with pytest.raises(ResultError, match="the picks differ"):
        selection_speed.measure({30: (6,)}, width=8, repeats=1)


def test_tracked_figures_reach_the_target() -> None:
    result = json.loads(TRACKED.read_text())
    assert result["run"]["git"]["dirty"] is False
    assert all(row["picks_equal"] for row in result["rows"])
    wanted = {
        (name, tokens, keep)
        for name in selection_speed.RULES
        for tokens, keeps in selection_speed.BUDGETS.items()
        for keep in keeps
    }
    ratios = {(row["rule"], row["tokens"], row["keep"]): row["ratio"] for row in result["rows"]}
    assert ratios.keys() == wanted
    for (name, tokens, keep), ratio in ratios.items():
        if name == "top-k":
            continue
        floor = {(2880, 320): 4, (2880, 640): 10}.get((tokens, keep), 0.95)
        assert ratio >= floor, (name, tokens, keep)
    # Guards, margins and ties to the lowest index cost more than one bare call, but not a
    # millisecond.
    for row in result["rows"]:
        if row["rule"] == "top-k":
            assert row["ours_ms"] - row["baseline_ms"] < 1
