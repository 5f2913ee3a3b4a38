"""Prompts equal LLaVA's byte for byte, and the template of a model is chosen as LLaVA chooses."""

import base64
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import SeparatorStyle, conv_mode_for, conv_templates, default_conversation
from llava.utils import UserInputError

FOLDER = Path(__file__).parent / "goldens" / "llava" / "conversation"
CASE = json.loads((FOLDER / "case.json").read_text())
PROMPTS = json.loads((FOLDER / "prompts.json").read_text())


def _render(template: str, dialog: str) -> str:
    conversation = conv_templates[template].copy()
    for user, assistant in CASE["dialogs"][dialog]:
        message = tuple(user) if isinstance(user, list) else user
        conversation.append_message(conversation.roles[0], message)
        conversation.append_message(conversation.roles[1], assistant)
    return conversation.get_prompt()


@pytest.mark.parametrize("entry", PROMPTS, ids=lambda e: f"{e['template']}-{e['dialog']}")
def test_prompt_equals_the_recorded_one(entry: dict) -> None:
    if "error" in entry:
        assert entry["error"].startswith("TypeError")
        with pytest.raises(TypeError):
            _render(entry["template"], entry["dialog"])
    else:
        assert _render(entry["template"], entry["dialog"]) == entry["prompt"]


def test_every_recorded_template_exists_with_its_properties() -> None:
    assert set(conv_templates) == set(CASE["template_properties"])
    for key, wanted in CASE["template_properties"].items():
        template = conv_templates[key]
        assert template.system == wanted["system"]
        assert list(template.roles) == wanted["roles"]
        assert template.sep_style is SeparatorStyle[wanted["sep_style"]]
        assert (template.sep, template.sep2) == (wanted["sep"], wanted["sep2"])
        assert template.version == wanted["version"]
        assert len(template.messages) == template.offset == wanted["n_preset_messages"]


def test_default_template_is_vicuna_v1() -> None:
    assert default_conversation is conv_templates["vicuna_v1"]


def test_copy_leaves_the_template_alone() -> None:
    conversation = conv_templates["v0"].copy()
    conversation.append_message("Human", "hello")
    conversation.messages[0][1] = "changed"
    assert len(conv_templates["v0"].messages) == 2
    assert conv_templates["v0"].messages[0][1].startswith("What are the key differences")


def test_llama_2_needs_an_opening_user_message() -> None:
    conversation = conv_templates["llava_llama_2"].copy()
    conversation.append_message("USER", None)
    with pytest.raises(UserInputError, match="must open with a message of 'USER'"):
        conversation.get_prompt()


def _with_image(size: tuple[int, int], mode: str) -> "object":
    conversation = conv_templates["vicuna_v1"].copy()
    image = Image.new("RGB", size, (200, 10, 10))
    conversation.append_message("USER", (f"{DEFAULT_IMAGE_TOKEN}\nWhat?", image, mode))
    conversation.append_message("ASSISTANT", None)
    return conversation


@pytest.mark.parametrize(
    ("mode", "size", "wanted"),
    [
        ("Default", (100, 50), (100, 50)),
        ("Crop", (2688, 100), (1344, 50)),
        ("Pad", (100, 50), (100, 100)),
        ("Resize", (100, 50), (336, 336)),
    ],
)
def test_images_of_a_conversation(mode: str, size: tuple, wanted: tuple) -> None:
    conversation = _with_image(size, mode)
    (image,) = conversation.get_images(return_pil=True)
    assert image.size == wanted
    (encoded,) = conversation.get_images()
    assert Image.open(BytesIO(base64.b64decode(encoded))).format == "PNG"


def test_unknown_image_mode_is_refused() -> None:
    with pytest.raises(UserInputError, match="unknown image mode 'Stretch'"):
        _with_image((4, 4), "Stretch").get_images()


def test_chat_pairs_and_plain_data() -> None:
    conversation = _with_image((8, 8), "Default")
    ((user, assistant),) = conversation.to_gradio_chatbot()
    assert user.startswith('<img src="data:image/png;base64,') and user.endswith("What?")
    assert assistant is None
    data = conversation.dict()
    assert data["messages"][0] == ["USER", "<image>\nWhat?"]
    assert json.dumps(data)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("llava-v1.6-vicuna-7b", "llava_v1"),
        ("LLaVA-v1.6-34B", "chatml_direct"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-llama-2-13b-chat", "llava_llama_2"),
        ("llava-mpt-7b", "mpt"),
        ("llava-7b", "llava_v0"),
    ],
)
def test_template_is_chosen_by_name(name: str, mode: str) -> None:
    assert conv_mode_for(name) == mode
    assert conv_mode_for(name, {"mm_conv_mode": None}) == mode


def test_config_overrides_the_name() -> None:
    assert conv_mode_for("llava-v1.5-7b", {"mm_conv_mode": "vicuna_v1"}) == "vicuna_v1"
    with pytest.raises(UserInputError, match="'nonsense' in config"):
        conv_mode_for("llava-v1.5-7b", {"mm_conv_mode": "nonsense"})
