"""The normalisation forgives what its docstring says, and nothing more."""

from __future__ import annotations

import pytest

from llava.eval.rules.exact_match import is_correct


@pytest.mark.parametrize("said", ["red", "Red", " red\n", "red.", "RED. ", " Red ."])
def test_forgiven(said: str) -> None:
    assert is_correct(said, "red")


@pytest.mark.parametrize("said", ["", "a red", "red!", "reddish", "red..", "red green"])
def test_not_forgiven(said: str) -> None:
    assert not is_correct(said, "red")
