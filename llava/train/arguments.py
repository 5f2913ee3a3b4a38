"""Command-line arguments of ``llava.train.train``, under LLaVA's names."""

from dataclasses import dataclass, field

import transformers

from llava.pixels import PIXELS, PIXELS_HELP, VIEWER


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "language model or LLaVA to start from"})
    version: str = field(default="v1", metadata={"help": "conversation template"})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP folder or hub name"})
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_projector_type: str = "mlp2x_gelu"
    mm_patch_merge_type: str = "flat"
    pretrain_mm_mlp_adapter: str | None = None
    freeze_backbone: bool = field(default=False, metadata={"help": "freeze the language model"})
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "train only the projector"})


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = field(metadata={"help": "JSON array of LLaVA conversations"})
    image_folder: str | None = field(default=None, metadata={"help": "folder of the image files"})
    pixels: str = field(
        default=VIEWER, metadata={"help": f"{PIXELS_HELP}; choices: {', '.join(PIXELS)}"}
    )
    image_aspect_ratio: str = field(default="pad", metadata={"help": "pad or square"})
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
    model_max_length: int = field(default=2048, metadata={"help": "text tokens kept of a sample"})
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "learning rate of the projector, if it has its own"}
    )
