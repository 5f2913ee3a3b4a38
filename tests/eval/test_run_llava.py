"""One question from a script: LLaVA's arguments, its prompts, and pruning beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_llava import draw_picture
from transformers import GenerationConfig

from llava.constants import IMAGE_PLACEHOLDER
from llava.eval import run_llava
from llava.eval.run_llava import ask, build_parser, eval_model, image_parser, load_images
from llava.families.dialogue import Dialogue
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.loaded import LoadedModel
from llava.model.prompting import render
from llava.pruning import prune
from llava.utils import UserInputError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [str(folder / f"{seed}.png") for seed in (0, 1)]
    for seed, path in enumerate(paths):
        draw_picture(seed).save(path)
    return paths


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, ...]:
    return load_pretrained_model(str(checkpoint), device="cpu")


@pytest.fixture
def cached(loaded: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Let the command use the loaded model; returns the calls of its loader."""
    calls: list[tuple[Any, Any]] = []
    loaded[1].pruning = None

    def load(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        calls.append((args, kwargs))
        return loaded

    monkeypatch.setattr("llava.families.spec.load_pretrained_model", load)
    return calls


def arguments(checkpoint: Path, image_file: str, **others: Any) -> Any:
    """An object as LLaVA's own example makes it: attributes of a nameless class."""
    fields = {
        "model_path": str(checkpoint),
        "model_base": None,
        "model_name": "llava-random",
        "query": "What colour is the circle?",
        "conv_mode": None,
        "image_file": image_file,
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 6,
    }
    return type("Args", (), fields | others)()


def by_hand(loaded: tuple[Any, ...], prompt: str, files: list[str], **settings: Any) -> str:
    tokenizer, model, processor, _ = loaded
    pixels = process_images([Image.open(file) for file in files], processor, model.config)
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    settings = {"do_sample": False, "max_new_tokens": 6, **settings}
    new = model.generate(inputs=ids, images=pixels, **settings)
    return tokenizer.decode(new[0], skip_special_tokens=True).strip()


def test_flags_and_defaults_are_those_of_llava() -> None:
    required = ["--model-path", "m", "--image-file", "a", "--query", "q"]
    given = vars(build_parser().parse_args(required))
    assert {
        "model_base": None,
        "conv_mode": None,
        "sep": ",",
        "temperature": 0.2,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 512,
    }.items() <= given.items()
    spelled = ["--model-base", "b", "--conv-mode", "v1", "--sep", ";", "--temperature", "0"]
    spelled += ["--top_p", "0.9", "--num_beams", "2", "--max_new_tokens", "3"]
    assert vars(build_parser().parse_args(required + spelled))["max_new_tokens"] == 3


def test_the_answer_of_an_upstream_script(
    checkpoint: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_pretrained_model(str(checkpoint), device="cpu")
    answer = eval_model(arguments(checkpoint, pictures[0]))
    prompt = f"{SYSTEM} USER: <image>\nWhat colour is the circle? ASSISTANT:"
    assert answer == by_hand(loaded, prompt, pictures[:1]) != ""
    assert capsys.readouterr().out.strip() == answer


def test_the_command_prunes_between_layers(
    checkpoint: Path,
    pictures: list[str],
    loaded: tuple[Any, ...],
    cached: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model-path", str(checkpoint), "--image-file", pictures[0], "--query", "What?"]
    flags += ["--temperature", "0", "--max_new_tokens", "6", "--device", "cpu"]
    flags += ["--pruner", "grid", "--keep-tokens", "196", "--scope", "prompt"]
    flags += ["--decoder-pruner", "fastv", "--decoder-keep-ratio", "0.2", "--decoder-option", "k=1"]
    assert run_llava.main(flags) == 0
    model = loaded[1]
    assert model.pruning.to_dict() == {
        "method": "grid",
        "keep_tokens": 196,
        "decoder": {"method": "fastv", "keep_ratio": 0.2, "options": {"k": 1}},
        "scope": "prompt",
    }
    prompt = f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:"
    with prune(model, model.pruning) as run:
        expected = by_hand(loaded, prompt, pictures[:1])
    assert run.decoder_trace is not None and run.decoder_trace.per_layer == [[196, 34]]
    assert capsys.readouterr().out.strip() == expected


def test_the_command_prunes(
    checkpoint: Path,
    pictures: list[str],
    loaded: tuple[Any, ...],
    cached: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--model-path", str(checkpoint), "--image-file", pictures[0], "--query", "What?"]
    flags += ["--temperature", "0", "--max_new_tokens", "6", "--load-8bit", "--device", "cpu"]
    flags += ["--pruner", "zoo", "--keep-tokens", "16", "--pruner-option", "directions=8"]
    assert run_llava.main(flags) == 0
    given = {"device": "cpu", "load_8bit": True, "load_4bit": False}
    assert cached == [((str(checkpoint), None, checkpoint.name), given)]
    model = loaded[1]
    assert model.pruning.to_dict() == {
        "method": "zoo",
        "keep_tokens": 16,
        "options": {"directions": 8},
    }
    prompt = f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:"
    with prune(model, "zoo", keep_tokens=16, directions=8):
        expected = by_hand(loaded, prompt, pictures[:1])
    assert capsys.readouterr().out.strip() == expected


def test_several_images(
    checkpoint: Path, pictures: list[str], loaded: tuple[Any, ...], cached: list[Any]
) -> None:
    answer = eval_model(arguments(checkpoint, ";".join(pictures), sep=";", query="Equal?"))
    prompt = f"{SYSTEM} USER: <image>\n<image>\nEqual? ASSISTANT:"
    assert answer == by_hand(loaded, prompt, pictures)
    assert answer != by_hand(loaded, prompt, pictures[::-1]), "the order of files counts"


def test_generation_config_decides_beside_the_flags(
    checkpoint: Path,
    pictures: list[str],
    loaded: tuple[Any, ...],
    cached: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, model, *_ = loaded
    before = eval_model(arguments(checkpoint, pictures[0]))
    config = GenerationConfig(
        **{"eos_token_id": 2, "suppress_tokens": list(range(3, 259))},  # the bytes
        **{"return_dict_in_generate": True, "stop_strings": ["q"], "do_sample": True},
    )
    monkeypatch.setattr(model, "generation_config", config)
    prompt = render(ask("What colour is the circle?", 1), "vicuna_v1")
    settings = {"tokenizer": tokenizer, "return_dict_in_generate": False}
    said = eval_model(arguments(checkpoint, pictures[0]))
    assert said == by_hand(loaded, prompt, pictures[:1], **settings) != before
    config.num_return_sequences = 2
    with pytest.raises(UserInputError, match="generation_config sets num_return_sequences to 2"):
        eval_model(arguments(checkpoint, pictures[0]))


def test_decoding_settings_reach_the_model(
    checkpoint: Path,
    pictures: list[str],
    loaded: tuple[Any, ...],
    cached: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def generate(**kwargs: Any) -> torch.Tensor:
        seen.append(kwargs)
        return torch.ones(1, 1, dtype=torch.long)

    monkeypatch.setattr(loaded[1], "generate", generate, raising=False)
    eval_model(arguments(checkpoint, pictures[0], temperature=0.7, top_p=0.9, num_beams=3))
    eval_model(arguments(checkpoint, pictures[0], temperature=0, top_p=0.9))
    wanted = ("do_sample", "temperature", "top_p", "num_beams", "max_new_tokens")
    assert [tuple(call[name] for name in wanted) for call in seen] == [
        (True, 0.7, 0.9, 3, 6),
        (False, None, None, 1, 6),
    ]
    assert seen[0]["image_sizes"] == [(336, 336)]


def test_flags_set_every_choice(
    checkpoint: Path, pictures: list[str], loaded: tuple[Any, ...], cached: list[Any]
) -> None:
    flags = ["--model-path", str(checkpoint), "--image-file", pictures[0], "--query", "What?"]
    flags += ["--pruner", "zoo", "--keep-tokens", "64", "--max_new_tokens", "1"]
    flags += ["--allocation", "global", "--newline", "keep", "--positions", "original"]
    assert run_llava.main(flags) == 0 and cached
    choices = {"allocation": "global", "newline": "keep", "positions": "original"}
    assert loaded[1].pruning.to_dict() == {"method": "zoo", "keep_tokens": 64} | choices
    assert loaded[1].pruning.choices == choices


def test_missing_attributes_have_the_defaults_of_the_flags(
    checkpoint: Path, pictures: list[str], cached: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"model_path": str(checkpoint), "query": "What?", "image_file": pictures[0]}
    assert isinstance(eval_model(type("Args", (), fields | {"max_new_tokens": 1})()), str)
    ((args, kwargs),) = cached
    assert args == (str(checkpoint), None, checkpoint.name)
    assert kwargs == {"device": "auto", "load_8bit": False, "load_4bit": False}
    with pytest.raises(UserInputError, match=r"args\.query"):
        eval_model(type("Args", (), {"model_path": "m", "image_file": "a"})())


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("LLaVA-v1.6-Mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-llama-2-13b", "llava_llama_2"),
        ("llava-mpt-7b", "mpt"),
        ("something", "llava_v0"),
    ],
)
def test_the_name_chooses_the_template(
    checkpoint: Path,
    pictures: list[str],
    loaded: tuple[Any, ...],
    cached: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    mode: str,
) -> None:
    monkeypatch.setattr(loaded[1].config, "mm_conv_mode", None)
    prompts, row = [], LoadedModel.row

    def spy(self: LoadedModel, dialogue: Dialogue) -> torch.Tensor:
        prompts.append(self.template)
        return row(self, dialogue)

    monkeypatch.setattr(LoadedModel, "row", spy)
    eval_model(arguments(checkpoint, pictures[0], model_name=name, max_new_tokens=1))
    assert capsys.readouterr().err == ""
    settings = {"model_name": name, "max_new_tokens": 1, "conv_mode": "vicuna_v1"}
    eval_model(arguments(checkpoint, pictures[0], **settings))
    assert f"--conv-mode vicuna_v1 replaces {mode}" in capsys.readouterr().err
    assert prompts == [mode, "vicuna_v1"]


@pytest.mark.parametrize(
    ("query", "images", "turn"),
    [
        ("What?", 1, "<image>\nWhat?"),
        ("What?", 2, "<image>\n<image>\nWhat?"),
        (f"Is {IMAGE_PLACEHOLDER} red?", 1, "Is <image> red?"),
        (f"{IMAGE_PLACEHOLDER}\nWhat?", 1, "<image>\nWhat?"),
        (f"{IMAGE_PLACEHOLDER} or {IMAGE_PLACEHOLDER}?", 2, "<image> or <image>?"),
        ("<image>\nWhat?", 1, "<image>\nWhat?"),
    ],
)
def test_where_images_stand_in_the_query(query: str, images: int, turn: str) -> None:
    prompt = render(ask(query, images), "vicuna_v1")
    assert prompt == f"{SYSTEM} USER: {turn} ASSISTANT:"


def test_marks_of_models_with_start_and_end_tokens() -> None:
    config = SimpleNamespace(mm_use_im_start_end=True)
    mark = "<im_start><image><im_end>\n"
    assert f"USER: {mark}What? A" in render(ask("What?", 1), "vicuna_v1", config)
    middle = render(ask(f"Is {IMAGE_PLACEHOLDER} red?", 1), "vicuna_v1", config)
    assert "Is <im_start><image><im_end> red?" in middle


def test_names_that_scripts_import(pictures: list[str]) -> None:
    args = type("Args", (), {"image_file": "a.png,b.png", "sep": ","})()
    assert image_parser(args) == ["a.png", "b.png"]
    assert [image.size for image in load_images(pictures)] == [(336, 336)] * 2
    load: Callable[..., Image.Image] = run_llava.load_image
    assert load(pictures[0]).mode == "RGB"


@pytest.mark.parametrize(
    ("limits", "pruning", "fits"),
    [
        ({"tokenizer_model_max_length": 660}, {}, False),
        ({"tokenizer_model_max_length": 760}, {}, True),
        ({"max_position_embeddings": 660, "tokenizer_model_max_length": None}, {}, True),
        ({"tokenizer_model_max_length": 200}, {"pruner": "grid", "keep_tokens": 64}, True),
        ({"tokenizer_model_max_length": 100}, {"pruner": "grid", "keep_tokens": 64}, False),
    ],
)
def test_a_query_that_does_not_fit_is_refused_before_it_is_cut(
    checkpoint: Path,
    pictures: list[str],
    cached: list[Any],
    loaded: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    limits: dict[str, Any],
    pruning: dict[str, Any],
    fits: bool,
) -> None:
    """Its end would be lost, and with it the question; pruned images may give way to it."""
    model = loaded[1]
    for name, value in limits.items():
        monkeypatch.setattr(model.config, name, value, raising=False)
    args = arguments(checkpoint, pictures[0], query="What colour is the circle? " * 3, **pruning)
    if fits:
        assert eval_model(args) is not None
        assert "cut off" not in caplog.text
        return
    monkeypatch.setattr(type(model), "encode_images", lambda *_: pytest.fail("computed"))
    flags = ["--model-path", str(checkpoint), "--image-file", pictures[0], "--query", args.query]
    flags += [f"--{name.replace('_', '-')}={value}" for name, value in pruning.items()]
    with pytest.raises(SystemExit) as stop:
        run_llava.main(flags)
    assert stop.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert re.search(r"the query does not fit: \d+ tokens of text \+ \d+ visual tokens", error)
    assert f"is {next(iter(limits.values()))}" in error and "--keep-tokens" in error
