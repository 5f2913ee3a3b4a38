"""Say what a training run would do, without building its model: `--dry_run`."""

import math
from pathlib import Path
from typing import Any, get_args

import huggingface_hub

from llava.model.builder import load_tokenizer
from llava.model.checkpoint import checkpoint_here, read_config, read_json_object
from llava.train.arguments import Arguments
from llava.train.memory import GIB, ZEROS, Shape, Stage, Zero, estimate, possible
from llava.train.samples import Sample, read_samples
from llava.utils import UserInputError, user_path
from llava.value_rules import one_line

_MAX_LENGTH = 2048


def plan(args: Arguments) -> str:
    """Check the files of a run and describe it, one fact a line.

    Raises:
        UserInputError: files that are missing or cannot be used.
    """
    config = start_config(args.model.model_name_or_path)
    folder = checkpoint_here(args.model.model_name_or_path)
    if folder is not None and load_tokenizer(folder) is None:
        raise UserInputError(f"{args.model.model_name_or_path!r} has no tokenizer to train with")
    samples = read_samples(args.data.data_path, {} if args.data.skip_bad_samples else None)
    _check_images(args, samples)
    for file in (args.model.pretrain_mm_mlp_adapter, args.training.lora_weight_path):
        if file is not None and not user_path(file).exists():
            raise UserInputError(f"{file} does not exist; check the path")
    gpus = args.training.dry_run_gpus or args.training.world_size
    rows = {
        "start": _start(args, config),
        "trains": trained_parts(args),
        "pruning": _pruning(args),
        "data": _data(samples),
        **_steps(args, len(samples), gpus),
        "DeepSpeed": str(args.training.deepspeed or "no"),
        "memory": _memory(args, config, gpus),
        "output": args.training.output_dir,
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def start_config(name: str) -> dict[str, Any]:
    """Read the config.json that a run starts from; of a model on the hub, nothing else is fetched.

    Raises:
        UserInputError: there is none.
    """
    folder = checkpoint_here(name)
    if folder is not None:
        return read_config(folder)
    try:
        return read_json_object(Path(huggingface_hub.hf_hub_download(name, "config.json")))
    except Exception as error:  # what the hub's client raises shares no base class
        raise UserInputError(
            f"{name!r} is not a folder here, and the hub did not return its config.json: "
            f"{one_line(error)}"
        ) from error


def trained_parts(args: Arguments) -> str:
    """Name the parts of the model that train."""
    model, training = args.model, args.training
    parts = [] if model.freeze_mm_mlp_adapter else ["projector"]
    if training.lora_enable:
        over = "" if training.bits == 16 else f" over {training.bits} bits"
        where = "language model and tower" if training.lora_vision_tower else "language model"
        parts.append(f"LoRA of rank {training.lora_r} on the {where}{over}")
    elif not (model.freeze_backbone or model.tune_mm_mlp_adapter):
        parts.append("language model")
    if model.unfreeze_mm_vision_tower:
        parts.append("vision tower")
    return ", ".join(parts)


def _start(args: Arguments, config: dict[str, Any]) -> str:
    name, projector = args.model.model_name_or_path, args.model.pretrain_mm_mlp_adapter
    kind = "a language model"
    if "mm_vision_tower" in config or "vision_config" in config:
        kind = "a LLaVA"
    elif args.model.vision_tower is None:
        raise UserInputError("the model has no vision tower; give --vision_tower")
    own = "its own projector" if kind == "a LLaVA" else "a new projector"
    return f"{name} ({kind}), {f'projector of {projector}' if projector else own}"


def _pruning(args: Arguments) -> str:
    pruning = args.pruning
    if pruning is None:
        return "as saved in the model, else none"
    if pruning.tokens is not None:
        low, high = pruning.tokens
        return f"{pruning.config.method}, {low} to {high} tokens drawn for every batch"
    config = pruning.config
    kept = config.keep_ratio if config.keep_tokens is None else f"{config.keep_tokens} tokens"
    return f"{config.method}, {kept}"


def _check_images(args: Arguments, samples: list[Sample]) -> None:
    """Look for every image of the samples."""
    if args.data.feature_file is not None or not any(sample.images for sample in samples):
        return
    if args.data.image_folder is None:
        raise UserInputError("the samples name images; give --image_folder or --feature_file")
    folder = user_path(args.data.image_folder)
    owners = {image: sample.name for sample in samples for image in sample.images}
    missing = [image for image in owners if not (folder / image).is_file()]
    if missing and not args.data.skip_bad_samples:
        raise UserInputError(
            f"{len(missing)} of {len(owners)} images are not in --image_folder {folder}; the first "
            f"is {missing[0]!r} of {owners[missing[0]]}"
        )


def _data(samples: list[Sample]) -> str:
    counts = [len(sample.images) for sample in samples]
    several = sum(count > 1 for count in counts)
    return (
        f"{len(samples)} samples, {counts.count(0)} of them without an image, {several} with "
        "several"
    )


def _steps(args: Arguments, samples: int, gpus: int) -> dict[str, str]:
    """Count as transformers' trainer does: the last, smaller batch of an epoch is a step too."""
    training = args.training
    at_once, parts = training.per_device_train_batch_size, training.gradient_accumulation_steps
    epoch = max(1, math.ceil(math.ceil(samples / (at_once * gpus)) / parts))
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * epoch)
    warm = training.get_warmup_steps(steps)
    return {
        "batch": f"{gpus * at_once * parts}: {at_once} on each GPU, GPUs: {gpus}, accumulated: "
        f"{parts}",
        "steps": f"{steps} ({epoch} an epoch), the first {warm} to warm up, rate "
        f"{training.learning_rate:g}",
    }


def _memory(args: Arguments, config: dict[str, Any], gpus: int) -> str:
    """Estimate GiB on a GPU under every division, for rows as long as the limit."""
    training = args.training
    stage: Stage = "pretrain" if args.model.tune_mm_mlp_adapter else "finetune"
    if training.lora_enable:
        stage = "lora" if training.bits == 16 else "qlora"
    limit = training.model_max_length or config.get("tokenizer_model_max_length") or _MAX_LENGTH
    shape = Shape.of(config.get("text_config", config))
    figures = {
        zero: estimate(
            shape,
            stage,
            zero,
            gpus,
            limit * training.per_device_train_batch_size,
            rank=training.lora_r,
            tower=args.model.unfreeze_mm_vision_tower,
            checkpointing=bool(training.gradient_checkpointing),
        ).total
        for zero in get_args(Zero)
        if possible(stage, zero)
    }
    told = ", ".join(f"{ZEROS[zero]} {size / GIB:.1f}" for zero, size in figures.items())
    return f"GiB on each GPU, computed for rows of {limit} tokens: {told}"
