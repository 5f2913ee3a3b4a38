"""Method x family: exactly the budget or one clear refusal, as docs/families.md says."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import matrix
import pytest
from family_checks import NAMES

from llava.markdown import fill_sections
from llava.pruning.lookup import FAMILIES

RECORDED = json.loads(matrix.RESULTS.read_text(encoding="utf-8"))
CELLS = [(name, method) for name in NAMES for method in matrix.METHODS]


def covering() -> set[tuple[str, str]]:
    """Each method on two families, in turn, so that each family has several methods."""
    count = len(NAMES)
    return {
        (NAMES[(number + shift) % count], method)
        for number, method in enumerate(matrix.METHODS)
        for shift in (0, count // 2)
    }


@cache
def model_of(name: str) -> Any:
    return matrix.build(name)


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(*cell, marks=() if cell in covering() else pytest.mark.slow) for cell in CELLS],
)
def test_a_method_keeps_its_budget_or_is_refused(name: str, method: str) -> None:
    found = matrix.outcome(model_of(name), name, method)
    assert found == RECORDED["methods"][name][method], f"run {matrix.COMMAND}"


@pytest.mark.parametrize("name", NAMES)
def test_a_family_has_what_the_document_says(name: str) -> None:
    found = matrix.features(model_of(name), name)
    assert found == RECORDED["families"][name], f"run {matrix.COMMAND}"


def test_every_family_and_method_is_recorded() -> None:
    assert sorted(RECORDED["families"]) == sorted(RECORDED["methods"]) == sorted(FAMILIES.entries())
    assert all([*own] == matrix.METHODS for own in RECORDED["methods"].values())
    assert {name for name, _ in covering()} == {*NAMES}


def test_the_document_shows_what_was_recorded() -> None:
    text = matrix.DOCUMENT.read_text(encoding="utf-8")
    assert fill_sections(matrix.DOCUMENT, matrix.render(RECORDED)) == text
