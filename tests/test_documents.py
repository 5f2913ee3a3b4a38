"""Documents: short where they must be, links that lead somewhere, commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import llava
from llava.bench import command as bench
from llava.cli import COMMANDS
from llava.eval import __main__ as evaluation
from llava.eval import run_llava
from llava.eval.tasks.base import get_benchmark, list_benchmarks
from llava.model.convert import command as conversion
from llava.pruning import __main__ as pruning
from llava.serve import cli as chat

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "playground/llava-tiny/README.md"]
)
PROGRAMS = ("llava", "python -m llava.eval", "python -m llava.eval.run_llava")
each_document = pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)


def test_the_readme_is_short_and_its_picture_small() -> None:
    assert (ROOT / "README.md").stat().st_size <= 10_240
    text = (ROOT / "README.md").read_text()
    assert text.index("![") < text.index("## Install"), "a picture is on the first screen"
    assert (ROOT / "docs/kept-tokens.png").stat().st_size < 150_000


def anchors(file: Path) -> set[str]:
    """What headings of a Markdown file are called in links."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        place = (file.parent / name).resolve() if name else file
        assert place.exists() and place.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(place), target


def test_every_document_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        file = waiting.pop()
        if file in reached or file.suffix != ".md":
            continue
        reached.add(file)
        links = re.findall(r"\]\(([^)\s#]+)", file.read_text())
        waiting += [(file.parent / link).resolve() for link in links if "://" not in link]
    assert reached >= set(DOCUMENTS)


def commands(file: Path) -> list[str]:
    """Command lines of this package in the code blocks of a document, without variables."""
    blocks = re.findall(r"^```(?:bash|console)\n(.*?)^```", file.read_text(), flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ").partition(" #")[0].strip() for line in lines]
    return [line for line in lines if line.startswith(PROGRAMS) and "..." not in line]


def understand(words: list[str]) -> object:
    """Parse a command as its program would. argparse ends in SystemExit for a wrong one."""
    if words[:2] == ["python", "-m"]:
        parsers = {"llava.eval": evaluation, "llava.eval.run_llava": run_llava}
        return parsers[words[2]].build_parser().parse_args(words[3:])
    name, *rest = words[1:]
    if name == "--help":
        return None
    assert name in COMMANDS
    alone = {"chat": chat, "bench": bench, "convert": conversion}
    if name in alone:
        return alone[name].build_parser().parse_args(rest)
    return (pruning if name == "methods" else evaluation).build_parser().parse_args([name, *rest])


@each_document
def test_commands_are_understood(file: Path) -> None:
    for command in commands(file):
        args = understand(shlex.split(command))
        image = getattr(args, "image_file", None)
        assert image is None or (ROOT / image).is_file(), command


def test_commands_are_found_at_all() -> None:
    assert len(commands(ROOT / "README.md")) == 5
    found = {name: len(commands(ROOT / f"docs/{name}.md")) for name in ("serving", "evaluation")}
    assert found == {"serving": 2, "evaluation": 4}
    with pytest.raises(SystemExit):
        understand(["llava", "run", "--tsak", "pope"])


def test_every_benchmark_is_described() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    files, _, figures = text.partition("| metric |")
    described: dict[str, list[str]] = {}
    for line in files.splitlines():
        if not line.startswith(("| `", "| |")):
            continue
        tasks, protocols = (re.findall(r"`([\w-]+)`", cell) for cell in line.split("|")[1:3])
        name = tasks[0] if tasks else [*described][-1]  # an empty cell goes on with the task above
        described.setdefault(name, []).extend(protocols)
    assert described == {name: list(get_benchmark(name).protocols) for name in list_benchmarks()}
    for name in described:
        assert f"`{name}`" in figures


def test_the_changelog_has_a_place_for_what_is_new() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == llava.__version__
    identifiers = [i["value"] for r in citation["references"] for i in r["identifiers"]]
    assert {"arXiv:2509.24837", "arXiv:2304.08485"} <= set(identifiers)
    assert citation["authors"] and citation["title"] and citation["message"]


def test_the_workflow_runs_the_test_script_on_both_versions() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert job["steps"][-1] == {"run": "bash scripts/test.sh"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda file: file.name
)
def test_issue_templates_are_forms(file: Path) -> None:
    form = yaml.safe_load(file.read_text())
    assert form["name"] and form["description"]
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "checkboxes") and field["attributes"]["label"]


def test_hooks_need_no_network() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [hook["entry"].split()[:4] for hook in hooks] == [
        ["python", "-m", "ruff", command] for command in ("check", "format")
    ]


def test_the_script_in_serving_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "serving.md").read_text()
    script = re.search(r"^```python\n(.*?)^```", text, flags=re.M | re.S)[1]
    exec(compile(script.replace('"auto"', '"cpu"'), "serving.md", "exec"), {})
    assert capsys.readouterr().out == "white\n"
