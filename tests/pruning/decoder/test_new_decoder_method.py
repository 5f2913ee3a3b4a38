"""The decoder method in CONTRIBUTING is complete: it passes the suite that all methods pass."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_decoder_methods as checks

from llava.pruning import PruningError
from llava.pruning.catalogue import decoder_table
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.registry import DECODER_METHODS, list_decoder_methods
from llava.pruning.decoder.schedule import UnreachableBudgetError

CODE = re.compile(r"^```python\n(.*?)^```", flags=re.M | re.S)
PAGE = Path(__file__).resolve().parents[3] / "CONTRIBUTING.md"

model = checks.model


@pytest.fixture
def name(tmp_path: Path) -> Iterator[str]:
    code = CODE.search(PAGE.read_text().partition("## Add a method that prunes between layers")[2])
    assert code is not None
    file = tmp_path / "longest.py"
    file.write_text(code[1])
    spec = importlib.util.spec_from_file_location("longest", file)
    assert spec is not None and spec.loader is not None
    before = {*list_decoder_methods()}
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    (added,) = {*list_decoder_methods()} - before
    yield added
    del DECODER_METHODS._entries[added]


def test_it_keeps_the_promises(model: Any, name: str) -> None:
    for depth in (4, 32):
        checks.test_budget_is_the_mean_over_layers(name, {}, depth, 576)
    for check in (
        checks.test_layers_read_as_many_as_planned,
        checks.test_keeping_everything_changes_nothing,
        checks.test_decoding_equals_recomputing,
        checks.test_order_of_rows_does_not_matter,
        checks.test_nan_is_refused,
    ):
        check(model, name, {})
    for side in ("left", "right"):
        checks.test_batch_equals_its_rows(model, name, {}, side)
    checks.test_half_precision_runs(name, {})
    checks.test_json_round_trip(name, {})


def test_it_does_what_it_says(name: str) -> None:
    with pytest.raises(PruningError, match="needs keep_tokens"):
        DecoderConfig(name)
    with pytest.raises(UnreachableBudgetError, match="keep at least 288"):
        DecoderConfig(name, keep_tokens=64).plan(576, 576, 32)
    (row,) = [row for row in decoder_table() if row[0] == name]
    assert row[2:7] == ("norm of hidden states", "own", "-", "n/a", "288")
