"""The benchmark of selection rules: equal picks, and the tracked figures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from llava.eval.engine.schema import ResultError
from llava.pruning import (
    PruningConfig,
    VisualTokens,
    list_methods,
    max_min,
    prune_visual_tokens,
)
from llava.pruning.selection.coverage import cover
from llava.pruning.selection.dpp import dpp
from llava.pruning.selection.max_min import cosine

ROOT = Path(__file__).resolve().parents[1]
TRACKED = ROOT / "playground" / "results" / "selection-speed.json"
# Rules of a few calls, together below a millisecond.
SHORT = ("top-k", "anchors, neighbours, top-k")


def load_program() -> ModuleType:
    file = ROOT / "benchmarks" / "selection_speed.py"
    spec = importlib.util.spec_from_file_location("selection_speed", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


selection_speed = load_program()


def through_the_method(name: str, keep: int, visual: VisualTokens, **options) -> list[int]:
    """Picks of a registered method on `visual`, ascending."""
    config = PruningConfig.of(name, keep_tokens=keep, **options)
    return prune_visual_tokens(visual, config).kept[0].tolist()


def test_arms_are_the_real_selection() -> None:
    """What is timed as ours picks what the methods pick, and the published rule agrees."""
    generator = torch.Generator().manual_seed(0)
    z, weights = torch.randn(48, 64, generator=generator), torch.rand(48, generator=generator)
    visual = VisualTokens(
        *(z[None], z[None], nn.Identity(), torch.zeros(1, dtype=torch.long), (2, 24)),
        extras={
            "cls_attention": [weights],
            "received_attention": [weights],
            "object_attention": [weights.flip(0)],
        },
    )
    wrapped = {"wrap_neighbours": True}
    methods = {
        "max-min, most isolated first": ("divprune", {}),
        "coverage x saliency": ("scope", {}),
        "duplicates removed": ("vispruner", {}),
        "anchors, neighbours, top-k": ("hiprune", wrapped),
        "top-k": ("fastervlm", {}),
    }
    want = {
        name: through_the_method(method, 30, visual, **options)
        for name, (method, options) in methods.items()
    }
    z = z[None]
    want["max-min, weighted"] = max_min(z, 30, weights=weights[None])[0].sort()[0].tolist()
    isolated = max_min(z, 30, weights=weights[None], first="isolated")
    want["max-min, isolated, then weighted"] = isolated[0].sort()[0].tolist()
    want["determinant"] = dpp(z, 30, quality=weights[None]).indices[0].sort()[0].tolist()
    similarity = cosine(z[0])
    want["coverage"] = cover(similarity.abs(), 30).indices.sort()[0].tolist()
    assert want.keys() == selection_speed.RULES.keys()
    for name, rule in selection_speed.RULES.items():
        for arm in (rule.ours, rule.baseline):
            assert arm(similarity.clone(), weights, 30).sort()[0].tolist() == want[name], name


def test_slow_rules_stop_early(monkeypatch) -> None:
    """But never before a pair besides the warm-up."""
    rule = selection_speed.RULES["top-k"]
    given = (torch.eye(30), torch.rand(30), 6)
    assert len(selection_speed._pairs(rule, given, repeats=5)) == 6
    monkeypatch.setattr(selection_speed, "SECONDS", 0)
    assert len(selection_speed._pairs(rule, given, repeats=5)) == 2


def test_command_writes_a_result(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(selection_speed, "BUDGETS", {48: (30, 36)})
    monkeypatch.setattr(selection_speed, "WIDTH", 64)
    file = tmp_path / "speed.json"
    assert selection_speed.main(["--repeats", "1", "--save-result", str(file)]) == 0
    assert "times as fast" in capsys.readouterr().out
    result = json.loads(file.read_text())
    cases = [(48, 30), (48, 36)] * len(selection_speed.RULES)
    assert [(row["tokens"], row["keep"]) for row in result["rows"]] == cases
    assert all(row["pairs"] == 1 for row in result["rows"])
    assert result["run"]["command"].startswith("python benchmarks/selection_speed.py --r")
    named = {method for row in result["rows"] for method in row["methods"]}
    assert named.isdisjoint(result["without_baseline"])
    assert named | set(result["without_baseline"]) == set(list_methods())
    with pytest.raises(SystemExit) as end:
        selection_speed.main(["--repeats", "0"])
    assert end.value.code == 2
    assert "--repeats must be at least 1" in capsys.readouterr().err


def test_different_picks_give_no_result(monkeypatch) -> None:
    rule = selection_speed.RULES["top-k"]._replace(
        ours=lambda similarity, weights, k: torch.arange(k)
    )
    monkeypatch.setitem(selection_speed.RULES, "top-k", rule)
    with pytest.raises(ResultError, match="the picks differ"):
        selection_speed.measure({48: (30,)}, width=64, repeats=1)


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
        if name in SHORT:
            continue
        floors = {(2880, 320): 4, (2880, 640): 10} if name.startswith("max-min") else {}
        assert ratio >= floors.get((tokens, keep), 0.95), (name, tokens, keep)
    # Guards, margins and ties to the lowest index cost more than the few bare calls of these rules,
    # but not a millisecond.
    for row in result["rows"]:
        if row["rule"] in SHORT:
            assert row["ours_ms"] - row["baseline_ms"] < 1
