"""One resolver says what the name of a model, a tower or a file may be."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.command_line import OneLineParser
from llava.mm_utils import get_model_name_from_path
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import checkpoint_here, local_checkpoint
from llava.model.multimodal_encoder.builder import is_portable, resolve_vision_tower
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.pruning import PruningConfig
from llava.utils import UserInputError, user_path

NAME = "somebody/llava-v1.5-small"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture
def saved(home: Path, small_model: Callable, small_tower: Callable) -> Path:
    """A checkpoint below the home folder that was saved with pruning, its tower inside."""
    model = small_model()
    model.pruning = PruningConfig("grid", keep_tokens=2)
    model.save_pretrained(home / "llava-v1.5-small")
    return home / "llava-v1.5-small"


def _places(saved: Path) -> dict[str, str | Path]:
    return {
        "folder": str(saved),
        "path object": saved,
        "slash": f"{saved}/",
        "home": "~/llava-v1.5-small",
        "home slash": "~/llava-v1.5-small/",
        "home object": Path("~/llava-v1.5-small"),
        "relative": "llava-v1.5-small",
        "dotted": "./llava-v1.5-small",
        "up": "../home/llava-v1.5-small",
        "hub": NAME,
        "hub slash": f"{NAME}/",
        "hub object": Path(NAME),
    }


def test_every_spelling_is_the_same_model(saved, home, hub, monkeypatch, pixels) -> None:
    hub(saved, NAME)
    monkeypatch.chdir(home)
    ids, images = torch.tensor([[1, -200, 5]]), pixels(1, side=28)
    wanted = None
    for kind, place in _places(saved).items():
        found = local_checkpoint(place)
        assert sorted(f.name for f in found.iterdir()) == sorted(f.name for f in saved.iterdir())
        assert checkpoint_here(place) == found
        assert get_model_name_from_path(place) == get_model_name_from_path(found) == saved.name
        model = load_pretrained_model(place, None, "llava", device="cpu")[1]
        assert model.pruning == PruningConfig("grid", keep_tokens=2), kind
        logits = model(ids, images=images).logits
        wanted = logits if wanted is None else wanted
        assert torch.equal(logits, wanted), kind
        again = LlavaLlamaForCausalLM.from_pretrained(place)
        assert again.config.hidden_size == model.config.hidden_size


def test_a_revision_is_a_folder_of_its_own(saved, hub, tmp_path) -> None:
    hub(saved, NAME)
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    (other / "config.json").write_text("{}")
    hub(other, NAME, revision="v2", commit="b" * 40)
    assert local_checkpoint(NAME).name == "a" * 40
    assert local_checkpoint(NAME, "v2").name == local_checkpoint(f"{NAME}/", "v2").name == "b" * 40
    model = load_pretrained_model(NAME, device="cpu", revision="main")[1]
    assert model.pruning == PruningConfig("grid", keep_tokens=2)


def test_a_base_model_too(saved, home, hub, small_model) -> None:
    hub(saved, NAME)
    part = home / "projector"
    part.mkdir()
    shutil.copy(saved / "config.json", part)
    state = small_model().get_model().mm_projector.state_dict()
    state = {f"model.mm_projector.{key}": value + 1 for key, value in state.items()}
    torch.save(state, part / "mm_projector.bin")
    for base in (str(saved), saved, "~/llava-v1.5-small", NAME):
        model = load_pretrained_model("~/projector", base, device="cpu")[1]
        for key, value in model.get_model().mm_projector.state_dict().items():
            assert torch.equal(value, state[f"model.mm_projector.{key}"])


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "/no/such/folder",
            "model" * 100,
            "~/no-such-folder",
            "~nobody-here/model",
            "./missing",
            "../missing",
        ),
        *("missing", "a/b/c", "some/model", "some/model/", "so me/mod el", "./", "~"),
    ],
)
def test_what_is_not_there_is_one_line(name, hub, home) -> None:
    """The hub does not know `some/model`; the others cannot be names on the hub."""
    if name in ("./", "~"):  # folders, but without a model
        with pytest.raises(UserInputError, match=r"has no config"):
            load_pretrained_model(name, device="cpu")
        return
    with pytest.raises(UserInputError) as error:
        load_pretrained_model(name, device="cpu")
    assert repr(name.rstrip("/") if name == "some/model/" else name) in str(error.value)
    assert "folder" in str(error.value)


def test_what_is_here_is_found_without_a_download(saved, hub, tmp_path) -> None:
    assert checkpoint_here(NAME) is None
    config = tmp_path / "config only"
    config.mkdir()
    shutil.copy(saved / "config.json", config)
    hub(config, "somebody/config-only")
    assert checkpoint_here("somebody/config-only") is None
    hub(saved, NAME)
    assert checkpoint_here(NAME) == local_checkpoint(NAME)
    with pytest.raises(UserInputError, match="is not a checkpoint folder"):
        checkpoint_here("/no/such/folder")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/cache/models--org--llava-v1.5-7b/snapshots/0123abc", "llava-v1.5-7b"),
        ("/cache/models--org--llava-v1.5-7b/snapshots/0123abc/", "llava-v1.5-7b"),
        ("/cache/models--llava/snapshots/0123abc", "llava"),
        ("/runs/llava-v1.5/checkpoint-20", "llava-v1.5_checkpoint-20"),
        (Path("/runs/llava-v1.5"), "llava-v1.5"),
        ("/snapshots/llava", "llava"),
    ],
)
def test_names_of_models(path, name) -> None:
    assert get_model_name_from_path(path) == name


def test_a_dot_is_called_as_its_folder(home, monkeypatch) -> None:
    monkeypatch.chdir(home)
    assert get_model_name_from_path(".") == get_model_name_from_path("./") == "home"
    (home / "inside").mkdir()
    monkeypatch.chdir(home / "inside")
    assert get_model_name_from_path("..") == "home"


def test_towers_and_projectors_below_the_home_folder(home, small_tower, small_model) -> None:
    small_tower(home / "tower")
    assert resolve_vision_tower("~/tower", None) == str(home / "tower")
    assert resolve_vision_tower("~/tower/", str(home)) == str(home / "tower")
    assert resolve_vision_tower("openai/clip/", str(home)) == "openai/clip"
    settings = SimpleNamespace(mm_vision_select_layer=-2)
    tower = CLIPVisionTower("~/tower", settings)
    assert tower.is_loaded and is_portable(tower)
    model = small_model()
    torch.save(
        {
            f"model.mm_projector.{key}": value * 0
            for key, value in model.get_model().mm_projector.state_dict().items()
        },
        home / "mm_projector.bin",
    )
    arguments = SimpleNamespace(
        vision_tower="~/tower",
        pretrain_mm_mlp_adapter="~/mm_projector.bin",
        mm_projector_type=model.config.mm_projector_type,
    )
    model.get_model().initialize_vision_modules(arguments)
    assert not any(value.any() for value in model.get_model().mm_projector.parameters())
    arguments.pretrain_mm_mlp_adapter = "~/missing.bin"
    with pytest.raises(UserInputError, match=r"no projector file .*/home/missing\.bin"):
        model.get_model().initialize_vision_modules(arguments)


def test_flags_that_name_paths_know_the_home_folder(home) -> None:
    parser = OneLineParser()
    command = parser.add_subparsers().add_parser("command")
    command.add_argument("--output", type=Path, default=Path("x"))
    command.add_argument("--words", nargs="+", type=Path)
    flags = ["command", "--output=~/out", "--words", "~/a", "b", "~nobody-here/c", "d~/e"]
    parsed = parser.parse_args(flags)
    assert parsed.output == home / "out"
    assert parsed.words == [home / "a", Path("b"), Path("~nobody-here/c"), Path("d~/e")]
    assert parser.parse_args(["command"]).output == Path("x")
    assert user_path("~") == home
