"""Command-line arguments of ``llava.train.train``, under LLaVA's names."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import transformers
from transformers.integrations import get_available_reporting_integrations

from llava.conversation import conv_templates
from llava.model.checks import ASPECTS
from llava.pixels import PIXELS, PIXELS_HELP, VIEWER
from llava.train.unbuilt import UnbuiltArguments, check_built
from llava.utils import UserInputError
from llava.value_rules import one_line


@dataclass
class ModelArguments:
    """What is trained. What is left out stays as the model to start from has it."""

    model_name_or_path: str = field(metadata={"help": "language model or LLaVA to start from"})
    version: str = field(default="v1", metadata={"help": "conversation template"})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP folder or hub name"})
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "hidden state of the tower that is used; -2 for a new one"}
    )
    mm_vision_select_feature: str | None = field(
        default=None, metadata={"help": "patch or cls_patch; patch for a new tower"}
    )
    mm_projector_type: str | None = field(
        default=None, metadata={"help": "kind of the projector; mlp2x_gelu for a new one"}
    )
    mm_patch_merge_type: str | None = field(
        default=None, metadata={"help": "how tiles are joined; flat for a new LLaVA"}
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None, metadata={"help": "file with weights of the projector to start from"}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "freeze the language model"})
    tune_mm_mlp_adapter: bool = field(
        default=False,
        metadata={"help": "train only the projector, and save it as mm_projector.bin too"},
    )
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "freeze the projector"})


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = field(metadata={"help": "JSON array of LLaVA conversations"})
    image_folder: str | None = field(default=None, metadata={"help": "folder of the image files"})
    pixels: str = field(
        default=VIEWER, metadata={"help": f"{PIXELS_HELP}; choices: {', '.join(PIXELS)}"}
    )
    image_aspect_ratio: str | None = field(
        default=None,
        metadata={"help": "pad, square or anyres; by default the model's own, pad for a new LLaVA"},
    )
    feature_file: str | None = field(
        default=None,
        metadata={
            "help": "features.npy of the frozen tower, [images, N, Dv]; replaces image_folder. "
            "Row i belongs to the image whose file name is the number i"
        },
    )
    parallel_turns: float = field(
        default=0.0,
        metadata={
            "help": "share of the samples, 0 to 1, whose turns do not see one another: each "
            "question follows the shared image as if it were the first"
        },
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments with LLaVA's additions and defaults."""

    remove_unused_columns: bool = False
    # Names that LLaVA's scripts use and transformers has dropped.
    eval_strategy: str = field(default="no", metadata={"aliases": ["--evaluation_strategy"]})
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "share of all steps for the warm-up, below 1"}
    )
    model_max_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens kept of a sample; by default the model's own "
            "tokenizer_model_max_length, 2048 for a new LLaVA"
        },
    )
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the projector, if it has its own"}
    )

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1 or self.warmup_steps:
                raise UserInputError(
                    f"--warmup_ratio is {self.warmup_ratio}; give a share of the steps, from 0 to "
                    "below 1, and no --warmup_steps beside it"
                )
            self.warmup_steps = self.warmup_ratio
        super().__post_init__()


class _Parser(transformers.HfArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserInputError(" ".join(message.split()))


def parse_arguments(
    words: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The arguments of a command line, by default this process's.

    Raises:
        UserInputError: unknown or malformed arguments, values that cannot be used, and what LLaVA
            has but is not built here yet.
    """
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments, UnbuiltArguments))
    words = list(sys.argv[1:] if words is None else words)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        raise UserInputError(f"unknown argument {unknown[0]!r}; --help lists all there are")
    check_built(given, parser)
    try:
        model, data, training, _ = parser.parse_args_into_dataclasses(
            words, look_for_args_file=False
        )
    except UserInputError:
        raise
    except Exception as error:  # what transformers refuses shares no base class
        raise UserInputError(f"these arguments cannot be used: {one_line(error)}") from error
    _check_names(model, data, training)
    _check_numbers(training)
    _check_frozen(model, training)
    check_writable(training.output_dir)
    return model, data, training


def _check_names(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    if model.version not in conv_templates:
        raise UserInputError(
            f"unknown template {model.version!r}; --version is one of "
            f"{', '.join(sorted(conv_templates))}"
        )
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


def _check_numbers(training: TrainingArguments) -> None:
    above_zero = (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length"),
        *("num_train_epochs", "save_steps"),
    )
    from_zero = (
        *("dataloader_num_workers", "learning_rate", "mm_projector_lr", "weight_decay"),
        *("seed", "data_seed"),
    )
    for name in (*above_zero, *from_zero):
        value = getattr(training, name)
        # Generators take seeds of 32 bits.
        largest = 2**32 - 1 if name.endswith("seed") else sys.float_info.max
        if value is not None and not (
            0 <= value <= largest and (value > 0 or name not in above_zero)
        ):
            allowed = "above 0" if name in above_zero else "from 0 up"
            raise UserInputError(f"--{name} is {value}; give a number {allowed}")


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
