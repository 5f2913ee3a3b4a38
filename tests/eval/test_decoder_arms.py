"""Arms that prune between layers: their text, how they run, and what they say they read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from llava.command_line import add_model_flags
from llava.eval.__main__ import main
from llava.eval.commands.run import arms_from
from llava.eval.engine import schema
from llava.eval.engine.request import Arm, arm_of, parse_arm
from llava.eval.engine.run import mark_unavailable
from llava.eval.engine.runner import Runner
from llava.eval.engine.schema import Record, read_lines, read_metrics, read_result
from llava.eval.report.pictures import save_overlays
from llava.eval.report.plots import draw_accuracy
from llava.eval.report.result import render
from llava.model.loaded import LoadedModel
from llava.pruning import PruningConfig, PruningError, prune
from llava.pruning.config import CHOICES
from llava.pruning.decoder.method import DecoderMethod, Schedule, option
from llava.pruning.decoder.registry import DECODER_METHODS
from llava.sampling import Sampling
from llava.utils import UserInputError


class Drawing(DecoderMethod):
    """Draw at random; for the text of arms only."""

    name = "drawing"
    seed: int = option(0, at_least=0)
    text: str = option("a")
    share: float = option(0.5, at_least=0)

    @property
    def files(self) -> tuple[str, ...]:
        return (self.text,) if self.text.endswith(".json") else ()

    def plan(self, tokens: int, depth: int, budget: float | None) -> Schedule:
        return Schedule((1,), (tokens // 2,))


@pytest.fixture
def drawing() -> Iterator[None]:
    DECODER_METHODS.entries()
    DECODER_METHODS.register(Drawing)
    yield
    del DECODER_METHODS._entries["drawing"]


TEXTS = [
    ("fastv@64", "fastv", 64, "fastv, 64 tokens a layer"),
    ("fastv", "fastv", None, "fastv"),
    ("fastv@0.25", "fastv", 0.25, "fastv, 25 % of the tokens a layer"),
    ("fastv:k=3,ratio=0.5", "fastv", None, "fastv, k=3, ratio=0.5"),
    ("zoo@192+fastv@64", "zoo+fastv", 64, "zoo, 192 tokens; fastv, 64 tokens a layer"),
    ("zoo@192+fastv", "zoo+fastv", 192, "zoo, 192 tokens; fastv"),
    (
        "zoo:directions=8@192+pyramiddrop:recipe=early@64",
        "zoo+pyramiddrop",
        64,
        "zoo, directions=8, 192 tokens; pyramiddrop, recipe=early, 64 tokens a layer",
    ),
    (
        "none:scope=prompt+fastv@64",
        "fastv",
        64,
        "none, scope=prompt; fastv, 64 tokens a layer",
    ),
]


@pytest.mark.parametrize(("text", "method", "budget", "label"), TEXTS)
def test_text_of_an_arm(text: str, method: str, budget: Any, label: str) -> None:
    arm = parse_arm(text)
    assert (arm.name, arm.method, arm.budget, arm.label) == (text, method, budget, label)
    assert type(arm.budget) is type(budget)
    assert arm_of(arm.pruning) == arm
    again = PruningConfig.from_dict(json.loads(json.dumps(arm.to_dict()["pruning"])))
    assert again == arm.pruning


def test_one_setting_has_one_name() -> None:
    for text in ("fastv@192", "fastv", "fastv:k=3@0.25"):
        assert parse_arm(f"none+{text}") == parse_arm(text)


def test_the_text_holds_every_setting(drawing: None) -> None:
    """Whatever a setting is made of, its name reads as the same setting."""
    texts = ["b+c", "1e+3", "+", "a,b", "x@y", '"', "[", "+x", "drawing@3+fastv@4", "null", "é+é"]
    decoders = [{"method": "drawing", "options": {"text": text}} for text in texts]
    decoders += [
        {"method": "drawing", "keep_ratio": 1e-5, "options": {"share": 1e30}},
        {"method": "pyramiddrop", "options": {"layers": [1, 2], "ratios": [0.5, 0.25]}},
        {"method": "fastv", "keep_tokens": 7},
    ]
    host = {"host": "zoo", "host_options": {"step": 1e-3}}
    before: list[dict[str, Any]] = [
        {},
        {"method": "cen-prune", "keep_ratio": 0.25, "options": host},
        *({name: values[-1]} for name, (values, _) in CHOICES.items() if name != "newline"),
    ]
    for decoder in decoders:
        for own in before:
            config = PruningConfig.from_dict({**own, "decoder": decoder})
            name = arm_of(config).name
            assert parse_arm(name).pruning == config, name
    names = {arm_of(PruningConfig.from_dict({"decoder": decoder})).name for decoder in decoders}
    assert len(names) == len(decoders)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("zoo@192+zoo@64", "prunes before the language model"),
        ("fastv@192+pyramiddrop@64", "'fastv' is a decoder method itself"),
        ("zoo@192+fastv@64+fastv@32", "one method before"),
        ("zoo+fastv@64", "'zoo' needs keep_tokens"),
        ("none@64+fastv@64", "takes no options and no budget"),
        ("zoo@192+fastv@many", "'many' is not a budget"),
        ("fastv@64.5", "'64.5' is not a budget; give a number of tokens such as 64"),
        ("fastvv@64", "did you mean 'fastv'"),
        ("zoo@192+sparsevlm", "--decoder-keep-tokens or --decoder-keep-ratio"),
        ("zoo@192+fastv:layer=3@64", "unknown option of 'fastv'"),
        ("zoo@192+fastv:scope=prompt@64", "unknown option of 'fastv'"),
        ("fastv:ratio=0.5@64", "not both"),
    ],
)
def test_text_that_is_no_arm(text: str, reason: str) -> None:
    with pytest.raises(PruningError, match=reason):
        parse_arm(text)


def test_a_seed_for_both_methods(drawing: None) -> None:
    both = parse_arm("zoo@192+drawing@64").seeded(7)
    assert both is not None and both.decoder is not None
    assert (both.options, both.decoder.options) == ({"seed": 7}, {"seed": 7})
    own = parse_arm("zoo:seed=1@192+drawing:seed=2@64").seeded(7)
    assert own is not None and own.decoder is not None
    assert (own.options["seed"], own.decoder.options["seed"]) == (1, 2)
    assert parse_arm("fastv@64").seeded(7) == parse_arm("fastv@64").pruning


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--decoder-pruner fastv --decoder-keep-tokens 64", ["fastv@64"]),
        ("--decoder-pruner fastv --decoder-keep-ratio 0.5", ["fastv@0.5"]),
        ("--decoder-pruner pyramiddrop --scope prompt", ["none:scope=prompt+pyramiddrop"]),
        ("--pruner none --decoder-pruner fastv --decoder-option k=3", ["fastv:k=3"]),
        ("--pruner fastv --keep-tokens 64", ["fastv@64"]),
        ("--pruner zoo --keep-tokens 192 --decoder-pruner fastv", ["zoo@192+fastv"]),
        (
            "--preset paper --keep-ratio 0.5 --decoder-pruner fastv --decoder-keep-tokens 64",
            ["paper@0.5+fastv@64"],
        ),
    ],
)
def test_flags_become_an_arm(flags: str, names: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    for flag in ("--arm", "--arms", "--preset"):
        parser.add_argument(flag, default=[] if flag == "--arm" else None)
    from llava.eval.presets import get_preset

    args = parser.parse_args(["--model-path", "m", *flags.split()])
    arms = arms_from(args, None if args.preset is None else get_preset(args.preset))
    assert [arm.name for arm in arms] == names
    (arm,) = arms
    if args.preset is None:
        assert parse_arm(arm.name).pruning == arm.pruning
    else:
        assert arm.pruning is not None and arm.pruning.decoder == parse_arm("fastv@64").decoder


def records_of(runner: Runner, *words: str) -> dict[str, list[Record]]:
    arms = mark_unavailable(runner, [parse_arm(word) for word in words])
    found: dict[str, list[Record]] = {}
    for answers, _ in runner.run(arms):
        for record in answers:
            found.setdefault(record["arm"], []).append(record)
    return found


def test_what_layers_read(make_runner: Callable[..., Runner], subject: LoadedModel) -> None:
    """Counts are those of the schedule, bytes those of the cache, answers those of `generate`."""
    runner = make_runner()
    arms = [parse_arm(word) for word in ("none", "fastv@300", "grid@196+fastv@100")]
    (answers, timings), *_ = runner.run(arms)
    for arm, per_layer in (("fastv@300", [576, 24]), ("grid@196+fastv@100", [196, 4])):
        lines = [line for line in answers if line["arm"] == arm]
        (timing,) = [line for line in timings if line["arm"] == arm]
        assert lines and 0 < timing["between_ms"] < timing["prefill_ms"]
        for line in lines:
            assert line["tokens_per_layer"] == per_layer
            assert (line["tokens_in"], line["tokens_last"]) == tuple(per_layer)
            assert line["tokens_mean"] == fmean(per_layer)
        # Keys and values of width 32 in float32; rows are padded to the longest question.
        rows = [runner.subject.row(_dialogue(runner, line)) for line in lines]
        text = max(len(row) for row in rows) - 1
        assert timing["kv_bytes"] == sum(2 * 32 * 4 * (text + count) for count in per_layer)
        line = lines[0]
        item = runner.plan.items[line["index"]]
        image = runner.source.load([item.images[0]]).pictures
        settings = runner.sampling.arguments_for(subject.model, subject.tokenizer)
        with prune(subject.model, parse_arm(arm).seeded(0)):
            new = subject.answer([rows[0]], image, [item.question], **settings)
        said = subject.tokenizer.decode(new[0], skip_special_tokens=True).strip()
        assert line["answer"] == said
    unpruned = [line for line in [*answers, *timings] if line["arm"] == "none"]
    keys = {key for line in unpruned for key in line}
    assert not keys & {"tokens_last", "tokens_mean", "tokens_per_layer", "kv_bytes", "between_ms"}


def _dialogue(runner: Runner, line: Record) -> Any:
    from llava.eval.prompts import question

    return question(runner.plan.items[line["index"]].text, len(line["images"]))


def test_rows_that_are_drawn_alone_are_counted_too(make_runner: Callable[..., Runner]) -> None:
    sampling = Sampling(temperature=0.5, max_new_tokens=3)
    together = records_of(make_runner(), "fastv@300", "grid@196+fastv@100")
    alone = records_of(make_runner(sampling=sampling), "fastv@300", "grid@196+fastv@100")
    counts = ("tokens_in", "tokens_last", "tokens_mean", "tokens_per_layer")
    for arm, lines in together.items():
        assert [{key: line[key] for key in counts} for line in lines] == [
            {key: line[key] for key in counts} for line in alone[arm]
        ]


def test_batches_do_not_change_answers(make_runner: Callable[..., Runner]) -> None:
    words = ("fastv@300", "grid@196+pyramiddrop")
    found = [records_of(make_runner(batch_size), *words) for batch_size in (1, 5)]
    keys = ("question_id", "answer", "tokens_per_layer")
    for arm in words:
        one, five = ({line["index"]: line for line in records[arm]} for records in found)
        for index, line in one.items():
            assert [line[key] for key in keys] == [five[index][key] for key in keys]


def test_an_arm_without_images_reads_none(make_runner: Callable[..., Runner]) -> None:
    runner = make_runner()
    arm = replace(parse_arm("fastv@300"), name="blind", image="absent")
    (answers, timings), *_ = runner.run([arm])
    for line in answers:
        assert (line["tokens_in"], line["tokens_last"], line["tokens_mean"]) == (0, 0, 0.0)
        assert line["tokens_per_layer"] == []
    assert timings[0]["kv_bytes"] == 0


def test_a_budget_below_the_floor_is_found_before_the_run(
    make_runner: Callable[..., Runner],
) -> None:
    runner = make_runner()
    words = ("none", "fastv@64", "grid@196+fastv@64", "fastv:k=2@300", "fastv@288")
    arms = mark_unavailable(runner, [parse_arm(word) for word in words])
    by_name = {arm.name: arm for arm in arms}
    assert {name: arm.floor for name, arm in by_name.items()} == {
        "none": None,
        "fastv@64": 288,
        "grid@196+fastv@64": 98,
        "fastv:k=2@300": None,
        "fastv@288": None,
    }
    assert by_name["fastv@288"].unavailable is None
    assert "keep at least 288" in str(by_name["fastv@64"].unavailable)
    why = "k must be less than the 2 layers of the language model, got 2"
    assert why in str(by_name["fastv:k=2@300"].unavailable)
    assert by_name["fastv@64"].to_dict()["floor"] == 288
    assert Arm("a", **by_name["fastv@64"].to_dict()).floor == 288
    with pytest.raises(UserInputError, match="keep at least 288"):
        mark_unavailable(runner, [parse_arm("fastv@64")])


def test_a_file_that_an_option_names_is_part_of_the_key(
    drawing: None,
    checkpoint: Path,
    benchmark_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    curve = tmp_path / "curve.json"
    words = ["run", "--model-path", str(checkpoint), "--task", "llava-tiny", "--dry-run"]
    words += ["--data-root", str(benchmark_folder), "--arm", f"drawing:text={curve}@300"]
    keys = []
    for content in ("{}", "[]", "{}"):
        curve.write_text(content)
        assert main(words) == 0
        keys.append(capsys.readouterr().out.splitlines()[-1])
    assert keys[0] == keys[2] != keys[1]


def test_a_model_that_drops_nothing_is_no_arm(
    make_runner: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer of the unpruned model is taken for one of the arm."""
    for name in (
        "loaded.generating_between_layers",
        "language_model.llava_causal_lm.embeddings_between_layers",
    ):
        monkeypatch.setattr(f"llava.model.{name}", lambda *given, **named: nullcontext())
    none, fastv = mark_unavailable(make_runner(), [parse_arm("none"), parse_arm("fastv@300")])
    assert none.unavailable is None
    assert "does not say what its layers read" in str(fastv.unavailable)


@pytest.fixture(scope="module")
def finished(
    checkpoint: Path, benchmark_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One quickstart with a method between layers, alone and behind another."""
    output = tmp_path_factory.mktemp("finished")
    words = ["quickstart", "--model-path", str(checkpoint), "--benchmark", str(benchmark_folder)]
    words += ["--methods", "grid", "fastv", "grid@196+fastv", "--budgets", "300", "100"]
    words += ["--limit", "3", "--output", str(output), "--save-result", str(output / "r.json")]
    assert main(words) == 0
    return output


def test_files_name_what_layers_read(finished: Path) -> None:
    arms = read_metrics(finished)["arms"]
    assert arms["fastv@300"]["between_layers"] == {
        "tokens_in": 576,
        "tokens_last": 24,
        "tokens_mean": 300,
        "tokens_per_layer": [576, 24],
    }
    assert [arms["fastv@300"][f"tokens_{name}"] for name in ("in", "mean")] == [576, 300]
    assert [arms["grid@100"][f"tokens_{name}"] for name in ("in", "mean")] == [100, 100]
    lines = [line for line in read_lines(finished / "answers.jsonl") if line["arm"] == "fastv@300"]
    assert arms["fastv@300"]["tokens_mean"] == fmean(line["tokens_mean"] for line in lines)
    assert arms["grid@196+fastv@100"]["between_layers"]["tokens_per_layer"] == [196, 4]
    assert arms["fastv@100"]["floor"] == 288
    for name in ("none", "shuffled-image"):
        assert "between_layers" not in arms[name] and "floor" not in arms[name]
    kinds = {"answers.jsonl": schema.Answer, "timings.jsonl": schema.Timing}
    found = {file: read_lines(finished / file) for file in kinds}
    found["arms"] = list(arms.values())
    found["rows"] = [row for row in read_result(finished / "r.json")["rows"] if "n" in row]
    for file, kind in {**kinds, "arms": schema.ArmMetrics, "rows": schema.ResultRow}.items():
        keys = {key for line in found[file] for key in line}
        assert keys <= kind.__annotations__.keys()
        assert keys >= {
            key
            for key in ("tokens_per_layer", "kv_bytes", "between_ms", "between_layers")
            if key in kind.__annotations__
        }
    assert arms["fastv@300"]["between_layers"].keys() == schema.LayerTokens.__annotations__.keys()


def test_tables_show_the_mean_and_the_floor(finished: Path) -> None:
    result = read_result(finished / "r.json")
    rows = {row["arm"]: row for row in result["rows"]}
    assert rows["grid@196+fastv@100"]["method"] == "grid+fastv"
    assert [row["budget"] for row in rows.values() if row["method"] == "fastv"] == [300, 100]
    cells = [[cell.strip() for cell in line.split("|")] for line in render(result).splitlines()]
    (fastv,) = [cell for cell in cells if cell[1:2] == ["fastv"] and "floor 288" in cell[3:5]][:1]
    assert "±" in fastv[3] and fastv[4] == "floor 288"
    shown = {tuple(cell[1:4]) for cell in cells if len(cell) > 8}
    assert {("fastv", "300", "300.0"), ("fastv", "100", "floor 288")} < shown
    assert {("grid", "100", "100"), ("grid@196+fastv", "100", "100.0")} < shown
    assert "means over layers" in render(result)
    kept = [row for row in result["rows"] if "fastv" not in row["method"]]
    assert "means over layers" not in render(result | {"rows": kept})
    (axes,) = draw_accuracy(result).axes
    points = {c.get_label(): [float(x) for x in c.lines[0].get_xdata()] for c in axes.containers}
    assert points["fastv"] == [pytest.approx(300, rel=0.1)], "the mean over layers, not 576"


def test_pictures_of_what_enters_the_layers(
    make_runner: Callable[..., Runner], tmp_path: Path
) -> None:
    arms = [parse_arm(word) for word in ("fastv@300", "grid@196+fastv@300")]
    save_overlays(make_runner(), arms, 300, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 0


def test_compare_takes_arms_of_both_kinds(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", f"{finished}:grid@196+fastv@100", f"{finished}:fastv@300"]) == 0
    out = capsys.readouterr().out
    assert "A: grid@196+fastv@100" in out and "A and the unpruned model" in out
