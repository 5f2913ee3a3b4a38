"""`llava convert`: the same answers in both forms, and the same weights after both ways."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from llava.anyres import process_images
from llava.cli import main
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.model import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.builder import load_pretrained_model, load_tokenizer
from llava.model.checkpoint import DERIVED_KEY
from llava.model.convert import conversion, convert
from llava.model.convert.chat_template import as_jinja
from llava.model.convert.to_hugging_face import ToHuggingFace
from llava.model.convert.weights import plan_shards
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.shipped import shipped_path
from llava.utils import UserInputError
from llava.world.scene import make_scene

TINY = shipped_path("llava-tiny")
ROWS = 640  # tokens and embeddings of llava-tiny
QUESTIONS = ("What color is the cross?", "Is there a yellow star?", "How many circles are there?")


def _scene(seed: int, box: tuple[int, int, int, int] | None = None) -> Image.Image:
    picture = Image.fromarray(make_scene((seed,)).pixels).convert("RGB")
    return picture if box is None else picture.crop(box)


PICTURES = (_scene(3), _scene(5, (0, 40, 300, 200)), _scene(8, (20, 0, 120, 310)))


def _native_inputs(loaded: tuple, picture: Image.Image, question: str) -> tuple[list[int], object]:
    tokenizer, model, processor, _ = loaded
    chat = conv_templates[model.config.mm_conv_mode].copy()
    chat.append_message(chat.roles[0], f"<image>\n{question}")
    chat.append_message(chat.roles[1], None)
    ids = tokenizer_image_token(chat.get_prompt(), tokenizer)
    return ids, process_images([picture], processor, model.config)


def _their_inputs(processor: AutoProcessor, picture: Image.Image, question: str) -> dict:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def _without_marks(ids: list[int], mark: int) -> tuple[list[int], list[int]]:
    """The ids before and after the marks of one image."""
    first, last = ids.index(mark), len(ids) - ids[::-1].index(mark)
    assert set(ids[first:last]) == {mark}
    return ids[:first], ids[last:]


@torch.no_grad()
def _assert_same_answers(folder: Path, loaded: tuple, pictures: tuple, record_error) -> None:
    """Ask the native model, and what stock transformers makes of the folder."""
    model = loaded[1]
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    mark = theirs.config.image_token_id
    answers = set()
    for picture, question in zip(pictures, QUESTIONS, strict=True):
        ids, pixels = _native_inputs(loaded, picture, question)
        inputs = _their_inputs(processor, picture, question)
        assert torch.equal(inputs["pixel_values"], pixels), "the same pixels, bit for bit"
        their_ids = inputs["input_ids"][0].tolist()
        assert _without_marks(their_ids, mark) == _without_marks(ids, IMAGE_TOKEN_INDEX)
        given = {"images": pixels, "image_sizes": [picture.size]}
        logits = theirs(**inputs).logits
        error = (logits[..., :ROWS] - model(torch.tensor([ids]), **given).logits).abs().max().item()
        record_error("convert: logits of both forms", error)
        assert error <= 1e-4 and logits.std() > 0.1
        settings = {"max_new_tokens": 8, "do_sample": False}
        wanted = model.generate(torch.tensor([ids]), **given, **settings)
        new = theirs.generate(**inputs, **settings)[:, len(their_ids) :]
        assert new.tolist() == wanted.tolist()
        answers.add(tuple(new[0].tolist()))
    assert len(answers) > 1, "answers depend on the pictures"


def test_llava_tiny_gives_the_same_answers_in_both_forms(hf_llava_tiny: Path, record_error) -> None:
    config = json.loads((hf_llava_tiny / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    loaded = load_pretrained_model("llava-tiny", device="cpu")
    _assert_same_answers(hf_llava_tiny, loaded, PICTURES, record_error)


def test_the_converted_folder_is_read_natively_too(hf_llava_tiny: Path) -> None:
    loaded = load_pretrained_model("llava-tiny", device="cpu")
    again = load_pretrained_model(str(hf_llava_tiny), device="cpu")
    ids, pixels = _native_inputs(loaded, PICTURES[1], QUESTIONS[0])
    their_ids, their_pixels = _native_inputs(again, PICTURES[1], QUESTIONS[0])
    assert their_ids == ids and torch.equal(pixels, their_pixels)
    with torch.no_grad():
        ours, theirs = (m[1](torch.tensor([ids]), images=pixels).logits for m in (loaded, again))
    assert torch.equal(ours, theirs[..., :ROWS])


def test_the_mark_of_images_is_never_answered(hf_llava_tiny: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(hf_llava_tiny)
    mark = model.config.image_token_id
    assert mark == ROWS == model.generation_config.suppress_tokens[0]
    tables = load_file(hf_llava_tiny / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert torch.equal(tables[name][ROWS], tables[name][0]), "a copy of the unknown token"
    assert (AutoTokenizer.from_pretrained(hf_llava_tiny)("<image>").input_ids) == [1, mark]


def test_a_batch_is_padded_on_the_left(hf_llava_tiny: Path) -> None:
    processor = AutoProcessor.from_pretrained(hf_llava_tiny)
    texts = ["USER: <image> \nIs there a star? ASSISTANT:", "USER: <image> \nWhy? ASSISTANT:"]
    batch = processor(images=list(PICTURES[:2]), text=texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"][1, 0] == 0 and batch["attention_mask"][:, -1].all()


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(file)
    return found


def _assert_equal_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


def _config(folder: Path) -> dict[str, Any]:
    """Settings in config.json that are not what a missing key means."""
    config = json.loads((folder / "config.json").read_text())
    usual = {"mm_patch_merge_type": "flat", "mm_use_im_start_end": False, "use_mm_proj": None}
    settings = {key: value for key, value in config.items() if usual.get(key, ...) != value}
    return {key: value for key, value in settings.items() if key != "transformers_version"}


TEXTS = ("Hi there", "a  b   c\n", "</s>USER: x", " <unk> é 漢", "")


def test_there_and_back(hf_llava_tiny: Path, tmp_path: Path) -> None:
    back = convert(hf_llava_tiny, tmp_path / "back")
    _assert_equal_weights(_tensors(back), _tensors(TINY))
    assert _config(back) == _config(TINY)
    for file in ("generation_config.json", "vision_tower/config.json"):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (back, TINY))
        assert all(
            ours[key] == theirs[key] for key in {*theirs} - {"dtype", "transformers_version"}
        )
    ours, theirs = load_tokenizer(back), load_tokenizer(TINY)
    assert len(ours) == len(theirs) == ROWS and ours.padding_side == theirs.padding_side
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
    question = (PICTURES[0], QUESTIONS[0])
    models = [load_pretrained_model(str(folder), device="cpu") for folder in (back, TINY)]
    (ids, pixels), (their_ids, _) = (_native_inputs(loaded, *question) for loaded in models)
    assert ids == their_ids
    with torch.no_grad():
        logits = [loaded[1](torch.tensor([ids]), images=pixels).logits for loaded in models]
    assert torch.equal(*logits)


def _save_native(model: LlavaCausalLM, folder: Path, **settings: object) -> Path:
    """Save a random model with llava-tiny's tokenizer."""
    for name, value in settings.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


@pytest.fixture
def native_next(small_next: Callable, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Folder of a random LLaVA-1.6 whose canvases tell width from height."""
    canvases = [[84, 28], [28, 56], [56, 56]]
    model = small_next(vocab_size=ROWS, image_grid_pinpoints=canvases)
    model.config.unfreeze_mm_vision_tower = True
    if request.param == "mistral":
        llama = ("attention_bias", "mlp_bias", "pretraining_tp", "model_type")
        settings = {k: v for k, v in model.config.to_dict().items() if k not in llama}
        config = LlavaMistralConfig(**settings, sliding_window=None)
        other = LlavaMistralForCausalLM(config).eval()
        other.get_vision_tower().load_model()
        other.load_state_dict(model.state_dict())
        model = other
    modes = {"mistral": "mistral_instruct", "llama": "vicuna_v1"}
    return _save_native(model, tmp_path / "next", mm_conv_mode=modes[request.param])


@pytest.mark.parametrize("native_next", ["llama", "mistral"], indirect=True)
def test_next_gives_the_same_answers(native_next: Path, tmp_path: Path, record_error) -> None:
    folder = convert(native_next, tmp_path / "hf")
    config = _config(folder)
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert config["image_grid_pinpoints"] == [[28, 84], [56, 28], [56, 56]], "height comes first"
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "LlavaNextProcessor"
    loaded = load_pretrained_model(str(native_next), device="cpu")
    pictures = tuple(_scene(4, (0, 0, *size)) for size in ((118, 31), (26, 70), (64, 48)))
    _assert_same_answers(folder, loaded, pictures, record_error)
    back = convert(folder, tmp_path / "back")
    weights = load_file(native_next / "model.safetensors")
    _assert_equal_weights(_tensors(back), weights)
    ours, theirs = _config(back), _config(native_next)
    # The tower's weights are inside, so its description is too, and no folder elsewhere is named.
    assert ours.pop("mm_vision_tower") == "vision_tower" != theirs.pop("mm_vision_tower")
    assert ours == theirs


def test_the_tower_comes_from_its_own_folder(small_model: Callable, tmp_path: Path) -> None:
    """Released LLaVA-1.5 checkpoints have shards of `.bin` files, and no weights of the tower."""
    model = small_model(vocab_size=ROWS, image_aspect_ratio="pad", mm_conv_mode="vicuna_v1")
    native = _save_native(model, tmp_path / "native")
    weights = load_file(native / "model.safetensors")
    assert not any("vision_tower" in name for name in weights)
    (native / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for shard, inside in shards.items():
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        torch.save({name: weights[name].half() for name in inside} | extra, native / shard)
    index = {name: shard for shard, inside in shards.items() for name in inside}
    (native / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    _edit(dtype="float16")(native)
    tower = {name: value.clone() for name, value in model.get_vision_tower().state_dict().items()}

    folder = convert(native, tmp_path / "hf")
    written = _tensors(folder)
    assert not any(DERIVED_KEY.search(name) for name in written)
    for name, value in tower.items():
        copy = written["vision_tower.vision_model." + name.removeprefix("vision_tower.")]
        assert copy.dtype == torch.float32 and torch.equal(copy, value), "as precise as it was"
    projector = written["multi_modal_projector.linear_2.weight"]
    assert torch.equal(projector, weights["model.mm_projector.2.weight"].half())
    theirs, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert {value.dtype for value in theirs.state_dict().values()} == {torch.float16}


def test_siglip_and_square_pictures(small_model: Callable, small_siglip, tmp_path: Path) -> None:
    small_siglip(tmp_path / "siglip")
    model = small_model(
        vocab_size=ROWS, mm_vision_tower=str(tmp_path / "siglip"), mm_conv_mode="vicuna_v1"
    )
    native = _save_native(model, tmp_path / "native", mm_token_pruning=None)
    folder = convert(native, tmp_path / "hf")
    loaded = load_pretrained_model(str(native), device="cpu")
    _assert_same_answers(folder, loaded, PICTURES, lambda *_: None)
    assert _config(folder)["vision_feature_select_strategy"] == "full"


def test_settings_without_a_word_of_theirs_are_kept(small_model: Callable, tmp_path: Path) -> None:
    pruning = {"method": "zoo", "keep_tokens": 3}
    model = small_model(vocab_size=ROWS, mm_vision_select_feature="cls_patch")
    native = _save_native(
        model,
        tmp_path / "native",
        mm_token_pruning=pruning,
        tokenizer_model_max_length=77,
        image_aspect_ratio="square",
        mm_conv_mode="llava_llama_2",
    )
    folder = convert(native, tmp_path / "hf")
    config, back = _config(folder), _config(convert(folder, tmp_path / "back"))
    assert config["mm_token_pruning"] == back["mm_token_pruning"] == pruning
    assert back["tokenizer_model_max_length"] == 77 and back["image_aspect_ratio"] == "square"
    assert back["mm_conv_mode"] == "llava_llama_2"
    assert (config["vision_feature_select_strategy"], config["image_seq_length"]) == ("full", 5)
    assert back["mm_vision_select_feature"] == "cls_patch" and "mm_vocab_size" not in back
    processor = AutoProcessor.from_pretrained(folder)
    inputs = _their_inputs(processor, PICTURES[1], "Why?")
    loaded = load_pretrained_model(str(native), device="cpu")
    assert torch.equal(inputs["pixel_values"], _native_inputs(loaded, PICTURES[1], "Why?")[1])
    assert (inputs["input_ids"] == config["image_token_index"]).sum() == 5


def test_their_own_checkpoints_keep_all_rows(hf_llava_tiny: Path, tmp_path: Path) -> None:
    """llava-hf's models have the mark among their tokens, and more rows than tokens."""
    released = tmp_path / "llava-1.5-7b-hf"
    shutil.copytree(hf_llava_tiny, released)
    config = json.loads((released / "config.json").read_text())
    for name in ("mm_vocab_size", "mm_conv_mode", "image_aspect_ratio", "tokenizer_padding_side"):
        del config[name]
    weights = load_file(released / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(3, weights[name].shape[1]).half()])
    config["text_config"]["vocab_size"] = ROWS + 4
    (released / "config.json").write_text(json.dumps(config))
    save_file(weights, released / "model.safetensors", metadata={"format": "pt"})
    native = convert(released, tmp_path / "native")
    assert _config(native)["mm_conv_mode"] == "llava_v1"
    assert _config(native)["vocab_size"] == ROWS + 4
    again = convert(native, tmp_path / "again")
    _assert_equal_weights(_tensors(again), weights)
    assert _config(again)["image_token_index"] == ROWS and "mm_vocab_size" not in _config(again)


CHATS = sorted(
    {
        id(template): name
        for name, template in conv_templates.items()
        if template.sep_style is not SeparatorStyle.PLAIN
    }.values()
)


@pytest.mark.parametrize("name", CHATS)
def test_chat_templates_render_what_conversations_do(name: str, hf_llava_tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hf_llava_tiny)

    def rendered(messages: list[dict], open_turn: bool) -> str:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=as_jinja(conv_templates[name]),
            tokenize=False,
            add_generation_prompt=open_turn,
        )

    turns = ["<image>\nWhat\nis 'it'?", 'A "ball".', "Where?", "There.", "Why?"]
    for count in (1, 2, 3, 5):
        chat = conv_templates[name].copy()
        messages = []
        for index, text in enumerate(turns[:count]):
            chat.append_message(chat.roles[index % 2], text)
            messages.append({"role": ("user", "assistant")[index % 2], "content": text})
        if count % 2:
            chat.append_message(chat.roles[1], None)
        assert rendered(messages, count % 2 == 1) == chat.get_prompt()
        parts = [{"type": "text", "text": turns[0].removeprefix("<image>\n")}, {"type": "image"}]
        messages[0] = {"role": "user", "content": parts}
        assert rendered(messages, count % 2 == 1) == chat.get_prompt()
    chat = conv_templates[name].copy()
    chat.system = "Be brief."
    chat.append_message(chat.roles[0], "Hi")
    chat.append_message(chat.roles[1], None)
    given = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert rendered(given, True) == chat.get_prompt()


def test_weights_are_divided_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "plan_shards", lambda w: plan_shards(w, 500_000))
    folder = convert("llava-tiny", tmp_path / "hf")
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 5 and max(file.stat().st_size for file in files) < 520_000
    back = convert(folder, tmp_path / "back")
    _assert_equal_weights(_tensors(back), _tensors(TINY))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in _tensors(back).values())
    LlavaForConditionalGeneration.from_pretrained(folder)


def test_a_stopped_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "plan_shards", lambda w: plan_shards(w, 500_000))
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    settings = ToHuggingFace.write_settings

    def stop(self: ToHuggingFace, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ToHuggingFace, "write_settings", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    partial = tmp_path / ".hf.partial"
    shards = sorted(partial.glob("*.safetensors"))
    shards[1].unlink()  # as if it had been stopped before this one
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    monkeypatch.setattr(ToHuggingFace, "write_settings", settings)
    folder = convert(source, tmp_path / "hf")
    assert kept == {name: (folder / name).stat().st_mtime_ns for name in kept}
    assert not partial.exists() and not (folder / "plan.json").exists()
    assert not any(file.name.startswith(".") for file in folder.iterdir())
    _assert_equal_weights(_tensors(convert(folder, tmp_path / "back")), _tensors(TINY))


def test_another_source_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "plan.json").write_text("{}")
    (tmp_path / ".hf.partial" / "model.safetensors").write_bytes(b"of another model")
    folder = convert(source, tmp_path / "hf")
    assert len(_tensors(folder)) == len(_tensors(TINY))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mode", ["vicuna_v1", "llava_llama_2", "mpt"])
def test_prompts_of_several_turns_and_images(legacy: bool, mode: str, tmp_path: Path) -> None:
    """Tokenizers of Llama come in two kinds, which differ in what follows a special token."""
    source = tmp_path / "source"
    shutil.copytree(TINY, source)
    _edit(mm_conv_mode=mode)(source)
    _edit("tokenizer_config.json", legacy=legacy)(source)
    folder = convert(source, tmp_path / "hf")
    gap = {False: "<image> ", True: "<image>"}[legacy]
    assert json.dumps(gap) + " +" in (folder / "chat_template.jinja").read_text()
    chat = conv_templates[mode].copy()
    said = ["<image>\n<image>\nWhich is red?", "The 2nd one.", "And blue?"]
    for index, text in enumerate([*said, None]):
        chat.append_message(chat.roles[index % 2], text)
    text = {"type": "text", "text": "Which is red?"}
    first = [{"type": "image", "image": picture} for picture in PICTURES[:2]] + [text]
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": [{"type": "text", "text": said[1]}]},
        {"role": "user", "content": [{"type": "text", "text": said[2]}]},
    ]
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    mark, patches = processor.image_token_id, 576
    wanted = []
    for token in tokenizer_image_token(chat.get_prompt(), load_tokenizer(source)):
        wanted += [mark] * patches if token == IMAGE_TOKEN_INDEX else [token]
    assert ids == wanted and len(inputs["pixel_values"]) == 2


def _edit(file: str = "config.json", **changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        settings = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(settings))

    return edit


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "marks": (_edit(mm_use_im_start_end=True), "marks around images"),
    "protocol": (
        _edit(image_aspect_ratio="anyres", mm_next_protocol="spatial"),
        "mm_next_protocol is 'spatial'",
    ),
    "flat tiles": (_edit(image_aspect_ratio="anyres"), "mm_patch_merge_type is 'flat'"),
    "captions": (_edit(mm_conv_mode="plain"), "template for captions"),
    "packed": (_edit(quantization_config={"load_in_4bit": True}), "quantized weights"),
    "no tower": (_edit(mm_vision_tower=None), "vision tower"),
    "sizes": (_edit(num_hidden_layers=3), "unexpected weights"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "no tokenizer"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "model_base"),
    "damaged": (lambda f: (f / "model.safetensors").write_bytes(b"x"), "is damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_converted_is_one_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act, message = FAULTS[fault]
    shutil.copytree(TINY, tmp_path / "source")
    act(tmp_path / "source")
    with pytest.raises(SystemExit) as end:
        main(["convert", str(tmp_path / "source"), str(tmp_path / "out")])
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("llava convert: error: ")
    assert message in line and ";" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"], "nothing was begun"


def test_projectors_they_do_not_have(small_model: Callable, tmp_path: Path) -> None:
    model = small_model(vocab_size=ROWS, mm_projector_type="linear")
    native = _save_native(model, tmp_path / "native")
    with pytest.raises(UserInputError, match="projector is of type 'linear'"):
        convert(native, tmp_path / "hf")


def test_a_size_that_is_none(hf_llava_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(hf_llava_tiny, tmp_path / "hf")
    _edit(mm_vocab_size=9999)(tmp_path / "hf")
    with pytest.raises(UserInputError, match=r"mm_vocab_size .* is 9999; give"):
        convert(tmp_path / "hf", tmp_path / "native")


def test_outputs_and_forms(
    hf_llava_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(UserInputError, match="exists already; give a new folder"):
        convert("llava-tiny", tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "mine"
    for source, form in (("llava-tiny", "native"), (hf_llava_tiny, "hf")):
        with pytest.raises(UserInputError, match="already; use it as it is"):
            convert(source, tmp_path / "new", to=form)
    with pytest.raises(UserInputError, match="unknown form 'gguf'; use 'hf' or 'native'"):
        convert("llava-tiny", tmp_path / "new", to="gguf")
    (tmp_path / "empty").mkdir()
    assert main(["convert", "llava-tiny", str(tmp_path / "empty"), "--to", "hf"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "empty")
    assert (tmp_path / "empty" / "chat_template.jinja").is_file()
