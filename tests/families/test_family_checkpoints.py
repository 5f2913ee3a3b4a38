"""Checkpoints of the families: loaded, asked as transformers asks them, refused in a line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from saved import KINDS, save_checkpoint
from tiny_llava import build_checkpoint, draw_picture

from llava.families import load
from llava.families.checkpoints import family_of_config
from llava.families.dialogue import IMAGE, Dialogue
from llava.families.loaded import FamilyModel
from llava.families.spec import ModelSpec
from llava.model.checkpoint import read_config
from llava.model.loaded import LoadedModel
from llava.pruning import attach, prune
from llava.utils import UserInputError

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "unpruned": {},
    "zoo": {"config": "zoo", "keep_ratio": 0.3},
    "original": {"config": "divprune", "keep_tokens": 9, "positions": "original"},
    "question": {"config": "mmtok", "keep_ratio": 0.2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        own = root / name
        return own if own.is_dir() else save_checkpoint(name, own)

    return folder


@pytest.fixture
def copied(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Qwen2.5-VL to be changed."""
    return shutil.copytree(folders("qwen2_5_vl"), tmp_path / "qwen")


def shown() -> list[Image.Image]:
    return [draw_picture(0).resize((120, 50)), draw_picture(1).resize((70, 90))]


def conversations(name: str) -> list[tuple[list[dict[str, Any]], Dialogue]]:
    """The same prompts as transformers' messages and as ours: one image, text, several turns."""
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    one = Dialogue(((IMAGE, "\n", "What is this?"),))
    talk = Dialogue((("Hello",),), "Be short.").say("Yes?").say("Look: ", IMAGE, "\nWhat is it?")
    plain = Dialogue((("What is red?",),))
    return [
        ([{"role": "user", "content": [image, text("What is this?")]}], one),
        ([{"role": "user", "content": [text("What is red?")]}], plain),
        (
            [
                {"role": "system", "content": [text("Be short.")]},
                {"role": "user", "content": [text("Hello")]},
                {"role": "assistant", "content": [text("Yes?")]},
                {"role": "user", "content": [text("Look: "), image, text("What is it?")]},
            ],
            talk,
        ),
    ]


def stock_inputs(name: str, loaded: FamilyModel, messages: list[Any]) -> dict[str, Any]:
    """What the family's own processor would make of conversations with `shown` images."""
    mark, model, tokenizer = KINDS[name].mark, loaded.model, loaded.tokenizer
    more = {"crop_to_patches": True} if name == "internvl" else {}
    pixels = dict(loaded.image_processor(images=shown(), return_tensors="pt", **more))
    counts = pixels.pop("num_patches", None)
    with torch.no_grad():
        features = model.model.get_image_features(**pixels, return_dict=True).pooler_output
    if counts is None:
        lengths = [len(own) for own in features]
    else:
        lengths = [int(count) * len(features[0]) for count in counts]
    around = ("<img>", "</img>") if name == "internvl" else ("", "")
    left, texts = iter(lengths), []
    for said in messages:
        first, *others = tokenizer.apply_chat_template(
            said, chat_template=loaded.chat_template, tokenize=False, add_generation_prompt=True
        ).split(mark)
        for piece in others:
            first += around[0] + mark * next(left) + around[1] + piece
        texts.append(first)
    made = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    made = {**made, **pixels}
    if name.startswith("qwen"):
        made["mm_token_type_ids"] = (made["input_ids"] == model.config.image_token_id).int()
    return made


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", KINDS)
def test_answers_are_those_of_transformers(
    folders: Callable[[str], Path], name: str, setting: str
) -> None:
    loaded = load(str(folders(name)), device="cpu")
    assert isinstance(loaded, FamilyModel) and loaded.pruning is None
    messages, dialogues = zip(*conversations(name), strict=True)
    inputs = stock_inputs(name, loaded, list(messages))
    questions = ["What is this?", "What is red?", "What is it?"]
    asked = {"questions": questions} if setting == "question" else {}
    with prune(loaded.model, **SETTINGS[setting]):
        stock = loaded.model.generate(**inputs, **GREEDY, **asked)[
            :, inputs["input_ids"].shape[1] :
        ]
        rows = [loaded.row(said) for said in dialogues]
        pictures = [loaded.prepare(image) for image in shown()]
        answers = loaded.answer(rows, pictures, questions, **GREEDY)
        strict = loaded.answer(rows, pictures, questions, strict=True, **GREEDY)
    assert torch.equal(stock, answers) and torch.equal(stock, strict)
    with prune(loaded.model, "zoo", keep_tokens=2):
        assert not torch.equal(loaded.answer(rows, pictures, questions, **GREEDY), stock)


def test_prompts_are_those_of_the_processor(folders: Callable[[str], Path]) -> None:
    loaded = load(str(folders("llava_next-qwen2")), device="cpu")
    processor = transformers.LlavaNextProcessor(
        image_processor=loaded.image_processor,
        tokenizer=loaded.tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    (messages, dialogue), *_ = conversations("llava_next-qwen2")
    text = processor.apply_chat_template(
        messages, chat_template=loaded.chat_template, add_generation_prompt=True
    )
    made = processor(images=shown()[:1], text=text, return_tensors="pt")
    row, picture = loaded.row(dialogue), loaded.prepare(shown()[0])
    assert loaded.measure(row, [picture]).total == made["input_ids"].shape[1]
    with torch.no_grad():
        inputs = loaded.splice(loaded.encode([picture]), [row])
        table = loaded.model.get_input_embeddings()
        words = made["input_ids"] != loaded.model.config.image_token_id
        assert torch.equal(inputs.embeds[words], table(made["input_ids"])[words])
    for name, value in picture.inputs.items():
        assert torch.equal(value, made[name])


def test_several_images_are_refused_where_they_are_read_otherwise(
    folders: Callable[[str], Path],
) -> None:
    loaded = load(str(folders("llava_onevision")), device="cpu")
    row = loaded.row(Dialogue(((IMAGE, IMAGE, "Both?"),)))
    with pytest.raises(UserInputError, match="one image a prompt"):
        loaded.answer([row], [loaded.prepare(image) for image in shown()], ["Both?"], **GREEDY)


def test_prumerge_is_refused_without_a_block_after_the_features(
    folders: Callable[[str], Path],
) -> None:
    loaded = load(str(folders("qwen2_5_vl")), device="cpu")
    with prune(loaded.model, "prumerge", keep_tokens=5), pytest.raises(UserInputError) as caught:
        loaded.encode([loaded.prepare(shown()[0])])
    assert "use another method" in str(caught.value)


def test_the_chat_template_may_be_in_a_json_file(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = save_checkpoint("qwen2_5_vl", tmp_path / "qwen", "chat_template.json")
    said = Dialogue(((IMAGE, "What?"),))
    one, other = (load(str(own), device="cpu") for own in (folder, folders("qwen2_5_vl")))
    assert one.render(said) == other.render(said)
    assert ModelSpec(str(folder)).own_template == ModelSpec(str(folders("qwen2_5_vl"))).own_template


def test_a_saved_setting_is_read_and_waits(copied: Path) -> None:
    loaded = load(str(copied), device="cpu")
    attach(loaded.model, "zoo", keep_ratio=0.5)
    loaded.model.save_pretrained(copied)
    again = load(str(copied), device="cpu")
    assert again.own_pruning is not None and again.own_pruning.keep_ratio == 0.5
    assert again.pruning is None
    again.pruning = again.own_pruning
    assert again.pruning == again.own_pruning


def test_precision_and_what_stays_out_of_quantization(folders: Callable[[str], Path]) -> None:
    from llava.families.checkpoints import _outside_language_model
    from llava.families.qwen import Qwen25VL

    folder = folders("qwen2_5_vl")
    assert load(str(folder), device="cpu").model.dtype == torch.float32
    assert load(str(folder), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    cls = transformers.Qwen2_5_VLForConditionalGeneration
    config = cls.config_class.from_pretrained(folder)
    assert _outside_language_model(Qwen25VL, cls, config) == ["model.visual", "lm_head"]


def test_native_checkpoints_stay_native(folders: Callable[[str], Path], tmp_path: Path) -> None:
    native = build_checkpoint(tmp_path / "llava-random")
    assert isinstance(load(str(native), device="cpu"), LoadedModel)
    config = read_config(folders("llava_next-qwen2"))
    assert family_of_config(config, "here") is not None
    config["text_config"]["model_type"] = "llama"
    assert family_of_config(config, "here") is None
    assert family_of_config({"model_type": "llava"}, "here") is None
    assert family_of_config({"model_type": "qwen2_vl"}, "here").name == "qwen2_vl"


def test_a_processor_saved_with_the_others(copied: Path, folders: Callable[[str], Path]) -> None:
    """Later releases keep all processors of a model in one file."""
    file = copied / "preprocessor_config.json"
    settings = {**json.loads(file.read_text()), "image_processor_type": "Qwen2VLImageProcessorFast"}
    (copied / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    file.unlink()
    pictures = [
        load(str(folder), device="cpu").prepare(shown()[0]).inputs
        for folder in (copied, folders("qwen2_5_vl"))
    ]
    for name, value in pictures[0].items():
        assert torch.equal(value, pictures[1][name])


def edit(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def other_processor(folder: Path) -> None:
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_processor_type": "Eye"}))


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def bad_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def missing_weight(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop("visual.merger.mlp.0.weight"))


def nan_weight(folder: Path) -> None:
    change_weights(folder, lambda weights: weights["visual.merger.mlp.0.weight"].fill_(torch.nan))


def other_sizes(folder: Path) -> None:
    text = {**read_config(folder)["text_config"], "intermediate_size": 128}
    edit(folder, text_config=text)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tokenizer": (no_tokenizer, "has no tokenizer"),
    "no processor": (no_processor, "has no image processor"),
    "other processor": (other_processor, "'Eye', which transformers"),
    "no template": (no_template, "has no chat template"),
    "no weights": (no_weights, "cannot be loaded"),
    "missing weight": (missing_weight, "1 missing weights"),
    "NaN": (nan_weight, "NaN or inf"),
    "other sizes": (other_sizes, "mismatched weights"),
    "bad setting": (lambda folder: edit(folder, mm_token_pruning={"method": "zo"}), "zoo"),
    "unknown": (lambda folder: edit(folder, architectures=["Blip"]), "also loads .*Qwen2_5_VL"),
    "unasked": (
        lambda folder: edit(folder, architectures=["Idefics3ForConditionalGeneration"]),
        "which only their processor does",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said_in_one_line(copied: Path, fault: str) -> None:
    damage, words = FAULTS[fault]
    damage(copied)
    with pytest.raises(UserInputError, match=words) as caught:
        load(str(copied), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_template_that_cannot_be_used(copied: Path) -> None:
    bad_template(copied)
    loaded = load(str(copied), device="cpu")
    with pytest.raises(UserInputError, match="chat template"):
        loaded.row(Dialogue((("Hello",),)))
    (copied / "chat_template.jinja").write_text("no images")
    with pytest.raises(UserInputError, match="0 image tokens for 1"):
        load(str(copied), device="cpu").row(Dialogue(((IMAGE,),)))


def test_a_class_that_this_transformers_lacks(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copied, architectures=["Toy3ForConditionalGeneration"])
    from llava.families.qwen import Qwen25VL

    monkeypatch.setattr(Qwen25VL, "classes", ("Toy3ForConditionalGeneration",))
    with pytest.raises(UserInputError, match="needs Toy3ForConditionalGeneration, which"):
        load(str(copied), device="cpu")


@pytest.mark.parametrize(
    "flags",
    [{"conv_mode": "vicuna_v1"}, {"base": "lmsys/vicuna"}, {"mm_next_protocol": "fixed2880"}],
    ids=lambda flags: next(iter(flags)),
)
def test_flags_of_llava_are_refused(folders: Callable[[str], Path], flags: dict[str, str]) -> None:
    spec = ModelSpec(str(folders("qwen2_5_vl")), device="cpu", **flags)
    with pytest.raises(UserInputError, match="is for LLaVA checkpoints"):
        spec.load()
