"""What a run saves: it loads, gives the same logits, and another run goes on from it exactly."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saving_runs import KINDS, logits, losses, make_base, make_model, make_trainer
from transformers import LlavaForConditionalGeneration

from llava.model.builder import load_pretrained_model
from llava.model.convert.conversion import convert
from llava.train.checkpoints import find_checkpoint
from llava.train.merge_lora import merge_lora
from llava.train.saving import Saver
from llava.utils import UserInputError


@pytest.fixture(scope="module")
def start(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The language model that runs start from."""
    return make_base(tmp_path_factory.mktemp("start"), work / "init")


@pytest.fixture(scope="module")
def trained(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run of every kind: its trainer, whose folder holds what it saved."""
    runs = {}
    for kind in KINDS:
        output = tmp_path_factory.mktemp(kind)
        trainer = make_trainer(make_model(start, kind), start, output)
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        runs[kind] = trainer
    return runs


def _folder(trainer: Any) -> Path:
    return Path(trainer.args.output_dir)


def _files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", ["", "checkpoint-2", "checkpoint-4"])
def test_the_files_are_those_of_llava(kind: str, step: str, trained: dict[str, Any]) -> None:
    folder = _folder(trained[kind]) / step
    common = {"config.json", "tokenizer.model", "tokenizer_config.json", "training_args.bin"}
    common |= {"trainer_state.json"}
    if step:
        common |= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "run.json"}
    own = {
        "whole": {"model.safetensors", "generation_config.json"},
        "projector": {"mm_projector.bin", "mm_projector.safetensors"},
        "lora": {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"},
    }
    assert _files(folder) == common | own[kind]


def test_the_keys_are_those_of_llava(trained: dict[str, Any]) -> None:
    names = [f"{layer}.{part}" for layer in (0, 2) for part in ("bias", "weight")]
    folder = _folder(trained["projector"])
    projector = torch.load(folder / "mm_projector.bin", weights_only=True)
    assert sorted(projector) == [f"model.mm_projector.{name}" for name in names]
    rest = torch.load(_folder(trained["lora"]) / "non_lora_trainables.bin", weights_only=True)
    assert sorted(rest) == [f"base_model.model.model.mm_projector.{name}" for name in names]
    adapter = load_file(_folder(trained["lora"]) / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_the_base_are_kept(kind: str, trained: dict[str, Any], start: Path) -> None:
    config = json.loads((_folder(trained[kind]) / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["mm_token_pruning"]["keep_tokens"] == 9
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["model_type"] == "llava_llama"
    for name in ("tokenizer.model", "tokenizer_config.json"):
        kept = (_folder(trained[kind]) / name).read_bytes()
        assert kept == (start / name).read_bytes()


def _loaded(folder: Path, base: Path | None) -> Any:
    model_base = None if base is None else str(base)
    return load_pretrained_model(str(folder), model_base, device="cpu")[1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_gives_the_logits_of_the_trained_model(
    kind: str, trained: dict[str, Any], start: Path
) -> None:
    trainer = trained[kind]
    model = _loaded(_folder(trainer), None if kind == "whole" else start)
    wanted = logits(trainer.saver.model)
    assert (wanted - logits(make_model(start, kind))).abs().max() > 1e-3
    error = (logits(model) - wanted).abs().max()
    # A merged LoRA rounds once more than one that runs beside its layer.
    assert error == 0 if kind != "lora" else error < 1e-5
    assert model.generation_config.temperature == 0.3


def test_a_merged_lora_is_the_adapter_on_its_base(
    trained: dict[str, Any], start: Path, tmp_path: Path
) -> None:
    folder = merge_lora(_folder(trained["lora"]), start, tmp_path / "merged")
    wanted = logits(trained["lora"].saver.model)
    assert (logits(_loaded(folder, None)) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_converts(
    kind: str, trained: dict[str, Any], start: Path, tmp_path: Path
) -> None:
    """As transformers' own LLaVA it gives the same logits."""
    trainer, folder = trained[kind], _folder(trained[kind])
    if kind != "whole":
        folder = merge_lora(folder, start, tmp_path / "merged")
    theirs = LlavaForConditionalGeneration.from_pretrained(
        convert(folder, tmp_path / "hf"), dtype=torch.float32
    )
    llava = trainer.saver.llava
    pruning, llava.config.mm_token_pruning = llava.config.mm_token_pruning, None
    wanted = logits(trainer.saver.model)
    llava.config.mm_token_pruning = pruning
    image = theirs.config.image_token_id
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(7))
    ids = torch.tensor([[1, *[image] * 16, 9, 11, 5]])
    with torch.no_grad():
        found = theirs.eval()(input_ids=ids, pixel_values=pixels).logits
    assert torch.allclose(found[..., : wanted.shape[-1]], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("whole", {}),
        ("projector", {"gradient_accumulation_steps": 2}),
        ("lora", {"gradient_accumulation_steps": 2}),
        ("lora", {"dataloader_num_workers": 1}),
    ],
    ids=["whole", "projector-accumulation", "lora-accumulation", "lora-workers"],
)
def test_a_run_that_goes_on_is_as_if_never_stopped(
    kind: str, settings: dict[str, Any], start: Path, tmp_path: Path
) -> None:
    whole = make_trainer(make_model(start, kind), start, tmp_path / "a", **settings)
    whole.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    # Another start of what trains shows that the checkpoint's weights count.
    rest = make_trainer(make_model(start, kind, seed=5), start, tmp_path / "b", **settings)
    rest.train(find_checkpoint(tmp_path / "b"))
    assert len(set(losses(whole))) == 4
    assert losses(rest) == losses(whole)
    ours, theirs = (t.saver.model.state_dict() for t in (rest, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_trained_tower_comes_back(start: Path, tmp_path: Path) -> None:
    """Its weights have other names in files than in memory."""
    model = make_model(start, "whole", unfreeze_mm_vision_tower=True)
    tower = model.get_vision_tower().vision_tower
    with torch.no_grad():
        tower.pre_layrnorm.weight.fill_(3.0)
    trainer = make_trainer(model, start, tmp_path, max_steps=2)
    trainer.train()
    other = make_model(start, "whole", unfreeze_mm_vision_tower=True)
    Saver.of(other, start).load(tmp_path / "checkpoint-2")
    assert float(other.get_vision_tower().vision_tower.pre_layrnorm.weight[0]) == 3.0


def test_a_trained_tower_of_a_lora_run_is_saved(start: Path, tmp_path: Path) -> None:
    model = make_model(start, "lora", unfreeze_mm_vision_tower=True)
    norm = model.get_base_model().get_vision_tower().vision_tower.pre_layrnorm.weight
    norm.requires_grad_(True)
    trainer = make_trainer(model, start, tmp_path, max_steps=1, save_strategy="no")
    with torch.no_grad():
        norm.fill_(3.0)
    trainer.save_model()
    loaded = _loaded(tmp_path, start)
    assert float(loaded.get_vision_tower().vision_tower.pre_layrnorm.weight[0]) == 3.0
    rest = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
    inner = "base_model.model.model.vision_tower.vision_tower.vision_model."
    assert f"{inner}pre_layrnorm.weight" in rest


@pytest.mark.parametrize("kind", ["projector", "lora"])
def test_a_grown_vocabulary_and_a_newline_are_saved(kind: str, start: Path, tmp_path: Path) -> None:
    model = make_model(start, kind, mm_use_im_start_end=True, mm_patch_merge_type="spatial_unpad")
    llava = Saver.of(model, start).llava
    if not hasattr(llava.get_model(), "image_newline"):
        llava.get_model().add_newline()
    rows = llava.get_input_embeddings().num_embeddings
    llava.resize_token_embeddings(rows + 2, mean_resizing=False)
    with torch.no_grad():
        llava.get_input_embeddings().weight[rows:] = 2.0
        llava.get_model().image_newline.fill_(3.0)
    make_trainer(model, start, tmp_path).save_model()
    loaded = _loaded(tmp_path, start)
    assert loaded.get_input_embeddings().num_embeddings == rows + 2
    assert bool((loaded.get_input_embeddings().weight[rows:] == 2.0).all())
    assert bool((loaded.get_model().image_newline == 3.0).all())


REFUSED = {
    "lora as whole": ("lora", "whole", {}, "saved by a LoRA run"),
    "projector as lora": ("projector", "lora", {}, "the projector alone"),
    "whole as projector": ("whole", "projector", {}, "saves the whole model"),
    "other rank": ("lora", "lora", {"rank": 8}, "a LoRA with r 4, and this run has 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_of_another_run_is_refused(
    case: str, trained: dict[str, Any], start: Path, tmp_path: Path
) -> None:
    saved, kind, settings, fault = REFUSED[case]
    trainer = make_trainer(make_model(start, kind, **settings), start, tmp_path)
    with pytest.raises(UserInputError, match=fault):
        trainer.train(str(_folder(trained[saved]) / "checkpoint-2"))


@pytest.mark.parametrize("kind", ["projector", "lora"])
def test_a_checkpoint_on_another_base_is_refused(
    kind: str, trained: dict[str, Any], work: Path, start: Path, tmp_path: Path
) -> None:
    """A moved base is the same base."""
    shutil.copytree(start.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / "base"
    checkpoint = str(_folder(trained[kind]) / "checkpoint-2")
    trainer = make_trainer(make_model(moved, kind), moved, tmp_path / "out", max_steps=2)
    trainer.train(checkpoint)
    weights = load_file(moved / "model.safetensors")
    other = make_llava_weights(weights)
    from safetensors.torch import save_file

    save_file(other, moved / "model.safetensors", metadata={"format": "pt"})
    trainer = make_trainer(make_model(moved, kind), moved, tmp_path / "out2")
    with pytest.raises(UserInputError, match="holds other weights"):
        trainer.train(checkpoint)


def make_llava_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in weights.items()}


def test_a_checkpoint_without_optimiser_is_refused(start: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        make_model(start, "projector"), start, tmp_path, max_steps=2, save_only_model=True
    )
    trainer.train()
    with pytest.raises(UserInputError, match="no state of the optimiser"):
        trainer.train(find_checkpoint(tmp_path))


def test_a_run_never_overwrites_its_base(start: Path) -> None:
    with pytest.raises(UserInputError, match="is the model that the run starts from"):
        make_trainer(make_model(start, "lora"), start, start)
