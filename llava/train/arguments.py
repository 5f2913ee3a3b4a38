"""Command-line arguments of `llava.train.train`, under LLaVA's names.

What LLaVA has and this trainer cannot honour is refused by name rather than ignored.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from packaging.version import Version
from transformers.integrations import get_available_reporting_integrations

from llava.conversation import conv_templates
from llava.model.checks import ASPECTS
from llava.pixels import PIXELS, PIXELS_HELP, VIEWER
from llava.pruning.flags import add_pruning_flags
from llava.registry import unknown
from llava.train.budgets import TrainingPruning, training_pruning
from llava.train.zero import check_agreement, join_deepspeed, prepare_deepspeed
from llava.utils import UserInputError
from llava.value_rules import number, one_line, read_values, whole

# Arguments that this trainer cannot honour, and what to do instead.
_REFUSED = {
    "fsdp": "FSDP is not supported; use --deepspeed",
    "label_smoothing_factor": "label smoothing is not supported",
    "do_eval": "there is no evaluation during training; run `llava run` on a checkpoint",
    "do_predict": "there is no prediction here; run `llava run` on a checkpoint",
    "eval_on_start": "there is no evaluation during training",
    "train_sampling_strategy": "use --group_by_modality_length True",
    "eval_strategy": "there is no evaluation during training; run `llava run` on a checkpoint",
    "push_to_hub": "nothing is pushed to the hub; upload what was saved",
    "load_best_model_at_end": "there is no evaluation during training",
    "remove_unused_columns": "columns of the data cannot be dropped",
    "mpt_attn_impl": "MPT language models are not supported; use a Llama or a Mistral",
}
# Names that LLaVA's scripts use and transformers has dropped.
_RENAMED = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}
_ABOVE_ZERO, _FROM_ZERO, _SEED = number(0, above=True), number(0), whole(0, 2**32 - 1)
_NUMBERS = {
    "--per_device_train_batch_size": _ABOVE_ZERO,
    "--gradient_accumulation_steps": _ABOVE_ZERO,
    "--model_max_length": _ABOVE_ZERO,
    "--num_train_epochs": _ABOVE_ZERO,
    "--save_steps": _ABOVE_ZERO,
    "--dry_run_gpus": whole(1, 2**20),
    "--lora_r": whole(1, 2**16),
    "--lora_alpha": _ABOVE_ZERO,
    "--lora_dropout": number(0, 1),
    "--dataloader_num_workers": _FROM_ZERO,
    "--learning_rate": _FROM_ZERO,
    "--mm_projector_lr": _FROM_ZERO,
    "--mm_vision_tower_lr": _FROM_ZERO,
    "--weight_decay": _FROM_ZERO,
    "--seed": _SEED,
    "--data_seed": _SEED,
}


def _argument(default: Any, summary: str) -> Any:
    return field(default=default, metadata={"help": summary})


@dataclass
class ModelArguments:
    """Say what is trained. What is left out stays as the model to start from has it."""

    model_name_or_path: str = field(metadata={"help": "language model or LLaVA to start from"})
    version: str = _argument("v1", "conversation template")
    vision_tower: str | None = _argument(None, "CLIP folder or hub name")
    mm_vision_select_layer: int | None = _argument(
        None, "hidden state of the tower that is used; -2 for a new one"
    )
    mm_vision_select_feature: str | None = _argument(
        None, "patch or cls_patch; patch for a new tower"
    )
    mm_projector_type: str | None = _argument(None, "kind of projector; mlp2x_gelu for a new one")
    mm_patch_merge_type: str | None = _argument(None, "how tiles are joined; flat for a new LLaVA")
    mm_use_im_start_end: bool | None = _argument(
        None, "put marks around images; False for a new LLaVA"
    )
    mm_use_im_patch_token: bool | None = _argument(
        None, "give the vocabulary a token for patches, which no prompt uses; False for a new LLaVA"
    )
    pretrain_mm_mlp_adapter: str | None = _argument(None, "file with the projector to start from")
    freeze_backbone: bool = _argument(False, "freeze the language model")
    tune_mm_mlp_adapter: bool = _argument(
        False, "train only the projector, and save it as mm_projector.bin too"
    )
    freeze_mm_mlp_adapter: bool = _argument(False, "freeze the projector")
    unfreeze_mm_vision_tower: bool = _argument(False, "train the vision tower too, as LLaVA-1.6")
    mpt_attn_impl: str | None = _argument(None, "not supported: MPT language models")


@dataclass
class DataArguments:
    """Say what it is trained on."""

    data_path: str = field(metadata={"help": "JSON array of LLaVA conversations"})
    image_folder: str | None = _argument(None, "folder of the image files")
    pixels: str = _argument(VIEWER, f"{PIXELS_HELP}; choices: {', '.join(PIXELS)}")
    image_aspect_ratio: str | None = _argument(
        None, "pad, square or anyres; by default the model's own, pad for a new LLaVA"
    )
    lazy_preprocess: bool = _argument(
        True, "LLaVA's name; samples are always prepared when they are needed"
    )
    is_multimodal: bool = _argument(True, "False refuses samples with images")
    skip_bad_samples: bool = _argument(
        False, "report samples that cannot be used, and train on the others"
    )
    pack_samples: bool = _argument(
        False, "put several short samples into one row; they do not see one another"
    )
    feature_file: str | None = _argument(
        None,
        "features.npy of the frozen tower, [images, N, Dv]; replaces image_folder. Row i belongs "
        "to the image whose file name is the number i",
    )
    parallel_turns: float = _argument(
        0.0,
        "share of the samples, 0 to 1, whose turns do not see one another: each question follows "
        "the shared image as if it were the first",
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Add LLaVA's arguments and defaults to transformers'."""

    remove_unused_columns: bool = False
    eval_strategy: str = field(default="no", metadata={"aliases": ["--evaluation_strategy"]})
    warmup_ratio: float | None = _argument(None, "share of all steps for the warm-up, below 1")
    cache_dir: str | None = _argument(None, "where models of the hub are kept")
    model_max_length: int | None = _argument(
        None,
        "tokens kept of a sample; by default the model's own tokenizer_model_max_length, 2048 for "
        "a new LLaVA",
    )
    mm_projector_lr: float | None = _argument(
        None, "learning rate of the projector, if it has its own"
    )
    mm_vision_tower_lr: float | None = _argument(
        None, "learning rate of the vision tower, if it has its own"
    )
    group_by_modality_length: bool = _argument(
        False, "batches of images or of text alone, of samples that are about as long"
    )
    lora_enable: bool = _argument(False, "train a LoRA on the language model, and the projector")
    lora_r: int = _argument(64, "rank of the LoRA")
    lora_alpha: float = _argument(16, "the LoRA is scaled by alpha / r")
    lora_dropout: float = _argument(0.05, "dropout in front of the LoRA")
    lora_bias: str = _argument("none", "biases that train with it: none, all or lora_only")
    lora_weight_path: str | None = _argument(None, "LoRA folder to continue from")
    lora_vision_tower: bool = _argument(False, "the vision tower gets a LoRA too")
    bits: int = _argument(16, "4 or 8: the language model is quantized under a LoRA (QLoRA)")
    quant_type: str = _argument("nf4", "of 4 bits: nf4 or fp4")
    double_quant: bool = _argument(True, "of 4 bits: quantize the scales as well")
    dry_run: bool = _argument(False, "check everything, print the plan, train nothing")
    dry_run_gpus: int | None = _argument(
        None, "GPUs that the plan is for; by default those of this run"
    )

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1 or self.warmup_steps:
                raise UserInputError(
                    f"--warmup_ratio is {self.warmup_ratio}; give a share of the steps, from 0 to "
                    "below 1, and no --warmup_steps with it"
                )
            self.warmup_steps = self.warmup_ratio
        # The later name of transformers 5.23; the earlier one alone brings a warning there.
        if getattr(self, "activation_checkpointing", True) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every batch reaches all that train
        if self.deepspeed:
            prepare_deepspeed(self.deepspeed, on_cpu=self.use_cpu)
        super().__post_init__()
        check_agreement(self)
        if self.deepspeed:
            join_deepspeed()


class Arguments(NamedTuple):
    """What a command line asks for."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    pruning: TrainingPruning | None


class _Parser(transformers.HfArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserInputError(" ".join(message.split()))


def parse_arguments(words: Sequence[str] | None = None) -> Arguments:
    """Read the arguments of a command line, by default this process's.

    Raises:
        UserInputError: unknown or malformed arguments, values that cannot be used, and what cannot
            be honoured.
    """
    kinds: Any = (ModelArguments, DataArguments, TrainingArguments)
    parser = _Parser(kinds)
    add_pruning_flags(parser)
    parser.add_argument(
        "--keep-tokens-range",
        type=int,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="instead of --keep-tokens: draw the number of tokens kept for every batch",
    )
    given, rest = parser.parse_known_args(words)
    if rest:
        raise UserInputError(f"unknown argument {rest[0]!r}; --help lists all there are")
    _refuse(given, parser)
    try:
        model, data, training, flags = parser.parse_args_into_dataclasses(
            words, look_for_args_file=False
        )
    except UserInputError:
        raise
    except Exception as error:  # what transformers refuses shares no base class
        fault, advice = one_line(error), ""
        if not torch.cuda.is_available() and any(w in fault for w in ("bf16", "fp16", "tf32")):
            advice = "; there is no GPU here: leave out what it names, and give --use_cpu True"
        raise UserInputError(f"these arguments cannot be used: {fault}{advice}") from error
    _check_names(model, data, training)
    read_values({flag: getattr(training, flag.removeprefix("--")) for flag in _NUMBERS}, _NUMBERS)
    _check_parts(model, training)
    _check_features(model, data, training)
    _check_packages(training)
    pruning = training_pruning(flags, training.seed)
    check_writable(training.output_dir)
    return Arguments(model, data, training, pruning)


def renamed(words: Sequence[str]) -> str | None:
    """Return one notice about names of a command line that transformers has changed."""
    names = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words}
    found = [f"--{old} is now --{new}" for old, new in _RENAMED.items() if old in names]
    return "; ".join(found) or None


def _refuse(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse arguments that would be ignored, all of them in one line.

    Args:
        given: what the parser read of a command line.
        parser: knows the defaults.

    Raises:
        UserInputError: names each argument and the way out.
    """
    found = [
        f"--{name} {getattr(given, name)} ({advice})"
        for name, advice in _REFUSED.items()
        if getattr(given, name) != parser.get_default(name)
    ]
    if found:
        raise UserInputError(f"cannot be honoured: {', '.join(found)}; leave out what is named")


def _check_names(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    if model.version not in conv_templates:
        raise UserInputError(unknown("template", model.version, conv_templates))
    for flag, value, allowed in (
        ("image_aspect_ratio", data.image_aspect_ratio, (None, *ASPECTS)),
        ("lora_bias", training.lora_bias, ("none", "all", "lora_only")),
        ("quant_type", training.quant_type, ("nf4", "fp4")),
        ("bits", training.bits, (4, 8, 16)),
    ):
        if value not in allowed:
            names = ", ".join(str(name) for name in allowed if name is not None)
            raise UserInputError(f"--{flag} is {value!r}; use one of {names}")
    missing = set(training.report_to or ()) - set(get_available_reporting_integrations())
    if missing:
        raise UserInputError(
            f"--report_to {min(missing)} needs a package that is not installed; install it, or use "
            "--report_to none"
        )


def _check_parts(model: ModelArguments, training: TrainingArguments) -> None:
    """Refuse runs that train nothing, or that contradict themselves."""
    lora, tower = training.lora_enable, model.unfreeze_mm_vision_tower
    frozen, only = "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter"
    for first, second, contradict in (
        (frozen, "freeze_backbone", model.freeze_backbone and not (lora or tower)),
        (frozen, only, model.tune_mm_mlp_adapter),
        (frozen, "mm_projector_lr", training.mm_projector_lr is not None),
    ):
        if model.freeze_mm_mlp_adapter and contradict:
            raise UserInputError(
                f"--{first} and --{second} contradict each other; leave one of them out"
            )
    for first, second, contradict in (
        (only, "lora_enable", model.tune_mm_mlp_adapter and lora),
        (only, "unfreeze_mm_vision_tower", model.tune_mm_mlp_adapter and tower),
        ("unfreeze_mm_vision_tower", "lora_vision_tower", tower and training.lora_vision_tower),
    ):
        if contradict:
            raise UserInputError(
                f"--{first} and --{second} contradict each other; leave one of them out"
            )
    for flag, set_, needed, there in (
        ("lora_weight_path", training.lora_weight_path, "lora_enable True", lora),
        ("lora_vision_tower", training.lora_vision_tower, "lora_enable True", lora),
        ("bits", training.bits != 16, "lora_enable True", lora),
        ("mm_vision_tower_lr", training.mm_vision_tower_lr is not None, "unfreeze_mm_vision_tower "
         "True, or --lora_vision_tower True", tower or training.lora_vision_tower),
    ):  # fmt: skip
        if set_ and not there:
            raise UserInputError(f"--{flag} needs --{needed}; add it, or leave --{flag} out")


def _check_features(
    model: ModelArguments, data: DataArguments, training: TrainingArguments
) -> None:
    """Refuse to train a tower whose features are read from a file."""
    for flag, given in (
        ("unfreeze_mm_vision_tower", model.unfreeze_mm_vision_tower),
        ("lora_vision_tower", training.lora_vision_tower),
    ):
        if data.feature_file is not None and given:
            raise UserInputError(
                f"--feature_file replaces the vision tower, which --{flag} would train; give "
                f"--image_folder instead, or leave --{flag} out"
            )


def _check_packages(training: TrainingArguments) -> None:
    """Refuse packages that are missing or too old, and quantized weights under ZeRO-3."""
    for asked, flag, package, least in (
        # Before 0.21 a LoRA calls the model so that hooks on it do not run.
        (training.lora_enable, "--lora_enable True", "peft", "0.21"),
        (training.bits != 16, f"--bits {training.bits}", "bitsandbytes", "0.46"),
    ):
        if asked and (find_spec(package) is None or Version(version(package)) < Version(least)):
            raise UserInputError(
                f"{flag} needs the package {package}, {least} or newer; run "
                f"pip install -U '{package}>={least}'"
            )
    zero = getattr(training, "hf_deepspeed_config", None)
    if training.bits != 16 and zero is not None and zero.is_zero3():
        raise UserInputError(
            f"--bits {training.bits} cannot be used with ZeRO-3, which splits weights that are "
            "packed; use scripts/zero2.json"
        )


def check_writable(folder: str | Path) -> None:
    """Make a folder and check that files can be written there, before hours of work.

    Raises:
        UserInputError: they cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserInputError(
            f"cannot write to --output_dir {folder} ({error.strerror}); give another folder"
        ) from error
