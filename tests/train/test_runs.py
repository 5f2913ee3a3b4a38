"""Whole runs of the trainer: what is kept of the model, and what data may be like."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model, load_tokenizer
from llava.train.arguments import ModelArguments
from llava.train.conversations import tokenize_sample
from llava.train.parts import load_start
from llava.train.samples import parse_sample
from llava.train.trainer import LlavaTrainer

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}
TEXT = {"id": "t", "conversations": [{"from": "human", "value": "Who?"}, GPT]}
SHOWN = {"id": "s", "image": "train/000000.png", "conversations": [HUMAN, GPT]}
LIMIT_OF_TEXT = "--model_max_length"


@pytest.fixture(scope="session")
def base(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained LLaVA whose settings all differ from what training would choose."""
    folder = tmp_path_factory.mktemp("base")
    args = ModelArguments(str(work / "init"), vision_tower=str(work / "tower"))
    model = load_start(args, torch.float32)
    model.config.update(KEPT)
    model.get_model().add_newline()
    model.generation_config.update(temperature=0.3, do_sample=True, eos_token_id=[7, 8])
    model.save_pretrained(folder)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(work / "init" / file, folder / file)
    return folder


KEPT = {
    "image_aspect_ratio": "square",
    "tokenizer_padding_side": "left",
    "tokenizer_model_max_length": 3000,
    "mm_vision_select_layer": -1,
    "mm_vision_select_feature": "cls_patch",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_token_pruning": None,
    "use_cache": True,
    "pad_token_id": 5,
    "bos_token_id": 1,
    "eos_token_id": 7,
    "mm_conv_mode": "llava_v1",
    "unfreeze_mm_vision_tower": False,
}


@pytest.mark.parametrize("tower", [False, True], ids=["own tower", "tower named"])
def test_what_no_argument_names_stays_as_it_was(
    tower: bool, base: Path, run_train: Callable
) -> None:
    """In every checkpoint, not only in what is saved at the end."""
    done = run_train(
        [SHOWN, TEXT], "--save_strategy", "steps", "--save_steps", "1", base=base, tower=tower
    )
    assert done.code == 0, done.errors
    before = json.loads((base / "config.json").read_text())
    for folder in (done.folder, done.folder / "checkpoint-1"):
        after = json.loads((folder / "config.json").read_text())
        assert {key: after.get(key) for key in before} == before
        for file in ("generation_config.json", "tokenizer_config.json"):
            old, new = (json.loads((f / file).read_text()) for f in (base, folder))
            assert old == new
        assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert not torch.equal(*_projectors(base, done.folder))


def _projectors(*folders: Path) -> list[torch.Tensor]:
    name = "model.mm_projector.0.weight"
    return [load_file(folder / "model.safetensors")[name] for folder in folders]


def test_what_arguments_name_is_changed(base: Path, run_train: Callable) -> None:
    changed = {
        "image_aspect_ratio": "pad",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
    }
    words = [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    done = run_train([SHOWN], *words, LIMIT_OF_TEXT, "900", base=base, tower=False)
    assert done.code == 0, done.errors
    before = json.loads((base / "config.json").read_text())
    wanted = {**before, **changed, "tokenizer_model_max_length": 900}
    assert {key: done.config.get(key) for key in before} == wanted


def test_a_layer_that_is_named_is_the_one_that_trains(base: Path, run_train: Callable) -> None:
    losses = {
        layer: run_train([SHOWN], "--mm_vision_select_layer", layer, base=base, tower=False).losses
        for layer in ("-1", "-2")
    }
    assert run_train([SHOWN], base=base, tower=False).losses == losses["-1"] != losses["-2"]


def test_a_new_llava_says_what_it_is(run_train: Callable) -> None:
    config = run_train([SHOWN]).config
    wanted = {
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_cache": True,
    }
    assert {key: config.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--mm_projector_type linear", "has a projector of type 'mlp2x_gelu', not 'linear'"),
        ("--mm_vision_select_layer 9", "mm_vision_select_layer 9 does not exist"),
        ("--mm_vision_select_feature all", "unknown mm_vision_select_feature 'all'"),
        ("--mm_patch_merge_type heap", "mm_patch_merge_type is 'heap'"),
        ("--vision_tower no/such/tower", "cannot find the vision tower 'no/such/tower'"),
        ("--pretrain_mm_mlp_adapter none.bin", "there is no projector file 'none.bin'"),
        ("--resume_from_checkpoint none", "--resume_from_checkpoint none is not a checkpoint"),
        ("--image_folder none", "--image_folder none is not a folder"),
        ("--feature_file none.npy", "cannot read --feature_file none.npy"),
        ("--model_name_or_path none", "'none'"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(
    words: str, fault: str, base: Path, run_train: Callable
) -> None:
    assert fault in run_train([SHOWN], *words.split(), base=base, tower=False).refused()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"method": "mmtok", "keep_tokens": 9}, "'mmtok' (mm_token_pruning in its config.json)"),
        ({"decoder": {"method": "fastv"}}, "between layers with 'fastv'"),
    ],
)
def test_models_that_training_cannot_feed_are_refused(
    settings: dict[str, Any], fault: str, base: Path, tmp_path: Path, run_train: Callable
) -> None:
    shutil.copytree(base, tmp_path / "other")
    config = json.loads((base / "config.json").read_text()) | {"mm_token_pruning": settings}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert fault in run_train([SHOWN], base=tmp_path / "other", tower=False).refused()


def test_training_without_images_refuses_samples_with_images(run_train: Callable) -> None:
    assert (
        "--is_multimodal False, but samples have images"
        in run_train([SHOWN], "--is_multimodal", "False").refused()
    )
    assert run_train([TEXT], "--is_multimodal", "False").code == 0


def test_bad_samples_are_skipped_and_listed(run_train: Callable) -> None:
    lost = SHOWN | {"id": "lost", "image": "no/such.png"}
    run = run_train([SHOWN, lost, TEXT, {"id": "empty"}], "--skip_bad_samples", "True")
    assert run.code == 0, run.errors
    listed = json.loads((run.folder / "skipped.json").read_text())
    assert len(listed) == 2 and any("lost" in name for name in listed)
    assert "lost" in run_train([SHOWN, lost]).refused()


def test_batches_of_one_modality(run_train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bool]] = []
    merge = LlavaTrainer.compute_loss

    def look(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        marks = (inputs["input_ids"] == IMAGE_TOKEN_INDEX).any(dim=1)
        seen.append(marks.tolist())
        return merge(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, "compute_loss", look)
    samples = [SHOWN, TEXT] * 6
    words = "--group_by_modality_length True --max_steps 6 --num_train_epochs 1"
    assert run_train(samples, *words.split()).code == 0
    assert all(len(set(batch)) == 1 for batch in seen) and len(seen) == 6
    assert {batch[0] for batch in seen} == {True, False}


def test_a_tower_of_another_width_is_refused(
    work: Path, base: Path, tmp_path: Path, run_train: Callable
) -> None:
    config = CLIPVisionConfig.from_pretrained(work / "tower", hidden_size=48, num_attention_heads=3)
    CLIPVisionModel(config).save_pretrained(tmp_path / "wide")
    done = run_train([SHOWN], "--vision_tower", str(tmp_path / "wide"), base=base, tower=False)
    assert "features of width 48, but the model's projector takes 32" in done.refused()


SAMPLES = {
    "a first turn by the model": {**TEXT, "conversations": [GPT, *TEXT["conversations"]]},
    "a last question": {**SHOWN, "conversations": [HUMAN, GPT, {"from": "human", "value": "Why?"}]},
    "an empty answer": {
        **SHOWN,
        "conversations": [HUMAN, {**GPT, "value": ""}, {"from": "human", "value": "Why?"}, GPT],
    },
    "a list of one image": {**SHOWN, "image": ["train/000000.png"]},
    "two images": {
        **SHOWN,
        "image": ["train/000000.png", "train/000001.png"],
        "conversations": [{"from": "human", "value": "<image> and <image>?"}, GPT],
    },
    "an image of null": {**TEXT, "image": None},
    "no image": TEXT,
    "no id": {"image": "train/000000.png", "conversations": [HUMAN, GPT]},
}


@pytest.mark.parametrize("share", ["0", "1"])
def test_forms_of_samples_train(share: str, run_train: Callable) -> None:
    done = run_train(
        list(SAMPLES.values()),
        *("--parallel_turns", share, "--max_steps", "4", "--dataloader_num_workers", "1"),
    )
    assert done.code == 0, done.errors
    assert len(done.losses) == 4 and np.isfinite(done.losses).all() and min(done.losses) > 0.1


def _bad_images(folder: Path) -> dict[str, str]:
    (folder / "text.png").write_text("no image")
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    Image.new("RGB", (40_000, 2)).save(folder / "strip.png")
    Image.new("RGB", (64, 64), "red").save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:70])
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    return {
        "text.png": "is not an image",
        "huge.png": "is too large",
        "strip.png": "too long and thin",
        "cut.png": "damaged or cut short",
        "empty.png": "is not an image",
        "folder.png": "folder.png",
        "missing.png": "no such file",
        "a\0b": "no such file",
    }


@pytest.mark.parametrize("workers", ["0", "1"])
def test_images_that_cannot_be_shown_name_the_sample(
    workers: str, tmp_path: Path, run_train: Callable
) -> None:
    """Also where a worker of the loader finds it."""
    good = {**SHOWN, "image": "whole.png"}
    for name, fault in _bad_images(tmp_path).items():
        if workers == "1" and name not in ("cut.png", "missing.png"):
            continue
        line = run_train(
            [good, {**good, "id": "bad one", "image": name}],
            *("--image_folder", str(tmp_path), "--dataloader_num_workers", workers),
            *("--per_device_train_batch_size", "1", "--max_steps", "2"),
        ).refused()
        assert "sample 'bad one' (number 2): " in line
        assert fault in line


@pytest.mark.parametrize("limit", ["1", "8", "40"])
@pytest.mark.parametrize(
    "sample", [{**TEXT, "id": "x"}, {**SHOWN, "id": "x"}], ids=["text", "image"]
)
@pytest.mark.parametrize("share", ["0", "1"])
def test_an_answer_that_the_limit_cuts_away_is_refused(
    share: str, sample: dict[str, Any], limit: str, run_train: Callable
) -> None:
    """Before the splice cuts the text, and after it, where an image takes the room."""
    if limit == "40":
        sample = {
            **sample,
            "conversations": [{**HUMAN, "value": HUMAN["value"] + " red" * 50}, GPT],
        }
        sample["image"] = "train/000000.png"
    line = run_train([sample], LIMIT_OF_TEXT, limit, "--parallel_turns", share).refused()
    assert (
        f"sample 'x' (number 1): its first answer begins behind the length limit of {limit}" in line
    )
    assert LIMIT_OF_TEXT in line


def test_an_image_may_take_the_room_of_the_answer(run_train: Callable) -> None:
    """The text alone would fit."""
    line = run_train([{**SHOWN, "id": "x"}, TEXT], LIMIT_OF_TEXT, "500").refused()
    assert "sample 'x' (number 1): its first answer begins behind the length limit of 500" in line
    assert run_train([{**SHOWN, "id": "x"}, TEXT], LIMIT_OF_TEXT, "700").code == 0


def test_captions_train_the_projector_alone(
    work: Path, tmp_path: Path, run_train: Callable
) -> None:
    words = ("--version", "plain", "--tune_mm_mlp_adapter", "True", "--max_steps", "2")
    done = run_train([SHOWN, {**SHOWN, "id": "u", "image": "train/000001.png"}], *words)
    assert done.code == 0, done.errors
    assert done.losses[1] < done.losses[0]
    projector = torch.load(done.folder / "mm_projector.bin", weights_only=True)
    saved = load_file(done.folder / "mm_projector.safetensors")
    assert projector and all(torch.equal(saved[name], p) for name, p in projector.items())
    assert not list(done.folder.glob("model*.safetensors"))
    weights = load_pretrained_model(str(done.folder), str(work / "init"), device="cpu")[1]
    weights = weights.state_dict()
    start = load_file(work / "init" / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in start.items())
    assert all(torch.equal(weights[name], p) for name, p in projector.items())
    kept = tmp_path / "mm_projector.bin"
    shutil.copyfile(done.folder / "mm_projector.bin", kept)
    again = run_train([SHOWN], "--pretrain_mm_mlp_adapter", str(kept), "--learning_rate", "0")
    after = load_file(again.folder / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in projector.items())


def test_only_captions_can_be_learnt_as_captions(run_train: Callable) -> None:
    line = run_train([TEXT], "--version", "plain").refused()
    assert "sample 't' (number 1) has 2 turns and 0 images; the template 'plain'" in line


@pytest.mark.parametrize(
    "key", ["v0", "v0_mmtag", "v1_mmtag", "llama_2", "mistral_instruct", "mpt"]
)
def test_other_templates_train(key: str, run_train: Callable) -> None:
    done = run_train([SHOWN, TEXT], "--version", key)
    assert done.code == 0, done.errors
    assert done.losses[0] > 0.1


def test_the_projector_can_be_frozen(base: Path, run_train: Callable) -> None:
    done = run_train([SHOWN], "--freeze_mm_mlp_adapter", "True", base=base, tower=False)
    assert torch.equal(*_projectors(base, done.folder))


def test_memory_can_be_saved(base: Path, run_train: Callable) -> None:
    plain = run_train([SHOWN], base=base, tower=False).losses
    again = run_train([SHOWN], "--gradient_checkpointing", "True", base=base, tower=False)
    assert again.losses == pytest.approx(plain, abs=1e-4)


def _pictures(folder: Path) -> list[str]:
    noise = np.random.RandomState(0)
    names = []
    for index, (width, height) in enumerate([(300, 900), (640, 320), (40, 40)]):
        names.append(f"{index}.png")
        pixels = noise.randint(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / names[-1])
    return names


@pytest.mark.parametrize("merge", ["flat", "spatial_unpad"])
def test_images_of_different_sizes_train_as_tiles(
    merge: str, base: Path, tmp_path: Path, run_train: Callable
) -> None:
    """The loss is the one that the model has on the same samples, sizes given."""
    samples = [{**SHOWN, "id": name, "image": name} for name in _pictures(tmp_path)]
    words = ["--image_folder", str(tmp_path), "--image_aspect_ratio", "anyres"]
    words += ["--mm_patch_merge_type", merge, "--mm_vision_select_feature", "patch"]
    words += [LIMIT_OF_TEXT, "4096", "--per_device_train_batch_size", "4", "--learning_rate", "0"]
    done = run_train([*samples, TEXT], *words, base=base, tower=False)
    assert done.code == 0, done.errors
    assert done.config["image_aspect_ratio"] == "anyres"

    tokenizer, model, processor, _ = load_pretrained_model(str(done.folder), device="cpu")
    total, count = 0.0, 0
    for sample in [*samples, TEXT]:
        parsed = parse_sample(sample)
        ids, labels, _ = tokenize_sample(parsed, conv_templates["v1"], tokenizer)
        shown: dict[str, Any] = {}
        if parsed.images:
            image = Image.open(tmp_path / parsed.images[0])
            pixels = process_images([image], processor, model.config)
            shown = {"images": pixels, "image_sizes": [image.size]}
        learnt = int((labels >= 0).sum())
        with torch.no_grad():
            loss = model(ids[None], labels=labels[None], **shown).loss
        total, count = total + float(loss) * learnt, count + learnt
    assert done.losses[0] == pytest.approx(total / count, abs=1e-3)


@pytest.mark.parametrize(
    ("array", "image", "fault"),
    [
        (np.zeros((2, 4, 32), np.float16), "star.png", "none for the image 'star.png'"),
        (np.zeros((2, 4, 32), np.float16), "000002.png", "rows 0 to 1, and none for"),
        (np.zeros((2, 4, 32), np.float16), "-1.png", "none for the image '-1.png'"),
        (np.zeros((2, 4, 31), np.float16), "0.png", "float16 of shape [2, 4, 31]"),
        (np.zeros((4, 32), np.float16), "0.png", "float16 of shape [4, 32]"),
        (np.zeros((2, 4, 32), np.int64), "0.png", "int64 of shape [2, 4, 32]"),
        (np.array([{}]), "0.png", "cannot read --feature_file"),
    ],
)
def test_faults_of_cached_features_are_one_line(
    array: np.ndarray, image: str, fault: str, tmp_path: Path, run_train: Callable
) -> None:
    np.save(tmp_path / "features.npy", array)
    words = ("--feature_file", str(tmp_path / "features.npy"))
    line = run_train([{**SHOWN, "image": image}], *words).refused()
    assert fault in line


def test_cached_features_are_no_tiles(work: Path, run_train: Callable) -> None:
    words = ("--feature_file", f"{work}/data/features.npy", "--image_aspect_ratio", "anyres")
    assert "one view of each image" in run_train([SHOWN], *words).refused()


def test_a_cut_checkpoint_is_not_continued(work: Path, tmp_path: Path, run_train: Callable) -> None:
    """A run that was killed while it saved goes on from the checkpoint before."""
    words = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2")
    assert run_train([SHOWN, TEXT], *words).code == 0
    (tmp_path / "output" / "checkpoint-2" / "trainer_state.json").unlink()
    done = run_train([SHOWN, TEXT], *words, "--max_steps", "3")
    assert done.code == 0, done.errors
    assert len(done.losses) == 3


def test_a_run_without_a_step_is_refused(run_train: Callable) -> None:
    done = run_train([SHOWN], "--dataloader_drop_last", "True", "--max_steps", "-1")
    assert "the 1 samples do not fill a batch" in done.refused()


def test_a_mistral_trains(work: Path, tmp_path: Path, run_train: Callable) -> None:
    config = MistralConfig(
        vocab_size=load_tokenizer(work / "init").vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(work / "init" / file, tmp_path / "mistral" / file)
    words = ("--version", "mistral_instruct", "--parallel_turns", "1")
    done = run_train([SHOWN, TEXT], *words, base=tmp_path / "mistral")
    assert done.code == 0, done.errors
    assert done.config["architectures"] == ["LlavaMistralForCausalLM"]
