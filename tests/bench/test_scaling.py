"""Scaling: the fitted exponent, sizes that take too long, file and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava.bench import scaling
from llava.bench.command import main
from llava.bench.scaling import exponents, render_scaling, run_scaling
from llava.bench.schema import read_bench
from llava.pruning import PruningError

SIZES = {"tokens": (36, 72, 144), "keep": (4, 8, 16), "width": (32, 64, 128), "batch": (1, 2, 4)}
SMALL = {"tokens": 64, "keep": 8, "width": 32, "batch": 1}
FACTS: dict[str, Any] = {"command": "x", "commit": None, "versions": {}, "machine": {}}


def run(
    output: Path | None = None,
    seconds: float = 0.001,
    methods: tuple[str, ...] = ("divprune", "zoo-exact"),
    **more: Any,
) -> Any:
    return run_scaling(
        methods,
        FACTS,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seconds=seconds,
        output=output,
        default=SMALL,
        sizes=SIZES,
        say=lambda line: None,
        **more,
    )


def points(times: dict[int, float], axis: str = "tokens") -> Any:
    return [{"axis": axis, "method": "m", axis: n, "times": [ms, ms]} for n, ms in times.items()]


def test_the_exponent_is_that_of_a_power() -> None:
    square = {n: n**2 / 1000 for n in (100, 200, 400)}
    assert exponents(points(square)) == {("tokens", "m"): pytest.approx(2)}


def test_calls_that_cost_as_much_as_their_work_do_not_count() -> None:
    floor = dict.fromkeys((1, 2, 4), 0.3)
    square = {n: n**2 / 1000 for n in (100, 200, 400)}
    assert exponents(points(floor)) == {}
    assert exponents(points({**floor, **square})) == {("tokens", "m"): pytest.approx(2)}


def test_file_tables_and_picture(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    result = run(file, seconds=5e-5)
    for point in result["points"]:
        assert point["keep"] == (point["tokens"] // 9 if point["axis"] == "tokens" else 8) or (
            point["axis"] == "keep"
        )
    assert read_bench(file) == result and result["complete"]
    assert main(["--from", str(file), "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    text = render_scaling(result)
    assert all(label in text for label in scaling.AXES.values())


def test_options_after_a_colon_are_the_methods() -> None:
    found = run(methods=("zoo:directions=2",))
    assert {point["method"] for point in found["points"]} == {"zoo:directions=2"}
    with pytest.raises(PruningError, match="budget"):
        run(methods=("zoo@32",))


def test_sizes_that_cost_nothing_have_no_exponent() -> None:
    result = run(seconds=0.0)
    result["points"] = points(dict.fromkeys((36, 72, 144), 0.3))
    text = render_scaling(result)
    assert "| launch-bound |" in text and "fewer than 3 sizes" in text
    result["points"] = points(dict.fromkeys((36, 72), 0.3))
    assert "launch-bound" not in render_scaling(result), "two sizes never have one"


def test_an_axis_ends_where_a_call_takes_too_long() -> None:
    result = run(seconds=0.0)
    sizes = [point["tokens"] for point in result["points"] if point["axis"] == "tokens"]
    assert sizes == [36, 36], "the first size of both methods"
    assert "divprune, tokens above 36" in result["stopped"]
    assert "Not measured" in render_scaling(result)
