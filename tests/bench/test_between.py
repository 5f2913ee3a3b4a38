"""`llava bench` with methods that drop tokens between layers: counts, cache, times, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from llava.bench.arms import BenchArm, make_arms
from llava.bench.command import main
from llava.bench.configs import DEEP, build_random, shape_of
from llava.bench.counts import forward_work, kv_cache_bytes, layers_work
from llava.bench.measure import Bench
from llava.bench.ratios import render_ratios
from llava.bench.report import render
from llava.bench.schema import read_bench
from llava.bench.subject import Subject
from llava.bench.summary import figures_of
from llava.pruning import PruningConfig
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.trace import measure_cache

ROOT = Path(__file__).resolve().parents[2]
TRACKED = ROOT / "playground" / "results" / "bench-decoder-cpu.json"


@pytest.fixture(scope="module")
def bench_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("between") / "between.json"
    words = ["--config", "llava-tiny", "--repeats", "1", "--answer", "1,3", "--device", "cpu"]
    words += ["--pruner", "norm,fastv", "--keep-tokens", "288", "--batch", "2"]
    words += ["--decoder-pruner", "fastv", "--decoder-keep-tokens", "160,288"]
    assert main([*words, "--output", str(file)]) == 0
    return file


def test_arms_behind_others_leave_out_what_drops_nothing() -> None:
    between = [DecoderConfig("fastv", keep_tokens=64), DecoderConfig("fastv", keep_tokens=128)]
    arms = make_arms(["zoo", "pyramiddrop"], [64, 128], {}, between)
    assert [arm.name for arm in arms] == [
        *("none", "free@64", "free@128", "zoo@64", "zoo@128", "zoo@128+fastv@64"),
        *("pyramiddrop@64", "pyramiddrop@128"),
    ]
    (both,) = [arm for arm in arms if "+" in arm.name]
    assert both.pruning == PruningConfig.of("zoo", keep_tokens=128, decoder=between[0])
    assert BenchArm.from_dict(json.loads(json.dumps(both.to_dict()))) == both


def test_a_schedule_without_budget_a_share_and_methods_alone() -> None:
    between = [DecoderConfig("fastv"), DecoderConfig("fastv", keep_ratio=0.5)]
    arms = make_arms(["none", "norm", "fastv"], [288], {"scope": "prompt"}, between)
    assert [(arm.name, arm.method) for arm in arms][2:] == [
        ("fastv", "fastv"),
        ("fastv@0.5", "fastv"),
        ("norm@288", "norm"),
        ("norm@288+fastv", "norm@288+fastv"),
        ("norm@288+fastv@0.5", "norm@288+fastv"),
        ("fastv@288", "fastv"),
    ]
    assert arms[2].pruning == PruningConfig(decoder=between[0], scope="prompt")
    twice = [DecoderConfig("fastv", keep_tokens=288)]
    assert [arm.name for arm in make_arms(["none", "fastv"], [288], {}, twice)][2:] == ["fastv@288"]


def test_arms_that_drop_nothing_are_named() -> None:
    said: list[str] = []
    between = [DecoderConfig("fastv", keep_tokens=64), DecoderConfig("fastv", keep_tokens=128)]
    make_arms(["zoo", "norm"], [192], {}, between, said.append)
    assert said == []
    make_arms(["zoo", "norm"], [64, 128], {}, between, said.append)
    left = ["zoo@64+fastv@64", "zoo@64+fastv@128", "zoo@128+fastv@128"]
    (line,) = said
    assert "drop nothing" in line
    assert line.partition(": ")[2].split(", ") == left + [
        own.replace("zoo", "norm") for own in left
    ]


def test_an_arm_below_its_floor_is_named_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "floor.json"
    words = ["--config", "llava-tiny", "--repeats", "1", "--answer", "1", "--device", "cpu"]
    words += ["--pruner", "none,fastv", "--keep-tokens", "64,288", "--batch", "1,2"]
    words += ["--decoder-pruner", "fastv", "--decoder-keep-ratio", "0.5"]
    assert main([*words, "--output", str(file)]) == 0
    result = read_bench(file)
    assert result["complete"] and result["floors"] == {"fastv@64": 144}
    ran = [(arm["arm"], arm["batch"]) for arm in result["arms"]]
    names = ["none", "free@64", "free@288", "fastv@0.5", "fastv@288"]
    assert ran == [(name, batch) for batch in (1, 2) for name in names]
    layers = {arm["arm"]: arm.get("layer_tokens") for arm in result["arms"]}
    assert layers["fastv@0.5"] == layers["fastv@288"] == [576, 192, 192, 192]
    said = capsys.readouterr()
    assert said.err.count("fastv@64: floor 144; ") == 1
    for text in (said.out, render_ratios(result)):
        lines = [line for line in text.splitlines() if "| floor 144 |" in " ".join(line.split())]
        assert len(lines) == 2 and all("fastv@64" in line for line in lines)
        header = next(line for line in text.splitlines() if line.startswith("| arm"))
        assert {line.count("|") for line in lines} == {header.count("|")}


def test_layers_cache_and_work_are_those_of_the_schedule(bench_of_two: Path) -> None:
    result = read_bench(bench_of_two)
    arms = {arm["arm"]: arm for arm in result["arms"]}
    assert [*arms] == ["none", "free@288", "norm@288", "norm@288+fastv@160", "fastv@288"]
    none, alone, both = arms["none"], arms["fastv@288"], arms["norm@288+fastv@160"]
    assert (alone["tokens"], both["tokens"], both["all_tokens"]) == (576, 288, 576)
    assert alone["layer_tokens"] == [576, 192, 192, 192]
    assert both["layer_tokens"][0] == 288 and sum(both["layer_tokens"]) / 4 == pytest.approx(160, 1)
    for arm in (alone, both):
        read = sum(60 + own for own in arm["layer_tokens"])
        assert arm["kv_cache_bytes"] / none["kv_cache_bytes"] == pytest.approx(read / (4 * 636))
        work = [sum(own["work"]["prefill"]["flops"].values()) for own in (arm, none)]
        assert work[0] < 0.7 * work[1]
        assert arm["changes"] and arm["times"]["between"][0] > 0
        assert "between" not in arms["norm@288"]["times"]
    whole = figures_of(result)
    (own,) = [figures for figures in whole if figures.arm["arm"] == "fastv@288"]
    parts = ("encode", "score", "select", "splice", "between", "prefill")
    assert own.totals[1].median == pytest.approx(sum(own.rows[name].median for name in parts))
    assert own.of_free_prefill is None, "the free arm feeds the first layer fewer tokens"


def test_tables_show_the_cost_apart(bench_of_two: Path) -> None:
    result = read_bench(bench_of_two)
    text = " ".join(render(result).split())
    assert "| between |" in text and "| fastv@288 | 288.0 (576 to 192) |" in text
    assert "| norm@288+fastv@160 |" in text
    ratios = render_ratios(result)
    assert "| between | decode | KV cache |" in " ".join(ratios.split())


def test_layers_that_read_alike_are_counted_as_before() -> None:
    model = build_random(shape_of("llava-tiny"), device=torch.device("cpu"), dtype=torch.float32)
    assert layers_work(model, 2, [(7, 5)] * 4) == forward_work(model, 4, 2, 7, 5)
    more, fewer = (layers_work(model, 1, [(9, 0), (own, 0)]) for own in (9, 3))
    assert more["bytes"] - fewer["bytes"] == kv_cache_bytes(model, 1, 1, 6)
    cache = DynamicCache()
    with torch.no_grad():
        model(inputs_embeds=torch.zeros(2, 5, model.config.hidden_size), past_key_values=cache)
    assert measure_cache(cache) == kv_cache_bytes(model, 4, 2, 5)


def test_decoding_is_measured_at_the_lengths_of_the_schedule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_random(shape_of("llava-tiny"), device=torch.device("cpu"), dtype=torch.float32)
    arm = BenchArm("fastv@288", PruningConfig.of("fastv", keep_tokens=288))
    bench = Bench(Subject(model, 1, 60, 4, 1, 2), [arm], [1])
    caches: list[Any] = []
    real = Bench._decode

    def decode(self: Bench, out: Any, steps: int) -> None:
        real(self, out, steps)
        caches.append(out.past_key_values)

    monkeypatch.setattr(Bench, "_decode", decode)
    bench.measure(0, 1)
    assert [caches[0].get_seq_length(layer) for layer in range(4)] == [638, 254, 254, 254]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pruner", "fastv", "--keep-tokens", "288", "--layers", "2"], f"--config {DEEP}"),
        (["--decoder-keep-tokens", "9"], "--decoder-keep-tokens: give --decoder-pruner too"),
        (["--decoder-keep-ratio", "0.5"], "--decoder-keep-ratio: give --decoder-pruner too"),
        (["--decoder-pruner", "fastv", "--decoder-keep-ratio", "x"], "is not R,..."),
        (["--decoder-pruner", "fastv", "--decoder-keep-ratio", "2"], "keep_ratio must be a share"),
        (["--decoder-pruner", "sparsevlm"], "'sparsevlm' needs"),
        (["--decoder-pruner", "zoo", "--decoder-keep-tokens", "9"], "'zoo'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--config", "llava-tiny", "--repeats", "1", "--device", "cpu", *words])
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and "Traceback" not in error


def test_the_tracked_run_keeps_its_budgets_over_32_layers() -> None:
    result = read_bench(TRACKED)
    assert result["conditions"]["layers"] == result["conditions"]["depth"] == 32
    (none,) = [arm for arm in result["arms"] if arm["arm"] == "none"]
    deep = [arm for arm in result["arms"] if "layer_tokens" in arm]
    named = {arm["method"].partition(":")[0] for arm in deep}
    assert {"fastv", "pyramiddrop", "sparsevlm", "btp", "zoo@192+fastv"} <= named
    for arm in deep:
        mean = sum(arm["layer_tokens"]) / 32
        assert mean == pytest.approx(int(arm["arm"].rpartition("@")[2]), abs=1), arm["arm"]
        read = 32 * 60 + sum(arm["layer_tokens"])
        assert arm["kv_cache_bytes"] / none["kv_cache_bytes"] == pytest.approx(read / (32 * 636))
