"""Command-line arguments of `llava.train.train`, under LLaVA's names.

Some are read but not built yet. LLaVA's own scripts name many of them with the value that changes
nothing; any other value is refused rather than ignored.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import transformers
from transformers.integrations import get_available_reporting_integrations

from llava.conversation import conv_templates
from llava.model.checks import ASPECTS
from llava.pixels import PIXELS, PIXELS_HELP, VIEWER
from llava.registry import unknown
from llava.utils import UserInputError
from llava.value_rules import number, one_line, read_values, whole

_NOT_BUILT = "not built yet"
# Arguments of transformers' trainer that this one cannot honour, and what they ask for.
_OF_TRANSFORMERS = {
    "deepspeed": "DeepSpeed",
    "fsdp": "FSDP",
    "label_smoothing_factor": "label smoothing",
    "do_eval": "evaluation during training",
    "do_predict": "prediction",
    "eval_strategy": "evaluation during training",
    "load_best_model_at_end": "evaluation during training",
    "remove_unused_columns": "dropping columns of the data",
}
_ABOVE_ZERO, _FROM_ZERO, _SEED = number(0, above=True), number(0), whole(0, 2**32 - 1)
_NUMBERS = {
    "--per_device_train_batch_size": _ABOVE_ZERO,
    "--gradient_accumulation_steps": _ABOVE_ZERO,
    "--model_max_length": _ABOVE_ZERO,
    "--num_train_epochs": _ABOVE_ZERO,
    "--save_steps": _ABOVE_ZERO,
    "--dataloader_num_workers": _FROM_ZERO,
    "--learning_rate": _FROM_ZERO,
    "--mm_projector_lr": _FROM_ZERO,
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
    pretrain_mm_mlp_adapter: str | None = _argument(None, "file with the projector to start from")
    freeze_backbone: bool = _argument(False, "freeze the language model")
    tune_mm_mlp_adapter: bool = _argument(
        False, "train only the projector, and save it as mm_projector.bin too"
    )
    freeze_mm_mlp_adapter: bool = _argument(False, "freeze the projector")


@dataclass
class DataArguments:
    """Say what it is trained on."""

    data_path: str = field(metadata={"help": "JSON array of LLaVA conversations"})
    image_folder: str | None = _argument(None, "folder of the image files")
    pixels: str = _argument(VIEWER, f"{PIXELS_HELP}; choices: {', '.join(PIXELS)}")
    image_aspect_ratio: str | None = _argument(
        None, "pad, square or anyres; by default the model's own, pad for a new LLaVA"
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
    # Names that LLaVA's scripts use and transformers has dropped.
    eval_strategy: str = field(default="no", metadata={"aliases": ["--evaluation_strategy"]})
    warmup_ratio: float | None = _argument(None, "share of all steps for the warm-up, below 1")
    model_max_length: int | None = _argument(
        None,
        "tokens kept of a sample; by default the model's own tokenizer_model_max_length, 2048 for "
        "a new LLaVA",
    )
    mm_projector_lr: float | None = _argument(
        None, "learning rate of the projector, if it has its own"
    )

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1 or self.warmup_steps:
                raise UserInputError(
                    f"--warmup_ratio is {self.warmup_ratio}; give a share of the steps, from 0 to "
                    "below 1, and no --warmup_steps with it"
                )
            self.warmup_steps = self.warmup_ratio
        super().__post_init__()


def _unbuilt(default: Any, what: str) -> Any:
    return _argument(default, f"{_NOT_BUILT}: {what}")


@dataclass
class UnbuiltArguments:
    """Accept LLaVA's arguments for what this trainer lacks, with their defaults only."""

    bits: int = _unbuilt(16, "training of 4-bit or 8-bit weights")
    double_quant: bool | None = _unbuilt(None, "training of 4-bit or 8-bit weights")
    quant_type: str | None = _unbuilt(None, "training of 4-bit or 8-bit weights")
    lora_enable: bool = _unbuilt(False, "LoRA")
    lora_r: int | None = _unbuilt(None, "LoRA")
    lora_alpha: int | None = _unbuilt(None, "LoRA")
    lora_dropout: float | None = _unbuilt(None, "LoRA")
    lora_weight_path: str | None = _unbuilt(None, "LoRA")
    lora_bias: str | None = _unbuilt(None, "LoRA")
    group_by_modality_length: bool = _unbuilt(False, "batches of one modality")
    mm_use_im_start_end: bool = _unbuilt(False, "marks around images")
    mm_use_im_patch_token: bool = _unbuilt(False, "a token for patches")
    mpt_attn_impl: str | None = _unbuilt(None, "MPT language models")
    cache_dir: str | None = _unbuilt(None, "another cache; set HF_HOME instead")
    lazy_preprocess: bool = _unbuilt(True, "samples prepared ahead")
    is_multimodal: bool = _unbuilt(True, "training without images")


class _Parser(transformers.HfArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserInputError(" ".join(message.split()))


def parse_arguments(
    words: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read the arguments of a command line, by default this process's.

    Raises:
        UserInputError: unknown or malformed arguments, values that cannot be used, and what LLaVA
            has but is not built here yet.
    """
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments, UnbuiltArguments))
    given, rest = parser.parse_known_args(words)
    if rest:
        raise UserInputError(f"unknown argument {rest[0]!r}; --help lists all there are")
    _check_built(given, parser)
    try:
        model, data, training, _ = parser.parse_args_into_dataclasses(
            words, look_for_args_file=False
        )
    except UserInputError:
        raise
    except Exception as error:  # what transformers refuses shares no base class
        raise UserInputError(f"these arguments cannot be used: {one_line(error)}") from error
    _check_names(model, data, training)
    read_values({flag: getattr(training, flag.removeprefix("--")) for flag in _NUMBERS}, _NUMBERS)
    _check_frozen(model, training)
    check_writable(training.output_dir)
    return model, data, training


def _check_built(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse arguments that would be ignored, all of them in one line.

    Args:
        given: what the parser read of a command line.
        parser: knows the defaults.

    Raises:
        UserInputError: names each argument and what it asks for.
    """
    own = {f.name: f.metadata["help"].split(": ")[1] for f in fields(UnbuiltArguments)}
    found = [
        f"--{name} {getattr(given, name)} ({what})"
        for name, what in (own | _OF_TRANSFORMERS).items()
        if getattr(given, name) != parser.get_default(name)
    ]
    if found:
        raise UserInputError(f"{_NOT_BUILT}: {', '.join(found)}; leave out what is named here")


def _check_names(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    if model.version not in conv_templates:
        raise UserInputError(unknown("template", model.version, conv_templates))
    if data.image_aspect_ratio not in (None, *ASPECTS):
        raise UserInputError(
            f"--image_aspect_ratio is {data.image_aspect_ratio!r}; use one of {', '.join(ASPECTS)}"
        )
    missing = set(training.report_to) - set(get_available_reporting_integrations())
    if missing:
        raise UserInputError(
            f"--report_to {min(missing)} needs a package that is not installed; install it, or use "
            "--report_to none"
        )


def _check_frozen(model: ModelArguments, training: TrainingArguments) -> None:
    """Refuse runs that train nothing, or that contradict themselves."""
    if not model.freeze_mm_mlp_adapter:
        return
    for name, asked in (
        ("freeze_backbone", model.freeze_backbone),
        ("tune_mm_mlp_adapter", model.tune_mm_mlp_adapter),
        ("mm_projector_lr", training.mm_projector_lr is not None),
    ):
        if asked:
            raise UserInputError(
                f"--freeze_mm_mlp_adapter and --{name} contradict each other; leave one of them out"
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
