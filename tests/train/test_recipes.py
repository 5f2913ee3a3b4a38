"""The training scripts: published values, the right number of samples in a step, and bad input."""

import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from llava.train.arguments import parse_arguments
from llava.train.plan import plan
from llava.utils import UserInputError

ROOT = Path(__file__).parents[2]
V1_5 = ("pretrain", "finetune", "finetune_lora", "finetune_qlora")
TASK = ("finetune_task", "finetune_task_lora")
SCRIPTS = [*(f"v1_5/{name}.sh" for name in (*V1_5, *TASK)), "v1_6/finetune.sh"]
# What LLaVA published for 8 GPUs: samples on a GPU, learning rate, ZeRO, length, image, template.
PUBLISHED = {
    "v1_5/pretrain.sh": (32, 1e-3, "zero2", 2048, "square", "plain"),
    "v1_5/finetune.sh": (16, 2e-5, "zero3", 2048, "pad", "v1"),
    "v1_5/finetune_lora.sh": (16, 2e-4, "zero3", 2048, "pad", "v1"),
    "v1_5/finetune_task.sh": (16, 2e-5, "zero3", 2048, "pad", "v1"),
    "v1_5/finetune_task_lora.sh": (16, 2e-4, "zero3", 2048, "pad", "v1"),
}
SHARED = {
    "num_train_epochs": 1,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": True,
    "save_total_limit": 1,
    "dataloader_num_workers": 4,
}
VARIABLES = (
    *("MODEL", "DATA", "IMAGES", "TOWER", "PROJECTOR", "OUTPUT", "BATCH", "GLOBAL_BATCH", "ZERO"),
    *("REPORT_TO", "GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "HOSTFILE"),
    *("DEVICE", "LAUNCHER", "WORK", "LIMIT", "CUDA_VISIBLE_DEVICES"),
)
each_script = pytest.mark.parametrize("script", SCRIPTS)


def run(script: str, *words: str, **variables: object) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    clean |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    clean |= {name: str(value) for name, value in variables.items()}
    command = ["bash", str(ROOT / "scripts" / script), *words]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=500)


def command_of(script: str, *words: str, **variables: object) -> list[str]:
    """The words of the command that a script would run."""
    done = run(script, *words, "--dry-run", **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[0])


def refused(script: str, *words: str, **variables: object) -> str:
    """The one line with which a script refuses."""
    done = run(script, *words, **variables)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    return line


def trainer_words(command: list[str]) -> list[str]:
    return command[command.index("llava.train.train") + 1 :]


@each_script
def test_a_recipe_has_the_published_values_and_the_parser_knows_all_of_it(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The parser looks for the packages that some recipes need; here only names and values matter.
    monkeypatch.setattr("llava.train.arguments._check_packages", lambda *given: None)
    words = trainer_words(command_of(script, OUTPUT=tmp_path / "out"))
    model, data, training, pruning = parse_arguments(words)
    for name, value in SHARED.items():
        assert getattr(training, name) == value, name
    assert model.mm_projector_type == "mlp2x_gelu" and model.mm_vision_select_layer == -2
    assert (model.mm_use_im_start_end, model.mm_use_im_patch_token) == (False, False)
    assert model.vision_tower == "openai/clip-vit-large-patch14-336"
    assert pruning is None
    assert model.tune_mm_mlp_adapter == (script == "v1_5/pretrain.sh")
    assert training.group_by_modality_length == (script != "v1_5/pretrain.sh")
    task = "task" in script
    base = "liuhaotian/llava-v1.5-7b" if task else "lmsys/vicuna-7b-v1.5"
    assert model.model_name_or_path == base
    assert bool(model.pretrain_mm_mlp_adapter) == (not task and script != "v1_5/pretrain.sh")
    if "lora" in script:
        found = training.lora_enable, training.lora_r, training.lora_alpha
        assert (*found, training.mm_projector_lr) == (True, 128, 256, 2e-5)
        assert training.bits == (4 if "qlora" in script else 16)
    if script in PUBLISHED:
        batch, rate, _, length, aspect, version = PUBLISHED[script]
        assert training.per_device_train_batch_size == batch
        assert (training.learning_rate, training.model_max_length) == (rate, length)
        assert (data.image_aspect_ratio, model.version) == (aspect, version)
    assert training.save_steps == (24000 if script == "v1_5/pretrain.sh" else 50000)


def test_llava_1_6_trains_the_tower_on_tiles(tmp_path: Path) -> None:
    words = trainer_words(command_of("v1_6/finetune.sh", OUTPUT=tmp_path / "out"))
    model, data, training, _ = parse_arguments(words)
    assert (data.image_aspect_ratio, model.mm_patch_merge_type) == ("anyres", "spatial_unpad")
    assert model.unfreeze_mm_vision_tower and training.mm_vision_tower_lr == 2e-6
    assert training.model_max_length == 4096


@pytest.mark.parametrize("script", PUBLISHED)
@pytest.mark.parametrize(("gpus", "nodes", "accumulated"), [(8, 1, 1), (4, 1, 2), (2, 2, 2)])
def test_a_step_sees_the_published_batch_on_any_number_of_gpus(
    script: str, gpus: int, nodes: int, accumulated: int
) -> None:
    several = {"NNODES": nodes, "NODE_RANK": 0, "MASTER_ADDR": "host1"} if nodes > 1 else {}
    command = command_of(script, DEVICE="cuda", GPUS=gpus, **several)
    pairs = {*pairwise(command)}
    batch, _, zero, *_ = PUBLISHED[script]
    assert ("--per_device_train_batch_size", str(batch)) in pairs
    assert ("--gradient_accumulation_steps", str(accumulated)) in pairs
    assert ("--deepspeed", f"scripts/{zero}.json") in pairs
    assert {("--bf16", "True"), ("--tf32", "True")} < pairs


def test_launchers_of_one_node_and_of_several(tmp_path: Path) -> None:
    script = "v1_5/finetune.sh"
    words = command_of(script, DEVICE="cuda", GPUS=8, LAUNCHER="torchrun")
    assert words[1:6] == ["-m", "torch.distributed.run", "--nproc_per_node", "8", "--standalone"]
    words = command_of(script, DEVICE="cuda", GPUS=8, LAUNCHER="deepspeed")
    assert words[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "8"]
    variables = {"DEVICE": "cuda", "LAUNCHER": "deepspeed", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert ("--include", "localhost:2,3") in pairwise(command_of(script, **variables))
    nodes = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "host1", "MASTER_PORT": 1234}
    pairs = {*pairwise(command_of(script, DEVICE="cuda", GPUS=4, **nodes))}
    assert {("--nnodes", "2"), ("--node_rank", "1"), ("--master_addr", "host1")} < pairs
    assert ("--master_port", "1234") in pairs
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\nhost1 slots=2\nhost2 slots=2\n")
    pairs = {*pairwise(command_of(script, DEVICE="cuda", HOSTFILE=hosts))}
    assert ("--hostfile", str(hosts)) in pairs and ("--gradient_accumulation_steps", "2") in pairs


def test_the_environment_and_further_arguments_win(tmp_path: Path) -> None:
    variables = {"MODEL": "m", "DATA": "d.json", "IMAGES": "i", "TOWER": "", "PROJECTOR": ""}
    more = ("--learning_rate", "1e-5", "--pruner", "zoo", "--keep-tokens", "64")
    words = trainer_words(
        command_of("v1_5/finetune.sh", *more, OUTPUT=tmp_path, BATCH=4, **variables)
    )
    assert "--vision_tower" not in words and "--pretrain_mm_mlp_adapter" not in words
    model, data, training, pruning = parse_arguments(words)
    assert (model.model_name_or_path, data.data_path, data.image_folder) == ("m", "d.json", "i")
    assert training.learning_rate == 1e-5 and pruning is not None
    assert training.gradient_accumulation_steps == 32


@each_script
def test_missing_files_are_named_with_where_they_come_from(script: str, tmp_path: Path) -> None:
    gone = {"DATA": tmp_path / "data.json", "IMAGES": tmp_path / "images"}
    done = run(script, "--dry-run", **gone)
    lines = [line for line in done.stderr.splitlines() if " is missing: " in line]
    assert done.returncode == 0
    assert lines[0].startswith(f"DATA={tmp_path}/data.json") and "liuhaotian/" in lines[0]
    assert lines[1].startswith(f"IMAGES={tmp_path}/images")
    # Without --dry-run this is an error, and nothing is started.
    error = refused(script, DEVICE="cpu", **gone)
    assert error.startswith(f"error: DATA={tmp_path}/data.json is missing")


@pytest.mark.parametrize(
    ("words", "variables", "told"),
    [
        ([], {"GPUS": 3}, "not a multiple of GPUs x BATCH = 3 x 16"),
        ([], {"GPUS": "many"}, "GPUS is 'many'; give a whole number from 1"),
        ([], {"BATCH": 0}, "BATCH is '0'"),
        ([], {"DEVICE": "tpu"}, "DEVICE is cuda or cpu, not 'tpu'"),
        ([], {"LAUNCHER": "mpirun"}, "LAUNCHER is deepspeed or torchrun"),
        ([], {"ZERO": "none.json"}, "ZERO none.json does not exist"),
        ([], {"NNODES": 2}, "set NODE_RANK (0 to 1) and MASTER_ADDR too"),
        ([], {"HOSTFILE": "nowhere"}, "HOSTFILE nowhere does not exist"),
        (["--deepspeed", "x.json"], {}, "set ZERO instead"),
        (["--per_device_train_batch_size=4"], {}, "set BATCH and GLOBAL_BATCH instead"),
    ],
)
def test_bad_input_is_one_line(words: list[str], variables: dict, told: str) -> None:
    assert told in refused("v1_5/finetune.sh", *words, **{"DEVICE": "cpu", **variables})


def test_a_stage_without_a_demo_says_so() -> None:
    assert "finetune.sh --demo" in refused("v1_6/finetune.sh", "--demo")


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_configs_leave_to_the_trainer_what_it_knows(name: str) -> None:
    config = json.loads((ROOT / f"scripts/{name}.json").read_text())
    for key in ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping"):
        assert config[key] == "auto"
    assert config["bf16"] == {"enabled": "auto"}
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4])
    # Without it, ZeRO-3 saves no weights; LLaVA's offload file misspells it.
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    assert ("offload_param" in zero) == ("offload" in name)
    # DeepSpeed's own would not see --mm_projector_lr and --mm_vision_tower_lr.
    assert "optimizer" not in config and "scheduler" not in config


def small_run(work: Path, output: Path) -> dict[str, object]:
    return {
        "MODEL": work / "init",
        "TOWER": work / "tower",
        "DATA": work / "data/data.json",
        "IMAGES": work / "images",
        "OUTPUT": output,
        "BATCH": 2,
        "GLOBAL_BATCH": 4,
        "REPORT_TO": "none",
        "DEVICE": "cpu",
    }


def planned(work: Path, output: Path, *words: str, data: Path | None = None) -> dict[str, str]:
    """The rows of the plan of `finetune.sh` with small data."""
    variables = small_run(work, output) | {"PROJECTOR": "", "DATA": "not yet"}
    given = trainer_words(command_of("v1_5/finetune.sh", *words, **variables))
    text = plan(parse_arguments([*given, "--data_path", str(data or work / "data/data.json")]))
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_a_dry_run_plans_what_the_run_would_do(work: Path, tmp_path: Path) -> None:
    words = ("--pruner", "zoo", "--keep-tokens-range", "32", "64", "--dry_run_gpus", "2")
    rows = planned(work, tmp_path / "out", *words)
    assert rows["start"].endswith("init (a language model), a new projector")
    assert rows["trains"] == "projector, language model"
    assert rows["pruning"] == "zoo, 32 to 64 tokens drawn for every batch"
    assert rows["data"].startswith("8 samples, 0 of them without an image")
    assert rows["batch"] == "8: 2 on each GPU, GPUs: 2, accumulated: 2"
    assert rows["steps"].startswith("1 (1 an epoch), the first 1 to warm up, rate 2e-05")
    assert "ZeRO-3 offload" in rows["memory"]
    assert not list((tmp_path / "out").iterdir()), "a dry run leaves nothing behind"


def test_a_dry_run_looks_for_every_image(work: Path, tmp_path: Path) -> None:
    samples = json.loads((work / "data/data.json").read_text())
    samples[3]["image"] = "gone.png"
    (tmp_path / "data.json").write_text(json.dumps(samples))
    with pytest.raises(UserInputError, match=r"1 of 5 images are not in .*'gone\.png' of sample"):
        planned(work, tmp_path / "out", data=tmp_path / "data.json")


def test_a_plan_counts_the_parts_that_train(work: Path, tmp_path: Path) -> None:
    lora = ("--lora_enable", "True", "--unfreeze_mm_vision_tower", "True")
    rows = planned(work, tmp_path, *lora, "--max_steps", "7")
    assert rows["trains"] == "projector, LoRA of rank 64 on the language model, vision tower"
    assert rows["steps"].startswith("7 (2 an epoch)")


def test_a_script_trains(work: Path, tmp_path: Path) -> None:
    captions = [
        {
            "id": "0",
            "image": "train/000000.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is there?"},
                {"from": "gpt", "value": "red star"},
            ],
        }
    ]
    (tmp_path / "captions.json").write_text(json.dumps(captions * 4))
    variables = small_run(work, tmp_path / "out") | {"DATA": tmp_path / "captions.json"}
    done = run("v1_5/pretrain.sh", "--dataloader_num_workers", "0", **variables)
    assert done.returncode == 0, done.stderr
    assert "global batch 4: 2 on each GPU, GPUs: 1, accumulated: 2" in done.stderr
    assert (tmp_path / "out/mm_projector.bin").is_file()


@pytest.mark.slow
def test_the_published_stages_run_one_after_the_other(tmp_path: Path) -> None:
    data = tmp_path / "data"
    draw = [sys.executable, "-m", "llava.train.tiny.demo_data", str(data), "--scenes", "16"]
    subprocess.run(draw, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    demo = {"WORK": tmp_path, "LIMIT": 12}
    steps = ("--demo", "--max_steps", "4", "--logging_steps", "1")
    done = run("v1_5/pretrain.sh", *steps, **demo)
    assert done.returncode == 0, done.stderr
    assert "4 steps: loss " in done.stdout
    parts = {"MODEL": data / "language-model", "TOWER": data / "vision-tower"}
    done = run(
        "v1_5/finetune.sh",
        *steps,
        PROJECTOR=tmp_path / "pretrain/mm_projector.bin",
        **parts,
        **demo,
    )
    assert done.returncode == 0, done.stderr
    assert "| 64 (`zoo@64`) | - | " in done.stdout
    done = run("v1_5/finetune_lora.sh", *steps, MODEL=tmp_path / "finetune", **demo)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "finetune_lora-score/demo.json").read_text())
    assert result["steps"] == 4 and result["arms"]["zoo@64"]["n"] == 12
    assert (tmp_path / "finetune_lora/adapter_config.json").is_file()


@pytest.mark.slow
def test_a_dry_run_of_a_script_ends_with_the_plan(work: Path, tmp_path: Path) -> None:
    variables = small_run(work, tmp_path / "out") | {"DEVICE": "cuda", "GPUS": 2}
    done = run("v1_5/finetune_task.sh", "--dry-run", **variables)
    assert done.returncode == 0, done.stderr
    assert "batch      4: 2 on each GPU, GPUs: 2, accumulated: 1" in done.stdout
