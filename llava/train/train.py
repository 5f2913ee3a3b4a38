"""Train a LLaVA on conversations about images: `python -m llava.train.train`.

LLaVA's arguments and data format on transformers' Trainer. Projector and language model train,
unless arguments say otherwise. What no argument names stays as the model to start from has it, also
in what is saved. A run that finds a checkpoint in `--output_dir` continues from it.
"""

import os
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import transformers

from llava.command_line import CORRECTABLE, explain
from llava.conversation import conv_templates
from llava.model.checkpoint import local_checkpoint
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.train.arguments import parse_arguments, renamed
from llava.train.checkpoints import find_checkpoint
from llava.train.data import Collator, SupervisedDataset
from llava.train.launch import wait_to_be_ended
from llava.train.parts import build_model
from llava.train.plan import plan
from llava.train.skipped import write_skipped
from llava.train.trainer import LlavaTrainer
from llava.utils import UserInputError, user_path
from llava.value_rules import one_line


def train() -> None:
    """Parse the command line, train, save to `--output_dir`.

    Raises:
        UserInputError: arguments or data that cannot be used.
    """
    arguments = parse_arguments()
    args = arguments.training
    notice = renamed(sys.argv[1:])
    if notice and args.process_index == 0:
        print(f"note: {notice}", file=sys.stderr)
    if args.n_gpu > 1:
        raise UserInputError(
            f"one process sees {args.n_gpu} GPUs; start one for each with torchrun or deepspeed, "
            "or set CUDA_VISIBLE_DEVICES=0"
        )
    if args.cache_dir is not None:
        use_cache_dir(args.cache_dir)
    if args.dry_run:
        print(plan(arguments))
        return
    transformers.set_seed(args.seed)
    model, llava, tokenizer = build_model(arguments)
    tower = llava.get_vision_tower()
    assert tower is not None and args.output_dir is not None
    _check_generation(llava)
    dataset = SupervisedDataset(
        arguments.data,
        tokenizer,
        conv_templates[arguments.model.version],
        tower.image_processor,
        llava.config,
    )
    if not arguments.data.is_multimodal and any(sample.images for sample in dataset.samples):
        raise UserInputError(
            "--is_multimodal False, but samples have images; leave it out to train on them"
        )
    trainer = LlavaTrainer(
        model=model,
        base=local_checkpoint(arguments.model.model_name_or_path),
        projector_only=arguments.model.tune_mm_mlp_adapter,
        pruning=arguments.pruning,
        merge_options={
            "packing": arguments.data.pack_samples,
            "cached": arguments.data.feature_file is not None,
            "skipping": arguments.data.skip_bad_samples,
        },
        args=args,
        train_dataset=dataset,
        data_collator=Collator(
            tokenizer.pad_token_id or 0, llava.config.tokenizer_model_max_length
        ),
    )
    if len(trainer.get_train_dataloader()) == 0:
        raise UserInputError(
            f"the {len(dataset)} samples do not fill a batch; give more, or a smaller batch, "
            "or leave out --dataloader_drop_last"
        )
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    trainer.train(checkpoint)
    trainer.save_model()
    trainer.save_state()
    if arguments.data.skip_bad_samples:
        skipped = dataset.skipped()  # of all processes
        if trainer.is_world_process_zero():
            write_skipped(skipped, Path(args.output_dir), goes_on=checkpoint is not None)


def use_cache_dir(folder: str) -> None:
    """Keep models of the hub in another folder, in this process and those it starts."""
    os.environ["HF_HUB_CACHE"] = huggingface_hub.constants.HF_HUB_CACHE = str(user_path(folder))


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
        wait_to_be_ended(first_says=True)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        wait_to_be_ended(first_says=False)
        raise


if __name__ == "__main__":
    main()
