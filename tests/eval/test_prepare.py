"""`python -m llava.eval prepare`: from datasets and archives of the published schema to a check."""

from __future__ import annotations

import base64
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.eval.__main__ import main
from llava.eval.data.layout import Layout
from llava.eval.tasks.base import (
    Benchmark,
    Sources,
    TaskError,
    get_benchmark,
    list_benchmarks,
    list_prepared,
)

NEEDS_DATASETS = "the library datasets is not installed (llava[data])"


def png(colour: str = "red") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (5, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


def cell(colour: str = "red") -> dict[str, Any]:
    return {"bytes": png(colour), "path": None}


def people(answer: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n in range(10)]


TYPES = {"structural": "verify", "semantic": "attr", "detailed": "x"}
VQA = {"question_id": 7, "image_id": 42, "question": "What?", "image": cell()}
MMBENCH = {
    **{"index": 3, "question": "Line one\nline two", "hint": None, "A": "cat", "B": '"dog"'},
    **{"C": None, "D": None, "answer": "A", "category": "c", "image": cell("blue")},
    **{"source": "s", "L2-category": "l", "comment": None, "split": "dev"},
}
SEED = {
    **{"question_id": "9", "question_type_id": 2, "data_type": "image", "data_id": "a_1"},
    **{"question": "Who?", "answer": "B", "image": [cell()], "segment": None},
    **{f"choice_{letter}": letter * 3 for letter in "abcd"},
}
SEED_VIDEO = {"question_id": "v10", "data_type": "video", "question_type_id": 10}
MME = {"question_id": "OCR/1.png", "question": "Is it? Please answer yes or no.", "category": "OCR"}
# {task: {(configuration or "", split): rows as the dataset has them}}
ROWS: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = {
    "gqa": {
        ("testdev_balanced_images", "testdev"): [{"id": "n1", "image": cell()}],
        ("testdev_balanced_instructions", "testdev"): [
            {
                **{"id": name, "imageId": "n1", "question": "Is it?", "answer": "yes"},
                **{"isBalanced": True, "types": TYPES},
            }
            for name in ("201", "202")
        ],
    },
    "vqav2": {
        ("", "validation"): [
            VQA | {"answers": people("cat"), "question_type": "what", "answer_type": "other"}
        ]
    },
    "textvqa": {
        ("", "validation"): [
            {
                **{"image_id": "ab", "question_id": 1, "question": "What does it say?"},
                **{"answers": ["stop"] * 10, "ocr_tokens": ["STOP", "12"], "image": cell()},
            }
        ]
    },
    "mme": {
        ("", "test"): [
            MME | {"answer": "Yes", "image": cell()},
            MME | {"answer": "No", "image": cell(), "question": "Or? Please answer yes or no."},
        ]
    },
    "mmbench": {("en", "dev"): [MMBENCH]},
    "mmbench-cn": {("cn", "dev"): [MMBENCH]},
    "seed": {
        ("", "test"): [SEED, SEED | SEED_VIDEO | {"image": [cell(), cell("blue"), cell()]}],
    },
    "mmmu": {
        ("", "validation"): [
            {
                **{"id": "validation_Math_1", "question": "<image 1>?", "options": "['1', '2']"},
                **{"answer": "A", "question_type": "multiple-choice", "image_1": cell()},
                **{f"image_{number}": None for number in range(2, 8)},
            }
        ]
    },
    "vizwiz": {
        ("", "test"): [
            {"question_id": "VizWiz_test_0.jpg", "question": "What is it?", "image": cell()}
        ]
    },
    "mmvet": {("", "test"): [{"question_id": "v1_0", "question": "Why?", "image": cell()}]},
    "llava-bench": {
        ("", "train"): [
            {
                **{"question_id": 0, "question": "Describe.", "category": "detail"},
                **{"image_id": "001.jpg", "image": cell()},
            }
        ]
    },
}
FIRST_TEXT = {
    "gqa": "Is it?\nAnswer the question using a single word or phrase.",
    "textvqa": "What does it say?\nReference OCR token: STOP, 12\n"
    "Answer the question using a single word or phrase.",
    "mme": "Is it?\nAnswer the question using a single word or phrase.",
    "mmbench": 'Line one\nline two\nA. cat\nB. "dog"\n'
    "Answer with the option's letter from the given choices directly.",
    "seed": "Who?\nA. aaa\nB. bbb\nC. ccc\nD. ddd\n"
    "Answer with the option's letter from the given choices directly.",
}


def expect(monkeypatch: pytest.MonkeyPatch, task: str, count: int) -> None:
    """Hold a benchmark to `count` questions, one of them with an image where not all have one."""
    cls = get_benchmark(task)
    published = cls.sources

    def sources(benchmark: Benchmark) -> Sources:
        found = published(benchmark)
        assert found is not None
        with_image = None if found.with_image is None else 1
        more = benchmark.protocol == "all"
        return replace(found, count=count + more, with_image=with_image)

    monkeypatch.setattr(cls, "sources", sources)


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published counts, replaced by those of the small files here."""
    counts = {"gqa": 2, "mme": 2, "pope": 3, "scienceqa": 2}
    for task in list_prepared():
        expect(monkeypatch, task, counts.get(task, 1))


def write_dataset(folder: Path, task: str) -> Path:
    """The rows of `task` as parquet files, laid out as at the hub."""
    datasets = pytest.importorskip("datasets", reason=NEEDS_DATASETS)
    for (config, split), rows in ROWS[task].items():
        data = datasets.Dataset.from_list(rows)
        for name in data.column_names:
            if name.startswith("image") and name not in ("image_id", "imageId"):
                listed = isinstance(rows[0][name], list)
                kind = datasets.List(datasets.Image()) if listed else datasets.Image()
                data = data.cast_column(name, kind)
        path = folder / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.to_parquet(path)
    return folder


def prepare(*arguments: str | Path) -> int:
    return main(["prepare", *map(str, arguments)])


def test_every_benchmark_says_where_its_data_come_from_for_every_protocol(tmp_path: Path) -> None:
    assert set(list_benchmarks()) - set(list_prepared()) == {"llava-tiny"}  # in the package
    for name in list_prepared():
        for protocol in get_benchmark(name).protocols:
            sources = get_benchmark(name)(tmp_path, protocol).sources()
            assert sources is not None and sources.files and sources.originals
            places = [*sources.files, *filter(None, (sources.images, sources.tree))]
            assert all(path.is_relative_to(tmp_path) for path in places)


def test_published_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    found = {}
    for name in list_prepared():
        for protocol in get_benchmark(name).protocols:
            sources = get_benchmark(name)(tmp_path, protocol).sources()
            assert sources is not None
            found[name, protocol] = sources.count
    assert found["vqav2", "val"] == 214_354 and found["vqav2", "test-dev"] == 107_394
    assert found["seed", "image"] == 14_233 and found["textvqa", "no-ocr"] == 5_000
    uncounted = [name for name, count in found.items() if count is None]
    assert {name for name, _ in uncounted} == {"mmbench", "mmbench-cn", "seed"}


@pytest.mark.parametrize("task", ROWS)
def test_datasets_become_benchmarks(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = write_dataset(tmp_path / "source", task), tmp_path / "eval"
    assert prepare(task, "--from", source, "--data-root", root) == 0
    assert capsys.readouterr().out.startswith(f"{task}: ready: ")
    benchmark = get_benchmark(task)(root)
    items = benchmark.items()
    assert items[0].text == FIRST_TEXT.get(task, items[0].text)
    for item in items:
        assert all(benchmark.load_image(name).size == (5, 3) for name in item.images)
        assert item.images
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert prepare(task, "--from", source, "--data-root", root) == 0  # nothing is done twice
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_videos_are_their_middle_frame(tmp_path: Path) -> None:
    source, root = write_dataset(tmp_path / "source", "seed"), tmp_path / "eval"
    assert prepare("seed", "--protocol", "all", "--from", source, "--data-root", root) == 0
    frame = root / "seed_bench" / "SEED-Bench-video-image" / "v10.png"
    assert frame.read_bytes() == png("blue")  # as stored, not encoded anew


def test_an_interrupted_preparation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, root = write_dataset(tmp_path / "source", "seed"), tmp_path / "eval"
    written: list[str] = []
    write = Layout.write

    def counted(layout: Layout, path: Path, content: str | bytes) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path.name)
        write(layout, path, content)

    monkeypatch.setattr(Layout, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare("seed", "--from", source, "--data-root", root)
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["a_1"]
    monkeypatch.undo()
    first = root / "seed_bench" / "SEED-Bench-image" / "a_1"
    stamp = first.stat().st_mtime_ns
    expect(monkeypatch, "seed", 1)
    assert prepare("seed", "--from", source, "--data-root", root) == 0
    assert first.stat().st_mtime_ns == stamp  # written once


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_without_network_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason=NEEDS_DATASETS)

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\n(timed out)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert prepare("gqa", "--data-root", tmp_path) == 2
    line = error_line(capsys)
    assert "cannot read lmms-lab/GQA (testdev): Couldn't reach the Hub (timed out); connect" in line
    assert "prepare gqa --from FOLDER" in line


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prepare("gqa", "--data-root", tmp_path) == 2
    assert "pip install 'llava[data]'" in error_line(capsys)


def test_another_schema_names_the_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_dataset(tmp_path / "source", "vizwiz")
    (source / "test-00000-of-00001.parquet").rename(source / "train-0.parquet")
    capsys.readouterr()  # the library shows how it writes
    assert prepare("llava-bench", "--from", source, "--data-root", tmp_path / "eval") == 2
    assert "lacks the columns category, image_id; it has" in error_line(capsys)
    assert prepare("mmvet", "--from", source, "--data-root", tmp_path / "eval") == 2
    assert "has no test-*.parquet of lmms-lab/MMVet" in error_line(capsys)


def test_damaged_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets", reason=NEEDS_DATASETS)
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1 cut off")
    assert prepare("mmvet", "--from", tmp_path, "--data-root", tmp_path / "eval") == 2
    assert "cannot read lmms-lab/MMVet (test) in" in error_line(capsys)
    path = write_dataset(tmp_path / "source", "mmvet") / "test-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 60 + content[64:])  # the first page, not the footer
    capsys.readouterr()
    assert prepare("mmvet", "--from", path.parent, "--data-root", tmp_path / "eval") == 2
    assert "cannot read lmms-lab/MMVet (test) in" in error_line(capsys)
    assert not (tmp_path / "eval" / "mm-vet" / "llava-mm-vet.jsonl").exists()


@pytest.fixture
def pope_archive(tmp_path: Path) -> Path:
    """Question file, labels and images in one archive, with the folders of their publishers."""
    name, kinds = "COCO_val2014_000000000001.jpg", ("random", "popular", "adversarial")
    questions = [
        {"question_id": number, "image": name, "text": "Is it?", "category": kind}
        for number, kind in enumerate(kinds)
    ]
    path = tmp_path / "pope.zip"
    with zipfile.ZipFile(path, "w") as archive:
        lines = "\n".join(map(json.dumps, questions))
        archive.writestr("eval/pope/llava_pope_test.jsonl", lines)
        for kind in kinds:
            label = json.dumps({"image": name, "label": "yes"})
            archive.writestr(f"POPE-main/output/coco/coco_pope_{kind}.json", label)
        archive.writestr(f"val2014/{name}", png())
        archive.writestr("val2014/another.jpg", png())
        archive.writestr("../escape.jpg", png())
    return path


def test_originals_from_an_archive(
    pope_archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "eval"
    assert prepare("pope", "--check", "--data-root", root) == 1
    assert "llava_pope_test.jsonl: No such file" in (printed := capsys.readouterr().out)
    assert "2,910 lines" in printed and "prepare pope --from PATH" in printed
    assert prepare("pope", "--from", pope_archive, "--data-root", root) == 0
    assert capsys.readouterr().out == "pope: ready: 3 questions, 1 images\n"
    names = {path.name for path in root.rglob("*.jpg")}
    assert names == {"COCO_val2014_000000000001.jpg"}  # what is asked about, nothing else


def test_originals_from_a_tar(pope_archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "pope.tar.gz"
    with zipfile.ZipFile(pope_archive) as source, tarfile.open(path, "w:gz") as archive:
        for name in source.namelist():
            entry = tarfile.TarInfo(name)
            entry.size = len(content := source.read(name))
            archive.addfile(entry, BytesIO(content))
    assert prepare("pope", "--from", path, "--data-root", tmp_path / "eval") == 0
    assert not (tmp_path / "escape.jpg").exists()


@pytest.mark.parametrize("name", ["cut.zip", "cut.tar.gz"])
def test_archives_that_are_cut_short(
    pope_archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    whole = pope_archive
    if name.endswith("gz"):
        whole = tmp_path / "whole.tar.gz"
        with tarfile.open(whole, "w:gz") as archive:
            archive.add(pope_archive, "pope.zip")
    cut = tmp_path / name
    cut.write_bytes(whole.read_bytes()[:-300])
    assert prepare("pope", "--from", cut, "--data-root", tmp_path / "eval") == 2
    assert "is damaged or cut short" in error_line(capsys)


def test_check_alone_goes_through_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("--check", "--data-root", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list_prepared()
    assert all("python -m llava.eval prepare" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_revision_is_told_by_its_count(
    pope_archive: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect(monkeypatch, "pope", 8_910)
    assert prepare("pope", "--from", pope_archive, "--data-root", tmp_path / "eval") == 2
    assert "there are 3 questions, published are 8,910" in error_line(capsys)


def test_images_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = tmp_path / "sqa", tmp_path / "eval"
    turns = [{"from": "human", "value": "Which?"}]
    problems = {name: {"choices": ["x", "y"], "answer": 0} for name in ("7", "8")}
    rows = [{"id": "7", "image": "7/image.png", "conversations": turns}]
    rows.append({"id": "8", "conversations": turns})
    for name, content in (
        ("problems", problems),
        ("pid_splits", {"test": ["7", "8"]}),
        ("llava_test_CQM-A", rows),
    ):
        source.mkdir(exist_ok=True)
        (source / f"{name}.json").write_text(json.dumps(content))
    for number, colour in (("5", "blue"), ("77", "blue")):
        path = source / "test" / number / "image.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(colour))
    assert prepare("scienceqa", "--from", source, "--data-root", root) == 2
    assert "1 of 1 images are missing" in error_line(capsys)
    for folder, colour in (("train", "blue"), ("test", "red")):
        path = source / folder / "7" / "image.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(colour))
    assert prepare("scienceqa", "--from", source, "--data-root", root) == 0
    assert (root / "scienceqa/images/test/7/image.png").read_bytes() == png("red")


def test_a_folder_of_a_release_is_taken_whole(tmp_path: Path) -> None:
    source, root = tmp_path / "mme", tmp_path / "eval"
    release = source / "downloads" / "MME_Benchmark_release_version" / "OCR"
    release.mkdir(parents=True)
    (release / "1.png").write_bytes(png())
    asked = [f"Is it {word}? Please answer yes or no." for word in ("a", "b")]
    (release / "1.txt").write_text("".join(f"{text}\tYes\n" for text in asked))
    suffix = "\nAnswer the question using a single word or phrase."
    prompts = [
        {"question_id": "OCR/1.png", "image": "OCR/1.png", "text": f"Is it {word}?{suffix}"}
        for word in ("a", "b")
    ]
    lines = "\n".join(map(json.dumps, prompts))
    (source / "llava_mme.jsonl").write_text(lines)
    assert prepare("mme", "--from", source, "--data-root", root) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_bytes(b"not an archive"), "nothing that scienceqa still needs"),
        (lambda path: path.mkdir(), "nothing that scienceqa still needs"),
    ],
)
def test_useless_sources(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Any],
    message: str,
) -> None:
    make(tmp_path / "source")
    arguments = ["--from", tmp_path / "source", "--data-root", tmp_path / "eval"]
    assert prepare("scienceqa", *arguments) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "unknown task 'nosuch'"),
        ([], "give a task to prepare"),
        (["gqa", "--protocol", "fast"], "has no protocol 'fast'"),
        (["gqa", "pope", "--from", "x"], "are for one task"),
        (["scienceqa"], "cannot be made from a public dataset: download"),
    ],
)
def test_unusable_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert prepare(*arguments, "--data-root", tmp_path) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize("path", ["../a.jpg", "/a.jpg", "a/../../b.jpg", ""])
def test_names_do_not_lead_out_of_the_root(tmp_path: Path, path: str) -> None:
    with pytest.raises(TaskError, match="leads out of the data root"):
        Layout(tmp_path / "root").image(tmp_path / "root" / path, cell())


def test_cells_of_tables_keep_their_image_bytes(tmp_path: Path) -> None:
    source, root = write_dataset(tmp_path / "source", "mmbench"), tmp_path / "eval"
    assert prepare("mmbench", "--from", source, "--data-root", root) == 0
    text = (root / "mmbench" / "mmbench_dev_20230712.tsv").read_text()
    assert base64.b64encode(png("blue")).decode() in text
    assert text.split("\n")[0].split("\t")[-3:] == ["l2-category", "comment", "split"]
