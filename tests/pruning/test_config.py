"""Settings: validation, JSON, other tools' words, options, the registry and plug-ins."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llava.registry
from llava.pruning import (
    PruningConfig,
    PruningError,
    get_method,
    list_methods,
    parse_options,
    register,
)
from llava.pruning.method import PruningMethod
from llava.pruning.registry import METHODS
from llava.utils import once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "zooo", "keep_tokens": 4}, "unknown pruning method 'zooo'; did you mean 'zoo'"),
        ({"method": "qqqq", "keep_tokens": 4}, "valid: .*divprune, "),
        ({"method": "zoo"}, "needs keep_tokens= or keep_ratio="),
        ({"method": "zoo", "keep_tokens": 4, "keep_ratio": 0.5}, "not both"),
        *(
            ({"method": "zoo", "keep_tokens": value}, "keep_tokens must be a whole number")
            for value in (0, -3, 2.5, float("nan"), True, "many")
        ),
        *(
            ({"method": "zoo", "keep_ratio": value}, r"keep_ratio must be a share in \(0, 1\]")
            for value in (0, -0.1, 1.01, float("nan"), float("inf"), True, "half")
        ),
        ({"method": "none", "keep_tokens": 0}, "whole number"),
        (
            {"method": "zoo", "keep_tokens": 4, "options": {"direction": 3}},
            "unknown option of 'zoo': 'direction'; did you mean 'directions'",
        ),
        ({"method": "fastervlm", "keep_tokens": 4, "options": {"seed": 3}}, "valid: none"),
        ({"method": "zoo", "keep_tokens": 4, "options": {"fusion": "max"}}, "multiply, sum"),
        ({"method": "zoo", "keep_tokens": 4, "options": {"directions": 0}}, "at least 1"),
        ({"method": "zoo", "keep_tokens": 4, "options": {"step": 0}}, "positive"),
        ({"method": "zoo", "keep_tokens": 4, "options": {"step": "x"}}, "positive"),
        ({"method": "zoo", "keep_tokens": 4, "options": {"seed": 1.5}}, "whole number"),
        ({"method": "zoo-exact", "keep_tokens": 4, "options": {"projector_rank": 0}}, "at least"),
        ({"method": "random", "keep_tokens": 4, "options": {"seed": -1}}, "at least 0"),
    ],
)
def test_refused_at_construction(arguments, message) -> None:
    with pytest.raises(PruningError, match=message):
        PruningConfig(**arguments)


def test_published_defaults() -> None:
    zoo = PruningConfig("zoo", keep_tokens=64).pruner
    assert (zoo.directions, zoo.step) == (64, 0.01)
    assert (zoo.fusion, zoo.projector_rank) == ("multiply", None)


@given(
    n=st.integers(0, 3000),
    budget=st.one_of(
        st.integers(1, 3000).map(lambda k: {"keep_tokens": k}),
        st.floats(0, 1, exclude_min=True).map(lambda r: {"keep_ratio": r}),
    ),
)
def test_num_kept(n, budget) -> None:
    config = PruningConfig("zoo", **budget)
    want = budget.get("keep_tokens") or max(1, round(budget["keep_ratio"] * n))
    assert config.num_kept(n) == min(n, want)
    assert PruningConfig("none", **budget).num_kept(n) == n


def test_json_round_trip() -> None:
    for config in (
        PruningConfig(),
        PruningConfig("zoo", keep_tokens=64, options={"seed": 2, "projector_rank": None}),
        PruningConfig("pool", keep_ratio=1 / 9),
    ):
        again = PruningConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert hash(again) == hash(config)
        assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert PruningConfig("zoo", keep_tokens=1) != PruningConfig("zoo", keep_tokens=2)


@pytest.mark.parametrize(
    ("word", "value", "want"),
    [
        ("pruning_ratio", 0.75, {"keep_ratio": 0.25}),
        ("reduction_ratio", 0.0, {"keep_ratio": 1.0}),
        ("visual_token_num", 64, {"keep_tokens": 64}),
    ],
)
def test_other_tools_words_are_converted_and_echoed_once(word, value, want) -> None:
    for build in (
        lambda: PruningConfig.from_dict({"method": "zoo", word: value}),
        lambda: PruningConfig.of("zoo", **{word: value}),
    ):
        with pytest.warns(UserWarning, match=f"{word}={value} read as") as seen:
            assert build() == PruningConfig("zoo", **want)
        assert len(seen) == 1
        assert seen[0].filename == __file__


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "zoo", "pruning_ratio": 1.0}, r"\[0, 1\)"),
        ({"method": "zoo", "pruning_ratio": 88.9}, r"\[0, 1\)"),
        ({"method": "zoo", "visual_token_num": 0}, "visual_token_num must be"),
        ({"method": "zoo", "pruning_ratio": 0.5, "keep_tokens": 3}, "give one budget"),
        ({"method": "zoo", "keep_token": 3}, "did you mean 'keep_tokens'"),
        ({"method": "zoo", "keep_tokens": 3, "options": [1]}, "options must be a mapping"),
        ({"method": "zoo", "keep_tokens": 3, "options": []}, "options must be a mapping"),
    ],
)
def test_from_dict_refuses(data, message) -> None:
    with pytest.raises(PruningError, match=message):
        PruningConfig.from_dict(data)


def test_parse_options() -> None:
    text = ["directions=32", "step=1e-3", "fusion=sum", "projector_rank=None", "a=true", "b=x=y"]
    assert parse_options(text) == {
        "directions": 32,
        "step": 0.001,
        "fusion": "sum",
        "projector_rank": None,
        "a": True,
        "b": "x=y",
    }
    for long in ("1" * 5000, "[" * 100_000):  # JSON that Python's reader gives up on
        assert parse_options([f"seed={long}"]) == {"seed": long}
    for bad, message in ((["seed"], "key=value"), (["=3"], "key=value"), (["a=1", "a=2"], "twice")):
        with pytest.raises(PruningError, match=message):
            parse_options(bad)


@dataclass(frozen=True)
class Plugin(PruningMethod):
    """A third party's method."""

    name: ClassVar[str] = "plugin"


class Point:
    """Stands in for an installed entry point."""

    def __init__(self, name: str, target) -> None:
        self.name, self.target = name, target

    def load(self):
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


@pytest.fixture
def own_registry(monkeypatch):
    list_methods()
    monkeypatch.setattr(METHODS, "_entries", dict(METHODS._entries))


def test_entry_points(own_registry, monkeypatch) -> None:
    points = [Point("broken", ImportError("no such module")), Point("plugin", Plugin)]
    monkeypatch.setattr(llava.registry, "entry_points", lambda group: points)
    monkeypatch.setattr(METHODS, "_load", once(METHODS._load.__wrapped__))
    with pytest.warns(UserWarning, match="'broken' is not available: no such module"):
        assert "plugin" in list_methods()
    assert get_method("plugin") is Plugin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list_methods()


def test_register(own_registry) -> None:
    assert register(Plugin) is Plugin
    assert register(Plugin) is Plugin

    @dataclass(frozen=True)
    class Taken(PruningMethod):
        name: ClassVar[str] = "zoo"

    with pytest.raises(PruningError, match="already"):
        register(Taken)

    class Nameless(PruningMethod):
        pass

    with pytest.raises(PruningError, match="needs a class attribute"):
        register(Nameless)
