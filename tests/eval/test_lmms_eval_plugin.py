"""The model that lmms-eval loads. Needs lmms-eval 0.7; skipped, with this reason, without it."""

import copy
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.presets import get_preset
from llava.utils import UserInputError

pytestmark = pytest.mark.skipif(
    find_spec("lmms_eval") is None, reason="needs lmms-eval: bash scripts/test.sh --lmms-eval"
)
MODEL = Path(__file__).parents[2] / "playground/llava-tiny"


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    torch.set_num_threads(1)
    from llava.eval import lmms_eval

    return lmms_eval


DOCS = [
    {"image": 0, "question": "Is there a red star?"},
    {"image": 1, "question": "What color is the moon? Say only the color."},
    {"image": None, "question": "Is there a blue ring?"},
    {"image": 0, "question": "Where is the diamond?"},
]


def pictures(doc: dict) -> list[Image.Image]:
    from llava.world import render

    return [] if doc["image"] is None else [render(f"test/{doc['image']:06d}")]


def messages(doc: dict) -> list[dict]:
    content = [{"type": "image", "url": image} for image in pictures(doc)]
    content.append({"type": "text", "text": doc["question"]})
    return [{"role": "user", "content": content}]


def requests(plugin: ModuleType, chat: bool = False, **decoding: object) -> list:
    settings = {"max_new_tokens": 6, "temperature": 0, "num_beams": 1, **decoding}
    found = []
    for doc, content in enumerate(DOCS):
        text = content["question"]
        arguments = (text, settings, pictures, doc, "demo", "test")
        if chat:
            arguments = (text, messages, settings, doc, "demo", "test")
        metadata = {"task": "demo", "doc_id": doc, "repeats": 1}
        found.append(plugin.Instance("generate_until", arguments, 0, metadata))
    return found


def load(plugin: ModuleType, kind: str = "LlavaPruned", **arguments: object):
    given = {"pretrained": str(MODEL), "device": "cpu"} | arguments
    words = ",".join(f"{key}={value}" for key, value in given.items())
    model = getattr(plugin, kind).create_from_arg_string(words, {"batch_size": 3})
    model.task_dict = {"demo": {"test": DOCS}}
    return model


def test_the_manifest_resolves_to_classes_that_lmms_eval_accepts(plugin: ModuleType) -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(plugin.manifests())
    assert registry.get_model_class("llava_pruned") is plugin.LlavaPrunedChat
    assert registry.get_model_class("llava_pruned", force_simple=True) is plugin.LlavaPruned


def test_both_interfaces_answer_in_order_and_alike(plugin: ModuleType) -> None:
    simple = load(plugin).generate_until(requests(plugin))
    chat = load(plugin, "LlavaPrunedChat").generate_until(requests(plugin, chat=True))
    assert simple == chat and len(simple) == len(DOCS)
    assert simple[0] in ("Yes", "No")


def test_a_batch_answers_as_its_rows_do(plugin: ModuleType) -> None:
    model = load(plugin, pruner="grid", keep_tokens=256)
    together = model.generate_until(requests(plugin))
    model.batch_size = 1
    assert model.generate_until(requests(plugin)) == together


def test_arguments_become_the_pruning_setting(plugin: ModuleType) -> None:
    model = load(plugin, pruner="zoo", keep_tokens=64, pruner_fusion="sum", pruner_directions=8)
    setting = model.model.pruning
    assert (setting.method, setting.keep_tokens) == ("zoo", 64)
    assert dict(setting.options) == {"fusion": "sum", "directions": 8}
    model = load(plugin, preset="paper", keep_ratio=0.25)
    assert dict(model.model.pruning.options) == dict(get_preset("paper").options)
    assert model.model.pruning.keep_ratio == 0.25


def test_arguments_become_the_setting_between_layers(plugin: ModuleType) -> None:
    model = load(
        plugin,
        pruner="grid",
        keep_tokens=196,
        decoder_pruner="fastv",
        decoder_keep_tokens=64,
        decoder_pruner_k=1,
    )
    assert model.model.pruning.to_dict() == {
        "method": "grid",
        "keep_tokens": 196,
        "decoder": {"method": "fastv", "keep_tokens": 64, "options": {"k": 1}},
    }
    answers = model.generate_until(requests(plugin))
    assert len(answers) == len(DOCS) and all(answers)
    alone = load(plugin, pruner="fastv", keep_tokens=200).model.pruning
    assert alone.to_dict() == {"method": "none", "decoder": {"method": "fastv", "keep_tokens": 200}}


def test_a_checkpoint_keeps_the_pruning_it_was_saved_with(
    plugin: ModuleType, tmp_path: Path
) -> None:
    for part in MODEL.iterdir():
        if part.name not in ("config.json", "benchmark"):
            (tmp_path / part.name).symlink_to(part)
    config = json.loads((MODEL / "config.json").read_text())
    saved = {"method": "grid", "keep_tokens": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"mm_token_pruning": saved}))
    assert load(plugin, pretrained=tmp_path).model.pruning.method == "grid"
    assert load(plugin, pretrained=tmp_path, pruner="none").model.pruning.method == "none"


def test_a_checkpoint_of_another_family_is_asked_in_its_own_template(
    plugin: ModuleType, tmp_path: Path
) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
    from saved import save_checkpoint

    folder = save_checkpoint("qwen2_5_vl", tmp_path / "qwen")
    whole = load(plugin, pretrained=folder)
    pruned = load(plugin, pretrained=folder, pruner="zoo", keep_ratio=0.2)
    found = [model.generate_until(requests(plugin)) for model in (whole, pruned)]
    assert len(found[0]) == len(DOCS) and found[0] != found[1]
    chat = load(plugin, "LlavaPrunedChat", pretrained=folder)
    assert chat.generate_until(requests(plugin, chat=True)) == found[0]
    with pytest.raises(UserInputError, match="leave --conv-mode out"):
        load(plugin, pretrained=folder, conv_template="vicuna_v1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prunner": "zoo"}, "prunner"),
        ({"keep_tokens": 64}, "pruner=METHOD"),
        ({"decoder_keep_tokens": 64}, "decoder_pruner=METHOD"),
        ({"decoder_pruner": "fastw"}, "fastv"),
        ({"decoder_pruner": "fastv", "decoder_pruner_layer": 3}, "layer"),
        ({"pruner": "zoo", "preset": "paper", "keep_tokens": 64}, "leave pruner= out"),
        ({"conv_template": "vicuna"}, "vicuna"),
        ({"pruner": "zooo", "keep_tokens": 64}, "zoo"),
        ({"dtype": "foo"}, "unknown dtype 'foo'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"attn_implementation": "foo"}, "foo"),
        ({"mm_next_protocol": "foo"}, "foo"),
        ({"customized_config": "other.json"}, "customized_config"),
    ],
)
def test_wrong_arguments_are_named(plugin: ModuleType, arguments: dict, named: str) -> None:
    with pytest.raises(UserInputError, match=named):
        load(plugin, **arguments)


def test_arguments_that_play_no_part_are_taken(plugin: ModuleType) -> None:
    given = {"device_map": "auto", "truncation": True, "tie_weights": True, "model_name": "llava"}
    model = load(plugin, dtype="auto", use_cache=True, truncate_context=False, **given)
    assert model.model.dtype == torch.float32
    for size in ("auto", 0):
        with pytest.raises(UserInputError, match="batch_size must be a whole number"):
            plugin.LlavaPruned.create_from_arg_string(f"pretrained={MODEL}", {"batch_size": size})


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"until": ["\n\n"]},
    {"until": ["e", "o"]},
    {"do_sample": True, "top_p": 0},
    {"num_beams": 3, "max_new_tokens": 20},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_p": 0},
)


@pytest.fixture
def own(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """lmms-eval's own model class, on this package."""
    if find_spec("evaluate") is None:  # which it imports and does not use here
        monkeypatch.setitem(sys.modules, "evaluate", ModuleType("evaluate"))
    from lmms_eval.models.simple.llava import Llava

    model = Llava(pretrained=str(MODEL), device="cpu", device_map="auto", batch_size=1)
    model.task_dict = {"demo": {"test": DOCS}}
    return model


def test_answers_are_those_of_the_model_it_stands_beside(plugin: ModuleType, own) -> None:
    model = load(plugin)
    for settings in SETTINGS:
        torch.manual_seed(0)
        # It changes the settings of a request, so it gets its own.
        expected = [
            own.generate_until([request])[0]
            for request in requests(plugin, **copy.deepcopy(settings))
            for request.arguments in [(request.args[0], dict(request.args[1]), *request.args[2:])]
        ]
        torch.manual_seed(0)
        said = [model.generate_until([request])[0] for request in requests(plugin, **settings)]
        assert said == expected, settings


def test_no_text_of_the_task_ends_an_answer(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is: paragraphs stay, and so does white space at the ends."""
    model = load(plugin)
    said = model.tokenizer("One.\n\nTwo. ").input_ids[1:]

    def generate(**arguments: Any) -> torch.Tensor:
        return torch.tensor([[*said, 2, 0]] * len(arguments["inputs"]))

    monkeypatch.setattr(model.model, "generate", generate)
    for until in (["\n\n"], "Two", None, 3):
        answers = model.generate_until(requests(plugin, until=until))
        assert answers == [model.tokenizer.decode(said)] * len(DOCS)
        assert "\n\nTwo." in answers[0]


def test_settings_of_null_are_the_defaults(plugin: ModuleType) -> None:
    model = load(plugin)
    names = ("temperature", "top_p", "num_beams", "max_new_tokens")
    assert model.generate_until(requests(plugin, **dict.fromkeys(names))) == (
        model.generate_until(requests(plugin, max_new_tokens=1024))
    )


def test_the_generation_config_decides_too(plugin: ModuleType) -> None:
    model = load(plugin)
    before = model.generate_until(requests(plugin))
    model.model.generation_config = GenerationConfig(
        eos_token_id=2, stop_strings=["Y", "b"], return_dict_in_generate=True, num_beams=4
    )
    cut = model.generate_until(requests(plugin))
    assert cut != before and all(
        text.startswith(short) for text, short in zip(before, cut, strict=True)
    )
    model.batch_size = 1
    assert model.generate_until(requests(plugin)) == cut
    model.model.generation_config.guidance_scale = 2.0
    with pytest.raises(UserInputError, match="generation_config sets guidance_scale to 2"):
        model.generate_until(requests(plugin))


def test_pictures_stand_where_the_messages_show_them(
    plugin: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(plugin, "LlavaPrunedChat")
    seen, generate = [], model.model.generate

    def watch(**arguments: Any) -> torch.Tensor:
        seen.append(arguments)
        return generate(**arguments)

    monkeypatch.setattr(model.model, "generate", watch)
    shown = {"type": "image", "url": pictures(DOCS[0])[0]}
    parts = [{"type": "text", "text": "Each row of"}, shown]
    parts += [{"type": "text", "text": "shows one <image>."}]
    talk = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "And"}, shown]},
    ]
    (request, *_) = requests(plugin, chat=True)
    request.arguments = (request.args[0], lambda _: talk, *request.args[2:])
    assert len(model.generate_until([request])) == 1
    (call,) = seen
    ids = call["inputs"][0].tolist()
    pieces, start = [], 0
    for place in [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX] + [len(ids)]:
        pieces.append(model.tokenizer.decode(ids[start:place]))
        start = place + 1
    assert len(pieces) == 3 and len(call["images"]) == 2
    assert pieces[0].rstrip().endswith("USER: Each row of")
    assert pieces[1].lstrip().startswith("shows one <image>. ASSISTANT: Yes")
    assert pieces[1].rstrip().endswith("USER: And")
    assert call["questions"] == ["And"]


@pytest.mark.parametrize("kind", ["LlavaPruned", "LlavaPrunedChat"])
def test_other_media_are_refused(plugin: ModuleType, kind: str) -> None:
    model = load(plugin, kind)
    (request, *_) = requests(plugin, chat=kind != "LlavaPruned")
    picture = pictures(DOCS[0])[0]
    for visual in ("clip.mp4", [picture, picture]):
        if kind == "LlavaPruned":
            request.arguments = (*request.args[:2], lambda _, v=visual: [v], *request.args[3:])
        else:
            turn = [{"role": "user", "content": [{"type": "image", "url": visual}]}]
            request.arguments = (request.args[0], lambda _, t=turn: t, *request.args[2:])
        with pytest.raises(UserInputError, match=r"^task demo shows ('clip\.mp4'|list); "):
            model.generate_until([request])
    turn = [{"role": "user", "content": [{"type": "video", "url": "clip.mp4"}]}]
    if kind != "LlavaPruned":
        request.arguments = (request.args[0], lambda _: turn, *request.args[2:])
        with pytest.raises(UserInputError, match="video"):
            model.generate_until([request])


def test_a_document_without_pictures(plugin: ModuleType) -> None:
    model = load(plugin)
    expected = model.generate_until(requests(plugin)[2:3])
    for nothing in (None, [None]):
        (request,) = requests(plugin)[2:3]
        request.arguments = (*request.args[:2], lambda _, n=nothing: n, *request.args[3:])
        assert model.generate_until([request]) == expected
