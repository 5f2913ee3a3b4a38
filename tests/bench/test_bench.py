"""`llava bench` from its flags to its file, tables and picture; order of arms; another checkout."""

from __future__ import annotations

import json
import sys
import weakref
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from llava import cli
from llava.bench import command, measure, run
from llava.bench.arms import BenchArm, make_arms
from llava.bench.beside import Beside
from llava.bench.command import build_parser, main
from llava.bench.measure import Bench
from llava.bench.ratios import render_ratios
from llava.bench.report import PUBLISHED, render
from llava.bench.run import measure_once
from llava.bench.schema import read_bench
from llava.pruning import PruningError
from llava.pruning.tokens import ImageTokens
from llava.utils import UserInputError

ROOT = Path(__file__).resolve().parents[2]


def test_the_file_has_every_arm_and_every_repeat(bench_result: Any) -> None:
    assert bench_result["complete"]
    names = ["none", "free@64", "free@576", "zoo-exact@64", "zoo-exact@576", "norm@64", "norm@576"]
    assert [(a["batch"], a["arm"]) for a in bench_result["arms"]] == [
        (batch, name) for batch in (1, 2) for name in names
    ]
    wanted = {"encode", "score", "select", "splice", "prefill", "decode"}
    wanted |= {"head", "decode_head", "end_to_end"}
    for arm in bench_result["arms"]:
        assert arm["times"].keys() == wanted
        assert {len(times) for times in arm["times"].values()} == {2}
        assert all(value >= 0 for times in arm["times"].values() for value in times)
        kept = 64 if arm["arm"].endswith("@64") else 576
        assert (arm["tokens"], arm["all_tokens"], arm["prompt"]) == (kept, 576, kept + 60)
        assert arm["changes"] == (kept == 64)
    conditions = bench_result["conditions"]
    assert (conditions["layers"], conditions["depth"]) == (1, 4)
    assert conditions["decode_steps"] == 2


def test_arms_that_read_the_same_share_one_encoding(bench_result: Any) -> None:
    for batch in (1, 2):
        own = [a["times"]["encode"] for a in bench_result["arms"] if a["batch"] == batch]
        assert all(times == own[0] for times in own) and own[0][0] != own[0][1]


def test_cache_and_prefill_shrink_with_the_tokens(bench_result: Any) -> None:
    arms = {a["arm"]: a for a in bench_result["arms"] if a["batch"] == 1}
    full, kept = arms["none"], arms["zoo-exact@64"]
    assert kept["kv_cache_bytes"] / full["kv_cache_bytes"] == pytest.approx(124 / 636)
    work = [sum(a["work"]["prefill"]["flops"].values()) for a in (kept, full)]
    assert work[0] < 0.2 * work[1]
    assert arms["free@64"]["work"]["stage"]["flops"] == {}
    assert sum(kept["work"]["stage"]["flops"].values()) > 0


def test_tables_and_picture_are_made_from_the_file_alone(
    bench_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- small:begin -->\n<!-- small:end -->\nafter\n")
    words = ["--from", str(bench_file), "--markdown", str(tmp_path / "tables.md")]
    words += ["--plot", str(tmp_path / "p.png"), "--update", str(page)]
    assert main(words) == 0
    text = (tmp_path / "tables.md").read_text()
    assert capsys.readouterr().out == text == render(read_bench(bench_file)) + "\n"
    assert "ran with 1 of its 4 layers" in text and "**Batch 2**" in text
    shown = render_ratios(read_bench(bench_file))  # a document has no times of a CPU
    assert " ms" not in shown and "ran with 1 of its 4 layers" in shown
    assert page.read_text() == f"before\n<!-- small:begin -->\n{shown}\n<!-- small:end -->\nafter\n"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    own, _, others = text.partition("Published by others")
    for row in PUBLISHED:
        assert all(cell in others for cell in row) and row[1] not in own


def test_options_and_what_was_not_read_are_in_the_name(bench_result: Any) -> None:
    arm = bench_result["arms"][3]
    arm |= {"arm": "zoo-exact:fusion=sum@64", "method": "zoo-exact:fusion=sum"}
    bench_result["arms"][4]["label"] = "zoo-exact(relevance=none)"
    same = {"method": "norm:x=1", "label": "norm:x=1"}  # of an arm that keeps all tokens
    bench_result["arms"][6] |= {"arm": "norm:x=1@576", **same}
    text = render(bench_result)
    assert "| norm:x=1@576 " in text
    assert "| zoo-exact:fusion=sum@64 " in text and "| zoo-exact(relevance=none)@576 " in text


def test_what_is_not_scaled_says_so(bench_result: Any) -> None:
    text = render(bench_result)
    assert "as one call (1 of 4 layers)" in text and "peak MiB (1 of 4 layers)" in text
    assert "mask, rotary angles" in text
    bench_result["conditions"]["layers"] = bench_result["conditions"]["depth"]
    assert "of 4 layers" not in render(bench_result)


def test_rates_are_the_better_of_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([{"float32": 1e9, "memory": 3e9}, {"float32": 2e9, "memory": 1e9}])
    monkeypatch.setattr(run, "measure_rates", lambda *_: next(rates))
    arms = tuple(arm.to_dict() for arm in make_arms([], [64], {}))
    facts: Any = {"command": "x", "commit": None, "versions": {}, "machine": {}}
    plan = run.Plan("llava-tiny", None, "cpu", "float32", 1, 20, arms, (1,), (1,), 1)
    result = run.run_bench(plan, facts, None, say=lambda line: None)
    assert result["rates"] == {"float32": 2e9, "memory": 3e9}
    assert "backwards" in result["conditions"]["order"]
    assert "of no known commit" in render(result)


def test_a_file_of_an_earlier_version_is_read(bench_result: Any, tmp_path: Path) -> None:
    file = tmp_path / "older.json"
    del bench_result["conditions"]["order"]
    file.write_text(json.dumps(bench_result))
    assert main(["--from", str(file)]) == 0


def test_a_file_that_was_interrupted_says_so(bench_result: Any) -> None:
    assert "interrupted" not in render(bench_result)
    assert "interrupted" in render({**bench_result, "complete": False})


def test_every_repeat_runs_all_arms_one_after_another() -> None:
    calls: list[tuple[str, Any, Any]] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def begin_repeat(self) -> None:
            calls.append((self.name, "begin", None))

        def measure(self, number: int, size: int) -> dict[str, float]:
            calls.append((self.name, number, size))
            return {"prefill": float(len(calls))}

    sources: Any = {name: Recorded(name) for name in ("this", "other")}
    runs = [(n, s, arm, 1) for arm in range(2) for n, s in sources.items()]
    records: Any = [{"times": {}} for _ in runs]
    for backwards in (False, True):
        measure_once(runs, records, sources, backwards)
    begin = [("this", "begin", None), ("other", "begin", None)]
    turn = [("this", 0, 1), ("other", 0, 1), ("this", 1, 1), ("other", 1, 1)]
    assert calls == [*begin, *turn, *begin, *turn[::-1]]
    assert [r["times"]["prefill"] for r in records] == [[3, 12], [4, 11], [5, 10], [6, 9]]


@pytest.mark.usefixtures("quick")
def test_the_file_is_written_after_every_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, measured = tmp_path / "x.json", run.measure_once

    def interrupted(*arguments: Any, **more: Any) -> None:
        if len(json.loads(file.read_text())["arms"]) and arguments[1][0]["times"]:
            raise KeyboardInterrupt
        measured(*arguments, **more)

    monkeypatch.setattr(run, "measure_once", interrupted)
    words = ["--layers", "1", "--repeats", "3", "--answer", "1", "--pruner", "norm"]
    with pytest.raises(KeyboardInterrupt):
        main([*words, "--keep-tokens", "64", "--device", "cpu", "--output", str(file)])
    result = read_bench(file)
    assert not result["complete"]
    assert {len(arm["times"]["prefill"]) for arm in result["arms"]} == {1}
    assert "decode" not in result["arms"][0]["times"], "no answer has a second token"
    assert "interrupted" in render(result)


def test_the_free_arm_keeps_the_tokens_it_is_given() -> None:
    plan = run.Plan("llava-tiny", None, "cpu", "float32", 1, 20, (), (1,), (1,), 1)
    subject = run.open_subject(plan)
    arms = make_arms(["grid"], [64], {})
    bench = Bench(subject, arms, [1])
    batch = bench.batches[1]
    embeds = []
    for arm in arms[1:]:
        _, made = bench._prepare(arm, batch)
        embeds.append(made)
    assert arms[1].free and arms[2].name == "grid@64"
    assert torch.equal(embeds[0], embeds[1]) and embeds[0].shape == (1, 84, 128)


def small_bench(words: list[str], budgets: list[int]) -> Bench:
    plan = run.Plan("llava-tiny", None, "cpu", "float32", 1, 20, (), (1,), (1,), 1)
    return Bench(run.open_subject(plan), make_arms(words, budgets, {}), [1])


def test_nothing_of_the_stage_is_alive_in_the_language_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would count as peak memory of the call."""
    bench, made = small_bench(["norm"], [64]), []

    class Watched(measure._Phases):
        def __call__(self, *arguments: Any) -> Any:
            output = super().__call__(*arguments)
            made.append(weakref.ref(output))
            return output

    forward, alive = bench._forward, []

    def watching(embeds: Any, between: Any) -> Any:
        alive.extend(one() is not None for one in made)
        return forward(embeds, between)

    monkeypatch.setattr(measure, "_Phases", Watched)
    monkeypatch.setattr(bench, "_forward", watching)
    bench._whole(bench.arms[2], bench.batches[1])
    assert alive == [False, False]  # what was encoded, and what the stage left of it


def test_what_encoding_left_to_check_is_part_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms share an encoding; its checks in a splice would be paid for by the first one alone."""
    bench, settled = small_bench([], [64]), []
    monkeypatch.setattr(ImageTokens, "settle", lambda self: settled.append(self))
    for expected in (2, 3):  # encoding and splice, then splice alone
        bench._prepare(bench.arms[0], bench.batches[1])
        assert len(settled) == expected


def test_the_free_arm_gathers_as_the_stage_does(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, calls = small_bench([], [64]), []
    gather = measure.gather_slots

    @wraps(gather)
    def recorded(*arguments: Any, **more: Any) -> Any:
        calls.append(more)
        return gather(*arguments, **more)

    monkeypatch.setattr(measure, "gather_slots", recorded)
    bench._prepare(bench.arms[1], bench.batches[1])
    assert calls == [{"padded": False}]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that are not measured, which takes seconds."""
    monkeypatch.setattr(run, "measure_rates", lambda *_: {"float32": 1e9, "memory": 1e9})


@pytest.mark.usefixtures("quick")
def test_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    words = ["--model-path", "llava-tiny", "--pruner", "cdpruner", "--keep-tokens", "64"]
    words += ["--answer", "2", "--repeats", "1", "--device", "cpu", "--output", str(file)]
    assert main(words) == 0
    result = read_bench(file)
    assert (result["conditions"]["weights"], result["conditions"]["depth"]) == ("checkpoint", 4)
    assert "head" not in result["arms"][0]["times"], "all layers ran, nothing is scaled"
    assert "layers**" not in render(result)


def test_methods_that_read_question_or_tower_run() -> None:
    plan = run.Plan("llava-tiny", None, "cpu", "float32", 1, 20, (), (1,), (1,), 1)
    arms = make_arms(["mmtok", "visionzip", "cdpruner"], [16], {})[2:]
    bench = Bench(run.open_subject(plan), arms, [1])
    labels = [bench.describe(number, 1)["label"] for number in range(3)]
    assert labels == ["mmtok", "visionzip", "cdpruner(relevance=none)"]


def test_five_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA-NeXT's 2,880 tokens, at llava-tiny's width."""
    from llava.bench import configs

    tiny = configs.shape_of("llava-tiny")
    language = {**tiny.language, **configs._FIVE_TILES, "tokenizer_model_max_length": 4096}
    shape = configs.Shape(language, tiny.tower, tiles=5)
    monkeypatch.setitem(configs.SHAPES, "llava-next-7b", shape)
    plan = run.Plan("llava-next-7b", None, "cpu", "float32", 1, 20, (), (1,), (1,), 1)
    bench = Bench(run.open_subject(plan), make_arms(["divprune"], [160], {}), [1])
    found = [bench.describe(number, 1) for number in range(3)]
    assert [arm["tokens"] for arm in found] == [2880, 160, 160]


@pytest.mark.usefixtures("quick")
def test_another_checkout_runs_beside(tmp_path: Path) -> None:
    """A copy of this tree with another `norm`: the same model, other tokens are kept."""
    import shutil

    ignore = shutil.ignore_patterns("bench", "__pycache__")
    shutil.copytree(ROOT / "llava", tmp_path / "older" / "llava", ignore=ignore)
    (tmp_path / "older" / "playground").symlink_to(ROOT / "playground")
    method = tmp_path / "older" / "llava" / "pruning" / "methods" / "norm.py"
    changed = method.read_text().replace('signal = "', 'signal = "another ')
    method.write_text(changed + '\n    def label(self, tokens):\n        return "older norm"\n')
    file = tmp_path / "x.json"
    words = ["--layers", "1", "--repeats", "1", "--answer", "1", "--pruner", "norm"]
    words += ["--keep-tokens", "64", "--device", "cpu", "--output", str(file)]
    assert main([*words, "--compare-with", str(tmp_path / "older")]) == 0
    result = read_bench(file)
    arms = result["arms"]
    assert result["compared_with"] == {"older": None}, "it is no checkout of git"
    against = render(result).partition("Against older")[2].partition("*free*")[0]
    assert "| free@64 " in against and "| norm@64 " in against and "none" not in against
    assert [(a["source"], a["arm"], a["label"]) for a in arms] == [
        ("this", "none", "none"),
        ("older", "none", "none"),
        ("this", "free@64", "free"),
        ("older", "free@64", "free"),
        ("this", "norm@64", "norm"),
        ("older", "norm@64", "older norm"),
    ]
    assert all(len(arm["times"]["prefill"]) == 1 for arm in arms)


def test_arms_as_text() -> None:
    words = build_parser().parse_args(["--pruner", "zoo:directions=32,fusion=sum,norm"]).pruner
    assert words == ("zoo:directions=32,fusion=sum", "norm")
    arms = make_arms(words, [64], {"allocation": "global"})
    assert [arm.name for arm in arms] == [
        "none", "free@64", "zoo:directions=32,fusion=sum@64", "norm@64",
    ]  # fmt: skip
    assert arms[2].pruning is not None and arms[2].pruning.options["directions"] == 32
    assert all(arm.pruning.allocation == "global" for arm in arms[1:] if arm.pruning)
    assert [BenchArm.from_dict(arm.to_dict()) for arm in arms] == arms
    with pytest.raises(PruningError, match="zoo"):
        make_arms(["zooo"], [64], {})
    with pytest.raises(PruningError, match="budget"):
        make_arms(["zoo@32"], [64], {})


REFUSED = {
    "two models": (["--config", "llava-tiny", "--model-path", "x"], "not both"),
    "shape": (["--config", "llava-1.5-8b"], "llava-1.5-7b"),
    "a prompt that is cut": (["--text-tokens", "1500"], "fewer --text-tokens"),
    "layers": (["--layers", "5"], "has 4 decoder layers"),
    "layers of a checkpoint": (["--model-path", "x", "--layers", "1"], "needs --config"),
    "no checkpoint": (["--model-path", "no-such-folder/x/y"], "no-such-folder"),
    "method": (["--pruner", "zooo"], "zoo"),
    "budget": (["--keep-tokens", "0"], "at least 1"),
    "answers": (["--answer", "1,x"], "invalid int value: 'x'"),
    "device": (["--device", "gpu"], "unknown device 'gpu'"),
    "no GPU": (["--device", "cuda"], "finds no CUDA GPU"),
    "checkout": (["--compare-with", "no-such-folder"], "no checkout"),
    "file": (["--from", "no-such-file.json"], "no-such-file.json"),
    "section without a file": (["--update", "README.md"], "--output or --from"),
    "scaling of a model": (["--scaling", "--config", "llava-tiny"], "leave out --config"),
    "scaling with a setting": (["--scaling", "--compute", "bf16"], "leave out --compute"),
    "scaling with batches": (["--scaling", "--batch", "1"], "leave out --batch"),
    "scaling with repeats": (["--scaling", "--repeats", "10"], "leave out --repeats"),
    "scaling of a method": (["--scaling", "--pruner", "zooo"], "zoo"),
    "seconds without scaling": (["--seconds", "1"], "give --scaling"),
    "a budget of a method": (["--pruner", "zoo@32"], "--keep-tokens"),
    "a file and layers": (["--from", "x.json", "--layers", "2"], "leave out --layers"),
    "a file and an output": (["--from", "x.json"], "leave out --output"),
    "a part without a file": (["--part", "scaling"], "--part needs --from"),
    "kind of picture": (["--plot", "x.pgn"], ".png"),
    "no section": (["--update", str(ROOT / "README.md")], "has no section"),
}
# Cases without the --output that all others have.
ALONE = ("section without a file", "file", "a file and layers")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_line(
    case: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, said = REFUSED[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        output = [] if case in ALONE else ["--output", str(tmp_path / "x.json")]
        cli.main(["bench", *output, *words])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("llava bench: error: ") and said in lines[-1]
    assert len(lines) == 1 or lines[0].startswith("warming up")


def test_without_matplotlib_a_picture_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(command, "run_bench", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stop:
        main(["--plot", "x.png"])
    assert stop.value.code == 2 and "--plot needs matplotlib" in capsys.readouterr().err


def test_a_checkout_may_not_be_called_as_this_one(tmp_path: Path) -> None:
    (tmp_path / "this" / "llava").mkdir(parents=True)
    (tmp_path / "this" / "llava" / "__init__.py").touch()
    with pytest.raises(UserInputError, match="rename"):
        Beside(tmp_path / "this", {})


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_too_little_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(command, "run_bench", fails)
    with pytest.raises(SystemExit) as stop:
        main(["--device", "cpu"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "fewer --layers" in said and "8bit" not in said
    monkeypatch.setattr(command, "run_bench", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["--device", "cpu"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda result: result.update(arms=[]), "before its first repeat"),
        (lambda result: result.pop("rates"), "lacks rates"),
        (lambda result: result["conditions"].pop("depth"), "conditions of .* lacks depth"),
        (lambda result: result["arms"][2].pop("times"), r"arms\[2\] of .* lacks times"),
    ],
)
def test_a_file_that_lacks_something_is_refused(
    change: Any, said: str, bench_result: Any, tmp_path: Path
) -> None:
    change(bench_result)
    file = tmp_path / "x.json"
    file.write_text(json.dumps(bench_result))
    with pytest.raises(UserInputError, match=said):
        read_bench(file)


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"schema_version": 2}')
    with pytest.raises(UserInputError, match="not a file of llava bench"):
        read_bench(file)
