"""A model answers alike by folder, by `~` and by hub name; paths in flags know the home folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llava.eval import model_vqa_loader, run_llava
from llava.eval.__main__ import main
from llava.eval.commands.compare import read_arm
from llava.eval.tables.spec import FOLDER, load_table
from llava.model.builder import load_pretrained_model

NAME = "somebody/llava-v1.5-random"


@pytest.fixture(scope="module")
def pruned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as if it had been saved with pruning, and without a template of its own."""
    folder = tmp_path_factory.mktemp("pruned") / "llava-v1.5-random"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["mm_token_pruning"] = {"method": "grid", "keep_tokens": 16}
    config["mm_conv_mode"] = None  # the name decides
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def spellings(
    pruned: Path,
    benchmark_folder: Path,
    hub: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[dict[str, str]]:
    """The model and the benchmark below a home folder, the model on the hub too."""
    home = tmp_path / "home"
    shutil.copytree(pruned, home / pruned.name)
    shutil.copytree(benchmark_folder, home / "data")
    hub(pruned, NAME)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    yield {
        "folder": str(pruned),
        "slash": f"{pruned}/",
        "home": f"~/{pruned.name}",
        "relative": f"home/{pruned.name}",
        "hub": NAME,
        "hub slash": f"{NAME}/",
    }


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_saved_pruning_is_used_by_every_name(spellings, tmp_path, checkpoint) -> None:
    answers, keys = {}, set()
    for kind, path in {**spellings, "unpruned": str(checkpoint)}.items():
        words = [f"--model-path={path}", "--question-file=~/data/questions.jsonl"]
        words += ["--image-folder=~/data/images", f"--answers-file=~/{kind}.jsonl"]
        words += ["--temperature", "0", "--device", "cpu", "--workers", "0"]
        assert model_vqa_loader.main([*words, "--max_new_tokens=4", "--batch-size=8"]) == 0
        answers[kind] = _lines(tmp_path / "home" / f"{kind}.jsonl")
        (info,) = (tmp_path / "home" / f".{kind}.jsonl.run").rglob("run.json")
        if kind != "unpruned":
            keys.add(json.loads(info.read_text())["run_key"])
            assert set(json.loads(info.read_text())["arms"]) == {"grid"}
    unpruned = [line["text"] for line in answers.pop("unpruned")]
    assert len(keys) == 1
    assert all(lines == answers["folder"] for lines in answers.values())
    assert [line["text"] for line in answers["folder"]] != unpruned
    assert {line["model_id"] for line in answers["hub"]} == {"llava-v1.5-random"}


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_a_run_without_arms_measures_the_model_as_it_was_saved(
    kind: str, spellings, tmp_path, checkpoint, capsys
) -> None:
    words = ["--task=llava-tiny", "--data-root=~/data", "--device=cpu", "--workers=0", "--limit=4"]
    model = ["--model-path", spellings[kind]]
    assert main(["run", *model, *words, f"--output={tmp_path / 'own'}"]) == 0
    assert json.loads((tmp_path / "own" / "run.json").read_text())["arms"].keys() == {"grid@16"}
    assert main(["run", *model, *words, "--arm=grid@16", f"--output={tmp_path / 'named'}"]) == 0
    own, named = ((tmp_path / f / "answers.jsonl").read_bytes() for f in ("own", "named"))
    assert own == named
    capsys.readouterr()
    assert main(["run", "--model-path", str(checkpoint), *words, "--dry-run"]) == 0
    assert "none" in capsys.readouterr().out


def test_a_run_has_the_same_key_by_every_name(spellings, tmp_path, capsys) -> None:
    keys, answers = set(), []
    for kind, path in spellings.items():
        words = ["run", "--model-path", path, "--task=llava-tiny", "--data-root=~/data"]
        words += ["--device=cpu", "--workers=0", f"--output=~/{kind}"]
        words += ["--arm=none", "--arm=grid@16", "--limit=4"]
        assert main([*words, "--dry-run"]) == 0
        shown = capsys.readouterr().out
        if kind in ("folder", "hub"):
            assert main(words) == 0
            answers.append((tmp_path / "home" / kind / "answers.jsonl").read_bytes())
            info = json.loads((tmp_path / "home" / kind / "run.json").read_text())
            assert info["run_key"] in shown
            assert info["config"]["template"] == "vicuna_v1"
        keys.add(shown.partition("run key")[2].strip())
    assert len(keys) == 1
    assert answers[0] == answers[1]
    assert read_arm("~/hub:grid@16") == read_arm(str(tmp_path / "home" / "hub") + ":grid@16")


def test_a_run_is_put_under_the_name_of_the_model(spellings, tmp_path) -> None:
    words = ["--task=llava-tiny", "--data-root=~/data", "--device=cpu", "--workers=0", "--limit=1"]
    for kind in ("folder", "hub"):
        assert main(["run", "--model-path", spellings[kind], *words]) == 0
    (folder,) = (tmp_path / "outputs").iterdir()
    assert folder.name == "llava-v1.5-random"


def test_a_dry_run_downloads_nothing(spellings, capsys, monkeypatch) -> None:
    words = ["run", "--task=llava-tiny", "--data-root=~/data", "--device=cpu", "--dry-run"]
    for flags in (
        ["--model-path", "other/model"],
        ["--model-path", NAME, "--model-base", "other/model"],
    ):
        assert main([*words, *flags]) == 0
        assert "run key   known once other/model is downloaded" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["/no/such/model", "~/no-such-model", "./model", "no-such-model"])
@pytest.mark.parametrize("command", ["run", "dry", "quickstart", "vqa", "run_llava"])
def test_a_folder_that_is_not_there_is_one_line(command, path, spellings, capsys) -> None:
    run = ["run", "--model-path", path, "--task=llava-tiny", "--data-root=~/data", "--device=cpu"]
    questions = ["--question-file=~/data/questions.jsonl", "--answers-file=~/a.jsonl"]
    program: Callable[[list[str]], int] = main
    words = {
        "run": run,
        "dry": [*run, "--dry-run"],
        "quickstart": ["quickstart", "--model-path", path],
        "vqa": ["--model-path", path, *questions, "--device=cpu"],
        "run_llava": ["--model-path", path, "--image-file=~/data/images/0.png", "--query=What?"],
    }[command]
    program = {"vqa": model_vqa_loader.main, "run_llava": run_llava.main}.get(command, main)
    try:
        code = program(words)
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert f"{path!r} is not a checkpoint folder; give a folder" in error
    assert error.count("\n") == 1


def test_the_quickstart_by_every_name(spellings, tmp_path) -> None:
    keys, answers = set(), set()
    for kind in ("folder", "home", "hub"):
        words = ["quickstart", "--model-path", spellings[kind], "--benchmark=~/data"]
        words += ["--image-folder=~/data/images", f"--output=~/{kind}", "--limit=2"]
        words += ["--methods", "none", "grid", "--budgets", "16", "--save-result=~/result.json"]
        assert main(words) == 0
        info = json.loads((tmp_path / "home" / kind / "run.json").read_text())
        keys.add(info["run_key"])
        answers.add((tmp_path / "home" / kind / "answers.jsonl").read_bytes())
        assert (tmp_path / "home" / "result.json").is_file()
    assert len(keys) == len(answers) == 1


def test_run_llava_by_every_name(spellings, capsys) -> None:
    said = set()
    for path in spellings.values():
        words = ["--model-path", path, "--image-file=~/data/images/0.png", "--query=What colour?"]
        run_llava.main([*words, "--temperature=0", "--max_new_tokens=8", "--device=cpu"])
        said.add(capsys.readouterr().out)
    assert len(said) == 1


def test_the_chat_loads_by_every_name(spellings) -> None:
    from llava.serve.cli import build_parser, open_session

    for path in spellings.values():
        flags = ["--model-path", path, "--image-file=~/data/images/0.png", "--device=cpu"]
        session = open_session(build_parser().parse_args(flags))
        assert session.loaded.model.pruning.method == "grid"


def test_a_table_below_the_home_folder(spellings, tmp_path) -> None:
    file = next(FOLDER.glob("*.toml"))
    shutil.copy(file, tmp_path / "home" / "mine.toml")
    assert load_table("~/mine.toml").columns == load_table(file.stem).columns


def test_a_tower_of_its_own_below_the_home_folder_enters_the_key(spellings, tmp_path) -> None:
    """The quickstart's key too: another tower gives other answers."""
    home, keys = tmp_path / "home", []
    shutil.copytree(home / "llava-v1.5-random", home / "apart")
    shutil.move(home / "apart" / "tower", home / "tower")
    config = json.loads((home / "apart" / "config.json").read_text())
    (home / "apart" / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "~/tower"}))
    assert load_pretrained_model("~/apart", device="cpu")[1].get_vision_tower().is_loaded
    for number in range(2):
        processor = json.loads((home / "tower" / "preprocessor_config.json").read_text())
        processor["image_mean"] = [0.5 + number / 10] * 3
        (home / "tower" / "preprocessor_config.json").write_text(json.dumps(processor))
        words = ["quickstart", "--model-path=~/apart", "--benchmark=~/data", "--limit=1"]
        words += ["--image-folder=~/data/images", f"--output=~/{number}"]
        assert main([*words, "--methods", "none", "--budgets", "16"]) == 0
        keys.append(json.loads((home / str(number) / "run.json").read_text())["run_key"])
    assert len(set(keys)) == 2
