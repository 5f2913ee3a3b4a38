"""Train the projector and the language model of a LLaVA: `python -m llava.train.train`.

LLaVA's arguments and data format on transformers' Trainer. The vision tower stays frozen. What no
argument names stays as the model to start from has it, also in what is saved. A run that finds a
checkpoint in `--output_dir` continues from it.
"""

import sys
import tempfile
from dataclasses import replace

import torch
import transformers

from llava.command_line import CORRECTABLE, explain
from llava.conversation import conv_templates
from llava.model.builder import load_tokenizer, model_class
from llava.model.checkpoint import local_checkpoint, read_config
from llava.model.checks import check_config
from llava.model.hugging_face import native_form
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.prompt_inputs import needed_of_question
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    parse_arguments,
)
from llava.train.checkpoints import find_checkpoint
from llava.train.data import Collator, SupervisedDataset
from llava.train.trainer import LlavaTrainer
from llava.utils import UserInputError
from llava.value_rules import one_line

# Settings of a LLaVA that is made from a language model, where no argument says otherwise.
_NEW_PROJECTOR = "mlp2x_gelu"
_NEW_SETTINGS = {
    "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "tokenizer_padding_side": "right",
}
_MAX_LENGTH = 2048


def build_model(args: ModelArguments, dtype: torch.dtype) -> LlavaCausalLM:
    """Load the model with a frozen tower, and mark the parts that train.

    Raises:
        UserInputError: no such model, or parts that do not fit together.
    """
    folder = local_checkpoint(args.model_name_or_path)
    cls = model_class(native_form(read_config(folder), str(folder)))
    model = cls.from_pretrained(folder, dtype=dtype)
    own_tower = getattr(model.config, "mm_vision_tower", None)
    if args.vision_tower is None and own_tower is None:
        raise UserInputError("the model has no vision tower; give --vision_tower")
    if own_tower is None:
        args = replace(args, mm_projector_type=args.mm_projector_type or _NEW_PROJECTOR)
        model.config.update(_NEW_SETTINGS)
    inner = model.get_model()
    inner.initialize_vision_modules(args)
    if args.freeze_backbone or args.tune_mm_mlp_adapter:
        model.requires_grad_(False)
    inner.mm_projector.requires_grad_(not args.freeze_mm_mlp_adapter)
    inner.get_vision_tower().requires_grad_(False)
    return model


def configure(model: LlavaCausalLM, data: DataArguments, training: TrainingArguments) -> None:
    """Write into the config what arguments ask for, and what a new LLaVA needs.

    Raises:
        UserInputError: settings that LLaVA does not have, or that training lacks.
    """
    config = model.config
    if data.image_aspect_ratio is not None:
        config.image_aspect_ratio = data.image_aspect_ratio
    limit = training.model_max_length or getattr(config, "tokenizer_model_max_length", None)
    config.tokenizer_model_max_length = limit or _MAX_LENGTH
    if getattr(config, "mm_use_im_start_end", False):
        raise UserInputError(
            "this model puts marks around images (mm_use_im_start_end in its config.json), which "
            "is not built yet in training; start from another model"
        )
    check_config(model)
    if needed_of_question(model.pruning, model.get_vision_tower()):
        raise UserInputError(
            f"this model prunes with {model.pruning.method!r} (mm_token_pruning in its "
            "config.json), which reads the question, and that is not built yet in training; remove "
            "mm_token_pruning, or save another method there"
        )


def train() -> None:
    """Parse the command line, train, save to `--output_dir`.

    Raises:
        UserInputError: arguments or data that cannot be used.
    """
    model_args, data_args, args = parse_arguments()
    transformers.set_seed(args.seed)
    model = build_model(model_args, torch.bfloat16 if args.bf16 else torch.float32)
    configure(model, data_args, args)
    _check_generation(model)
    folder = local_checkpoint(model_args.model_name_or_path)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserInputError(f"{model_args.model_name_or_path!r} has no tokenizer to train with")
    dataset = SupervisedDataset(
        data_args,
        tokenizer,
        conv_templates[model_args.version],
        model.get_vision_tower().image_processor,
        model.config,
    )
    trainer = LlavaTrainer(
        model=model,
        base=folder,
        projector_only=model_args.tune_mm_mlp_adapter,
        args=args,
        train_dataset=dataset,
        data_collator=Collator(
            tokenizer.pad_token_id or 0, model.config.tokenizer_model_max_length
        ),
    )
    if len(trainer.get_train_dataloader()) == 0:
        raise UserInputError(
            f"the {len(dataset)} samples do not fill a batch; give more, or a smaller batch, "
            "or leave out --dataloader_drop_last"
        )
    trainer.train(find_checkpoint(args.output_dir, args.resume_from_checkpoint))
    trainer.save_model()
    trainer.save_state()


def _check_generation(model: LlavaCausalLM) -> None:
    """Refuse a generation_config.json that could not be saved after the training."""
    if model.generation_config is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise UserInputError(
                f"the model's generation_config.json cannot be saved again: {one_line(error)}"
            ) from error


def main() -> None:
    """Run `train`; print what the user can correct on one line, with exit code 2."""
    try:
        train()
    except CORRECTABLE as error:
        # A worker of the data loader puts its whole traceback before the message.
        message = explain(error).rpartition(f"{UserInputError.__name__}: ")[2]
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
