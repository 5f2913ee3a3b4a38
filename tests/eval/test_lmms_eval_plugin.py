"""The model that lmms-eval loads. Needs lmms-eval 0.7; skipped, with this reason, without it."""

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from llava.eval.presets import get_preset
from llava.utils import UserInputError

pytestmark = pytest.mark.skipif(
    find_spec("lmms_eval") is None, reason="needs lmms-eval: bash scripts/test.sh --lmms-eval"
)
MODEL = Path(__file__).parents[2] / "playground/llava-tiny"


@pytest.fixture(scope="module")
def plugin() -> ModuleType:
    torch.set_num_threads(1)
    from llava.eval.plugins import lmms_eval

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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prunner": "zoo"}, "prunner"),
        ({"keep_tokens": 64}, "pruner=METHOD"),
        ({"pruner": "zoo", "preset": "paper", "keep_tokens": 64}, "leave pruner= out"),
        ({"conv_template": "vicuna"}, "vicuna"),
        ({"pruner": "zooo", "keep_tokens": 64}, "zoo"),
    ],
)
def test_wrong_arguments_are_named(plugin: ModuleType, arguments: dict, named: str) -> None:
    with pytest.raises(UserInputError, match=named):
        load(plugin, **arguments)


def test_an_answer_ends_before_the_texts_of_the_task(plugin: ModuleType) -> None:
    model = load(plugin)
    whole = model.generate_until(requests(plugin))[0]
    cut = model.generate_until(requests(plugin, until=[whole[1]]))[0]
    assert cut == whole.split(whole[1])[0]


def test_other_media_are_refused(plugin: ModuleType) -> None:
    model = load(plugin, "LlavaPrunedChat")
    (request, *_) = requests(plugin, chat=True)
    turn = [{"role": "user", "content": [{"type": "video", "url": "clip.mp4"}]}]
    request.arguments = (request.args[0], lambda _: turn, *request.args[2:])
    with pytest.raises(UserInputError, match="video"):
        model.generate_until([request])
