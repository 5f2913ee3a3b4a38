"""Which parts of a model train, at which rate, and with which budget."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN
from llava.model.checkpoint import TOWER_PREFIX
from llava.pruning import active
from llava.train import trainer
from llava.train.arguments import Arguments, TrainingArguments, parse_arguments
from llava.train.parts import build_model
from llava.train.skipped import SKIPPED_FILE, write_skipped

LORA = "--lora_enable True --lora_r 2 --lora_alpha 4"


@pytest.fixture
def arguments(work: Path, tmp_path: Path) -> Callable[..., Arguments]:
    """`arguments("--flag value ...")` of a run on the untrained model."""

    def parse(words: str = "", base: str | None = None) -> Arguments:
        return parse_arguments(
            f"""--model_name_or_path {base or work / "init"} --vision_tower {work / "tower"}
            --data_path {work / "data/data.json"} --image_folder {work / "images"}
            --output_dir {tmp_path / "out"} --use_cpu True {words}""".split()
        )

    return parse


def trained(model: torch.nn.Module) -> set[str]:
    """Parts with a parameter that trains."""
    found = set()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            kind = "lora" if "lora_" in name else "bias" if name.endswith("bias") else "weight"
            parts = ("mm_projector", "vision_tower", "embed_tokens")
            part = next((part for part in parts if part in name), "decoder")
            found.add(part if part in ("mm_projector", "embed_tokens") else f"{part} {kind}")
    return found


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", {"mm_projector", "embed_tokens", "decoder weight"}),
        ("--tune_mm_mlp_adapter True", {"mm_projector"}),
        ("--freeze_backbone True", {"mm_projector"}),
        ("--freeze_mm_mlp_adapter True", {"embed_tokens", "decoder weight"}),
        (
            "--unfreeze_mm_vision_tower True",
            {"mm_projector", "embed_tokens", "decoder weight", "vision_tower weight",
             "vision_tower bias"},
        ),
        ("--tune_mm_mlp_adapter True --mm_use_im_start_end True", {"mm_projector", "embed_tokens"}),
        (LORA, {"mm_projector", "decoder lora"}),
        (f"{LORA} --freeze_mm_mlp_adapter True", {"decoder lora"}),
        (f"{LORA} --lora_bias all", {"mm_projector", "decoder lora"}),
        (f"{LORA} --lora_vision_tower True", {"mm_projector", "decoder lora", "vision_tower lora"}),
        (
            f"{LORA} --unfreeze_mm_vision_tower True",
            {"mm_projector", "decoder lora", "vision_tower weight", "vision_tower bias"},
        ),
    ],
)  # fmt: skip
def test_what_trains(words: str, parts: set[str], arguments: Callable) -> None:
    model, llava, _ = build_model(arguments(words))
    assert trained(model) == parts
    tower = llava.get_vision_tower()
    assert tower.trains == any("vision_tower" in part for part in parts)
    assert llava.config.unfreeze_mm_vision_tower if tower.trains else True


def test_a_lora_is_on_every_linear_layer_of_the_decoder_and_nowhere_else(
    arguments: Callable,
) -> None:
    _, llava, _ = build_model(arguments(LORA))
    names = [name for name, _ in llava.named_modules() if name.endswith("lora_A.default")]
    layers = llava.config.num_hidden_layers
    assert len(names) == 7 * layers
    assert all(name.startswith("model.layers.") for name in names)


def test_only_blocks_that_the_features_depend_on_train(arguments: Callable) -> None:
    _, llava, _ = build_model(arguments("--unfreeze_mm_vision_tower True"))
    tower = llava.get_vision_tower()
    features = llava.encode_images(torch.randn(1, 3, 336, 336))
    features.square().sum().backward()
    marked = {n for n, w in tower.named_parameters() if w.requires_grad}
    reached = {n for n, w in tower.named_parameters() if w.grad is not None}
    assert marked == reached and 0 < len(marked) < len(list(tower.parameters()))


def test_a_frozen_tower_keeps_no_graph(arguments: Callable) -> None:
    _, llava, _ = build_model(arguments())
    features = llava.get_vision_tower()(torch.randn(1, 3, 336, 336))
    assert not features.requires_grad and not llava.get_vision_tower().train().training


def test_parts_have_rates_of_their_own(run_train: Callable, monkeypatch: Any) -> None:
    groups: list[dict[str, Any]] = []

    def keep(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = create(self, *args, **kwargs)
        groups.extend(optimizer.param_groups)
        return optimizer

    create = trainer.LlavaTrainer.create_optimizer
    monkeypatch.setattr(trainer.LlavaTrainer, "create_optimizer", keep)
    rates = "--mm_vision_tower_lr 1e-6 --mm_projector_lr 1e-5 --lr_scheduler_type constant"
    words = f"--unfreeze_mm_vision_tower True {rates} --weight_decay 0.1"
    run = run_train(None, *words.split())
    assert run.code == 0, run.errors
    found = {(group["lr"], group["weight_decay"]) for group in groups}
    assert found == {(r, d) for r in (1e-3, 1e-5, 1e-6) for d in (0.0, 0.1)}


def test_a_trainable_tower_changes_and_is_saved(work: Path, run_train: Callable) -> None:
    run = run_train(None, *["--unfreeze_mm_vision_tower", "True", "--max_steps", "2"])
    assert run.code == 0, run.errors
    saved = load_file(run.folder / "model.safetensors")
    own = load_file(work / "tower/model.safetensors")
    key = "encoder.layers.0.mlp.fc1.weight"
    name = next(k for k in saved if k.startswith(TOWER_PREFIX) and k.endswith(key))
    start = next(v for k, v in own.items() if k.endswith(key))
    assert not torch.equal(saved[name], start)
    assert run.config["unfreeze_mm_vision_tower"] is True


def test_marks_around_images_are_new_tokens(arguments: Callable, tmp_path: Path) -> None:
    _, plain, tokenizer = build_model(arguments())
    known = len(tokenizer)
    words = "--tune_mm_mlp_adapter True --mm_use_im_start_end True"
    _, llava, tokenizer = build_model(arguments(words))
    table = llava.get_input_embeddings().weight.detach()
    assert len(table) == len(tokenizer) == known + 2
    ids = tokenizer.convert_tokens_to_ids([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN])
    assert ids == [known, known + 1]
    mean = plain.get_input_embeddings().weight.detach().mean(0)
    torch.testing.assert_close(table[known], mean)
    assert llava.config.mm_use_im_start_end and not plain.config.mm_use_im_start_end


def test_rows_of_marks_come_from_the_file_of_the_projector(
    arguments: Callable, tmp_path: Path
) -> None:
    _, llava, _ = build_model(arguments("--tune_mm_mlp_adapter True --mm_use_im_start_end True"))
    table = llava.get_input_embeddings().weight.detach().clone()
    table[-2:] = torch.arange(2 * table.shape[1]).view(2, -1).float()
    weights = {
        f"model.mm_projector.{k}": v for k, v in llava.get_model().mm_projector.state_dict().items()
    }
    torch.save({**weights, "model.embed_tokens.weight": table}, tmp_path / "mm_projector.bin")
    words = f"--mm_use_im_start_end True --pretrain_mm_mlp_adapter {tmp_path / 'mm_projector.bin'}"
    _, again, _ = build_model(arguments(words))
    assert torch.equal(again.get_input_embeddings().weight.detach()[-2:], table[-2:])


@pytest.mark.parametrize("words", ["--keep-tokens 16", "--keep-tokens-range 8 20"])
def test_training_prunes_and_the_model_does_not_remember(
    words: str, run_train: Callable, monkeypatch: Any
) -> None:
    counts: list[int] = []
    record = active.record

    def keep(target: Any, tokens: Any, *args: Any) -> None:
        counts.extend(tokens.valid.sum(dim=1).tolist())
        record(target, tokens, *args)

    monkeypatch.setattr("llava.model.llava_arch.record", keep)
    flags = f"--pruner zoo {words} --max_steps 4 --parallel_turns 0"
    first, second = (run_train(None, *flags.split()) for _ in range(2))
    assert first.code == 0, first.errors
    assert first.config.get("mm_token_pruning") is None
    half = len(counts) // 2
    assert counts[:half] == counts[half:] and first.losses == second.losses
    if "range" in words:
        assert len(set(counts)) > 1 and all(8 <= count <= 20 for count in counts)
    else:
        assert set(counts) == {16}


def test_gradients_pass_through_what_is_kept(arguments: Callable) -> None:
    _, llava, _ = build_model(arguments())
    llava.train()
    projector = llava.get_model().mm_projector
    batch = {
        "input_ids": torch.tensor([[1, -200, 5, 6, 7]]),
        "labels": torch.tensor([[-100, -100, 5, 6, 7]]),
        "images": torch.randn(1, 3, 336, 336),
    }
    with active.prune(llava, "zoo", keep_tokens=8):
        llava(**batch).loss.backward()
    assert all(weight.grad is not None for weight in projector.parameters())
    assert sum(float(weight.grad.abs().sum()) for weight in projector.parameters()) > 0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_runs_train_what_is_asked(lora: bool, bf16: bool, run_train: Callable) -> None:
    words = f"{LORA if lora else ''} --bf16 {bf16} --max_steps 3 --gradient_checkpointing True"
    run = run_train(None, *words.split())
    assert run.code == 0, run.errors
    assert all(loss > 0 for loss in run.losses) and len(run.losses) == 3


TILED = "--image_aspect_ratio anyres --mm_patch_merge_type spatial_unpad"


@pytest.mark.parametrize("words", ["", "--tune_mm_mlp_adapter True", LORA])
def test_a_llava_of_tiles_says_its_canvases_and_trains_its_newline(
    words: str, arguments: Callable
) -> None:
    _, llava, _ = build_model(arguments(f"{TILED} {words}"))
    assert len(llava.config.image_grid_pinpoints) == 5
    assert llava.get_model().image_newline.requires_grad


def test_a_newline_comes_from_the_file_of_the_projector(
    arguments: Callable, tmp_path: Path
) -> None:
    _, llava, _ = build_model(arguments(TILED))
    inner, file = llava.get_model(), tmp_path / "mm_projector.bin"
    weights = {f"model.mm_projector.{k}": v for k, v in inner.mm_projector.state_dict().items()}
    newline = torch.arange(len(inner.image_newline)).float()
    torch.save({**weights, "model.image_newline": newline}, file)
    _, again, _ = build_model(arguments(f"{TILED} --pretrain_mm_mlp_adapter {file}"))
    assert torch.equal(again.get_model().image_newline.detach(), newline)


def test_all_parts_have_the_precision_of_the_run(arguments: Callable) -> None:
    _, llava, _ = build_model(arguments(f"{TILED} --bf16 True"))
    assert {weight.dtype for weight in llava.parameters()} == {torch.bfloat16}
    args = arguments()
    args.training.fp16 = True  # refused on a CPU; torch's scaler takes no float16 weights
    assert {weight.dtype for weight in build_model(args)[1].parameters()} == {torch.float32}


def test_a_trained_tower_is_not_replaced(work: Path, run_train: Callable, tmp_path: Path) -> None:
    run = run_train(None, "--unfreeze_mm_vision_tower", "True")
    assert run.code == 0, run.errors
    base = run.folder.rename(tmp_path / "trained")
    other = ["--vision_tower", str(work / "images")]
    assert "vision tower that was trained" in run_train(None, *other, base=base).refused()
    same = ["--vision_tower", f"{work / 'tower'}/"]
    assert run_train(None, *same, base=base).code == 0


def test_a_lora_goes_on_from_a_folder(run_train: Callable, tmp_path: Path) -> None:
    words = f"{LORA} --lora_dropout 0 --max_steps 4 --lr_scheduler_type constant".split()
    first = run_train(None, *words)
    assert first.code == 0, first.errors
    start, folder = first.losses[0], first.folder.rename(tmp_path / "lora")
    again = run_train(None, *words, "--lora_weight_path", str(folder))
    assert again.code == 0, again.errors
    assert again.losses[0] < start
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    refused = run_train(None, *words, "--lora_weight_path", str(folder)).refused()
    assert "cannot be continued" in refused


def test_one_process_with_several_gpus_is_refused(
    run_train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    assert "one process sees 2 GPUs" in run_train(None).refused()


def test_skipped_samples_of_both_parts_of_a_run_are_listed(tmp_path: Path) -> None:
    write_skipped({"a": "no image"}, tmp_path)
    write_skipped({"b": "no answer"}, tmp_path, goes_on=True)
    assert set(json.loads((tmp_path / SKIPPED_FILE).read_text())) == {"a", "b"}
    write_skipped({"b": "no answer"}, tmp_path)
    assert set(json.loads((tmp_path / SKIPPED_FILE).read_text())) == {"b"}
