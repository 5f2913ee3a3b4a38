"""LLaVA's own command lines: accepted where built, else one line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.pruning.config import PruningConfig
from llava.train.arguments import parse_arguments, renamed
from llava.utils import UserInputError

# The flags of LLaVA's pre-training and fine-tuning scripts that ask for what is built here, or for
# nothing.
SCRIPT = """--model_name_or_path base --version v1 --data_path data.json --image_folder images
    --vision_tower tower --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2
    --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
    --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4
    --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps
    --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0.
    --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --model_max_length 2048
    --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to none --use_cpu True --bf16 True --group_by_modality_length False
    --lora_enable False --bits 16 --tune_mm_mlp_adapter True --freeze_backbone True
    --mm_patch_merge_type flat --mm_vision_select_feature patch --mm_projector_lr 1e-3
    --is_multimodal True --optim adamw_torch --pretrain_mm_mlp_adapter mm_projector.bin"""


@pytest.fixture
def parse(tmp_path: Path) -> Callable:
    def parse(*words: str):
        return parse_arguments([*SCRIPT.split(), "--output_dir", str(tmp_path / "out"), *words])

    return parse


def test_a_script_of_llava_is_read(parse: Callable) -> None:
    model, data, training, pruning = parse()
    assert pruning is None
    assert model.tune_mm_mlp_adapter and model.mm_vision_select_layer == -2
    assert data.image_aspect_ratio == "pad"
    assert training.get_warmup_steps(1000) == 30
    assert training.model_max_length == 2048 and training.eval_strategy == "no"


@pytest.mark.parametrize("name", re.findall(r"--(\w+)", SCRIPT))
def test_every_flag_may_also_be_left_out(name: str, tmp_path: Path) -> None:
    script = SCRIPT if name != "use_cpu" else SCRIPT.replace("--bf16 True", "")
    words = re.sub(rf"--{name} \S+", "", script).split()
    if name in ("model_name_or_path", "data_path"):
        with pytest.raises(UserInputError, match=f"required: --{name}"):
            parse_arguments(words)
    else:
        parse_arguments([*words, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--mpt_attn_impl triton", "MPT"),
        ("--fsdp full_shard", "FSDP"),
        ("--label_smoothing_factor 0.1", "label smoothing"),
        ("--evaluation_strategy steps", "evaluation"),
        ("--eval_strategy epoch", "evaluation"),
        ("--do_eval True", "evaluation"),
        ("--do_predict True", "prediction"),
        ("--push_to_hub True", "upload"),
        ("--load_best_model_at_end True", "evaluation"),
        ("--remove_unused_columns True", "columns"),
    ],
)
def test_what_cannot_be_honoured_is_named(words: str, named: str, parse: Callable) -> None:
    with pytest.raises(UserInputError, match=f"^cannot be honoured: .*{named}") as caught:
        parse(*words.split())
    for flag in re.findall(r"--\w+", words.replace("evaluation_strategy", "eval_strategy")):
        assert flag in str(caught.value)


def test_all_that_cannot_be_honoured_is_named_at_once(parse: Callable) -> None:
    with pytest.raises(UserInputError, match=r"--do_eval .*--mpt_attn_impl "):
        parse("--mpt_attn_impl", "triton", "--do_eval", "True")


def test_arguments_of_lora_are_read(parse: Callable) -> None:
    words = "--lora_enable True --tune_mm_mlp_adapter False --lora_r 128 --lora_alpha 256"
    training = parse(*words.split()).training
    assert (training.lora_enable, training.lora_r, training.lora_alpha) == (True, 128, 256)
    assert (training.lora_dropout, training.lora_bias, training.bits) == (0.05, "none", 16)


def test_renamed_arguments_are_one_notice() -> None:
    assert renamed(SCRIPT.split()) == (
        "--evaluation_strategy is now --eval_strategy; --warmup_ratio is now --warmup_steps"
    )
    assert renamed(["--warmup-ratio=0.03"]) == "--warmup_ratio is now --warmup_steps"
    assert renamed(["--eval_strategy", "no"]) is None


def test_pruning_of_training_is_read(parse: Callable) -> None:
    fixed = parse("--pruner", "zoo", "--keep-tokens", "64").pruning
    assert fixed.of_batch(3, 0) == PruningConfig("zoo", keep_tokens=64)
    drawn = parse("--pruner", "zoo", "--keep-tokens-range", "32", "40").pruning
    budgets = [drawn.of_batch(step, part).keep_tokens for step in range(50) for part in (0, 1)]
    assert set(budgets) == set(range(32, 41))
    assert budgets[7] == drawn.of_batch(3, 1).keep_tokens
    other = parse("--pruner", "zoo", "--keep-tokens-range", "32", "40", "--seed", "1").pruning
    assert budgets[::2] != [other.of_batch(step, 0).keep_tokens for step in range(50)]


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--version v9", "unknown template 'v9'"),
        ("--version v0.5", "unknown template 'v0.5'"),
        ("--image_aspect_ratio wide", "--image_aspect_ratio is 'wide'"),
        ("--image_aspect_ratio anyres_max_9", "--image_aspect_ratio is 'anyres_max_9'"),
        ("--warmup_ratio 1.5", "--warmup_ratio is 1.5"),
        ("--warmup_ratio -1", "--warmup_ratio is -1"),
        ("--warmup_steps 5", "no --warmup_steps with it"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size is 0"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps is 0"),
        ("--model_max_length 0", "--model_max_length is 0"),
        ("--model_max_length many", "--model_max_length"),
        ("--learning_rate nan", "--learning_rate is nan"),
        ("--learning_rate -1", "--learning_rate is -1"),
        ("--mm_projector_lr inf", "--mm_projector_lr is inf"),
        ("--num_train_epochs -1", "--num_train_epochs is -1"),
        ("--num_train_epochs 0", "--num_train_epochs is 0"),
        ("--save_steps 0", "--save_steps is 0"),
        ("--seed -1", "--seed is -1"),
        ("--seed 4294967296", "--seed is 4294967296"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers is -1"),
        ("--max_steps many", "--max_steps"),
        ("--lr_scheduler_type up", "up"),
        ("--optim foo", "foo"),
        ("--save_strategy never", "never"),
        ("--tf32 True", "tf32"),
        ("--fp16 True", "fp16"),
        ("--report_to wandb,foo", "--report_to"),
        ("--report_to no_such_tracker", "--report_to no_such_tracker needs a package"),
        ("--group_by_length True", "unknown argument '--group_by_length'"),
        ("--no_cuda", "unknown argument '--no_cuda'"),
        ("--freeze_mm_mlp_adapter True", "contradict each other"),
        ("--bf16 maybe", "bf16"),
        ("--bits 5", "--bits is 5; use one of 4, 8, 16"),
        ("--bits 4", "--bits needs --lora_enable True"),
        ("--lora_bias some", "--lora_bias is 'some'"),
        ("--lora_r 0", "--lora_r is 0"),
        ("--lora_dropout 2", "--lora_dropout is 2"),
        ("--quant_type int4", "--quant_type is 'int4'"),
        ("--lora_enable True", "--tune_mm_mlp_adapter and --lora_enable contradict each other"),
        ("--unfreeze_mm_vision_tower True", "contradict each other"),
        ("--lora_weight_path a", "--lora_weight_path needs --lora_enable True"),
        ("--mm_vision_tower_lr 1e-6", "--mm_vision_tower_lr needs --unfreeze_mm_vision_tower"),
        (
            "--tune_mm_mlp_adapter False --unfreeze_mm_vision_tower True --feature_file f.npy",
            "--feature_file replaces the vision tower, which --unfreeze_mm_vision_tower would",
        ),
        (
            "--tune_mm_mlp_adapter False --lora_enable True --lora_vision_tower True "
            "--feature_file f.npy",
            "--feature_file replaces the vision tower, which --lora_vision_tower would",
        ),
        ("--keep-tokens 64", "give a method too"),
        ("--keep-tokens-range 8 16", "needs a method, such as --pruner zoo"),
        ("--pruner zoo --keep-tokens-range 16 8", "--keep-tokens-range 16 8: give the lowest"),
        ("--pruner zoo --keep-tokens-range 0 8", "--keep-tokens-range 0 8: give the lowest"),
        ("--pruner zoo --keep-tokens 8 --keep-tokens-range 4 8", "are two budgets"),
        ("--pruner zooo --keep-tokens 64", "did you mean 'zoo'"),
        ("--decoder-pruner fastv --decoder-keep-tokens 64", "works at inference only"),
        ("--lr_scheduler_kwargs {", "these arguments cannot be used: Expecting property"),
    ],
)
def test_values_that_cannot_be_used_are_one_line(words: str, fault: str, parse: Callable) -> None:
    with pytest.raises(UserInputError, match=fault) as caught:
        parse(*words.split())
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        with pytest.raises(UserInputError, match="cannot write to --output_dir"):
            parse_arguments([*SCRIPT.split(), "--output_dir", str(tmp_path / folder)])
