"""Bad samples end a run with their id, or are reported and replaced, the same everywhere."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_llava import make_llava, save_tower
from torch.utils.data import DataLoader

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.model.builder import load_tokenizer
from llava.train.arguments import DataArguments
from llava.train.data import SupervisedDataset
from llava.train.samples import read_samples
from llava.train.skipped import write_skipped
from llava.utils import UserInputError

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}
TEXT = {"id": "text", "conversations": [{"from": "human", "value": "Who?"}, GPT]}
SHOWN = {"image": "whole.png", "conversations": [HUMAN, GPT]}
SAMPLES = [
    {**SHOWN, "id": "good"},
    {**SHOWN, "id": "cut", "image": "cut.png"},
    TEXT,
    {**SHOWN, "id": "missing", "image": "missing.png"},
    {**SHOWN, "id": "marks", "image": ["whole.png", "whole.png"]},
    {**SHOWN, "id": "also good"},
    {"id": "nothing"},
]
NAMES = {0: "good", 1: "also good", 2: "text", 3: "also good", 4: "also good"}


@pytest.fixture
def make(work: Path, tmp_path: Path) -> Callable[..., SupervisedDataset]:
    """`make(samples, skip, **config)`: a dataset of samples with a good and a damaged picture."""
    tokenizer = load_tokenizer(work / "init")
    save_tower(tmp_path / "tower")
    model = make_llava(tokenizer, tmp_path / "tower")
    picture = next((work / "images").rglob("*.png"))
    shutil.copyfile(picture, tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])

    def dataset(samples: Any, skip: bool, **config: Any) -> SupervisedDataset:
        file = tmp_path / "data.json"
        file.write_text(json.dumps(samples))
        args = DataArguments(str(file), image_folder=str(tmp_path), skip_bad_samples=skip)
        model.config.update(config)
        processor = model.get_vision_tower().image_processor
        return SupervisedDataset(args, tokenizer, conv_templates["v1"], processor, model.config)

    return dataset


def ids_of(items: Any) -> list[str]:
    return [item["name"].split("'")[1] for item in items]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_alike_whatever_the_workers(
    workers: int,
    make: Callable[..., SupervisedDataset],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = make(SAMPLES, True)
    assert len(data) == len(NAMES)
    loader = DataLoader(data, batch_size=1, num_workers=workers, collate_fn=lambda items: items[0])
    for _ in range(2):
        assert ids_of(loader) == list(NAMES.values())
    assert ids_of(data[index] for index in (3, 1, 4)) == ["also good"] * 3  # as after a resume
    found = data.skipped()
    assert [name.split("'")[1] for name in found] == ["marks", "nothing", "cut", "missing"]
    lines = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(lines) == len(set(lines)) and "skipped sample 'marks' (number 5) has 1" in lines[0]
    write_skipped(found, tmp_path)
    assert json.loads((tmp_path / "skipped.json").read_text()) == found


def test_without_the_flag_the_first_is_an_error(make: Callable[..., SupervisedDataset]) -> None:
    with pytest.raises(UserInputError, match=r"^sample 'marks' \(number 5\) has 1 <image> marks"):
        make(SAMPLES, False)
    data = make(SAMPLES[:4], False)
    for index, name in ((1, "cut"), (3, "missing")):
        with pytest.raises(UserInputError, match=f"^sample '{name}'"):
            data[index]


def test_a_text_is_not_replaced_by_an_image(make: Callable[..., SupervisedDataset]) -> None:
    data = make([{**SHOWN, "id": "cut", "image": "cut.png"}, TEXT], True)
    assert ids_of([data[1]]) == ["text"]
    with pytest.raises(UserInputError, match="no sample with images can be used; the last: sample"):
        data[0]


def test_a_file_without_a_good_sample_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text('[{"id": "a"}, 5]')
    with pytest.raises(UserInputError, match="no sample that can be used; the first: sample 'a'"):
        read_samples(str(tmp_path / "data.json"), {})


def test_only_the_first_twenty_are_reported_one_by_one(
    make: Callable[..., SupervisedDataset], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = make([{**SHOWN, "id": "good"}, *({"id": n} for n in range(40))], True)
    lines = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(lines) == 21 and "skipped.json lists all" in lines[-1]
    assert len(data.skipped()) == 40


@pytest.mark.parametrize("skip", [False, True])
def test_a_vocabulary_that_the_model_lacks_is_refused(
    skip: bool, make: Callable[..., SupervisedDataset]
) -> None:
    with pytest.raises(UserInputError, match=r"has the id 600, but the model has 600 embeddings"):
        make(SAMPLES[:1], skip, vocab_size=600)


def test_marks_around_images(make: Callable[..., SupervisedDataset]) -> None:
    data = make(SAMPLES[:1], False, mm_use_im_start_end=True, vocab_size=700)
    data.tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    start, end = data.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    ids = data[0]["input_ids"].tolist()
    place = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[place - 1 : place + 2] == [start, IMAGE_TOKEN_INDEX, end]


def test_lengths_are_known_without_opening_images(make: Callable[..., SupervisedDataset]) -> None:
    two = {**SHOWN, "image": ["no.png"] * 2, "conversations": [{**HUMAN, "value": "<image>" * 2}]}
    two["conversations"].append(GPT)
    lengths = make([SAMPLES[3], TEXT, two], False).modality_lengths
    assert lengths[2] > lengths[0] > 0 and lengths[1] == -2


def test_a_run_goes_on_without_bad_samples(work: Path, run_train: Callable[..., Any]) -> None:
    """With steps of one modality, and packed: all three flags of the command reach the data."""
    picture = next(iter(sorted((work / "images").rglob("*.png")))).relative_to(work / "images")
    good = {**SHOWN, "id": "good", "image": str(picture)}
    samples = [good, {**good, "id": "missing", "image": "none.png"}, TEXT, {"id": "nothing"}]
    words = "--skip_bad_samples True --group_by_modality_length True --pack_samples True"
    done = run_train(samples, *words.split(), "--max_steps", "3")
    assert done.code == 0, done.errors
    assert len(done.losses) == 3 and min(done.losses) > 0.1
    skipped = json.loads((done.folder / "skipped.json").read_text())
    assert [name.split("'")[1] for name in skipped] == ["nothing", "missing"]
