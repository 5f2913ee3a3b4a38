"""Build the model of a training run: what it starts from and what of it trains."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from llava.model.builder import KEPT_MODULES, attach_tokenizer, load_tokenizer, model_class
from llava.model.checkpoint import local_checkpoint, read_config, read_tensors
from llava.model.checks import check_config
from llava.model.hugging_face import native_form
from llava.model.language_model.llava_causal_lm import LlavaCausalLM
from llava.model.prompt_inputs import needed_of_question
from llava.train.arguments import Arguments, ModelArguments, TrainingArguments
from llava.train.lora import add_lora
from llava.train.zero import gathered, zero_stage
from llava.utils import UserInputError, user_path

# Settings of a LLaVA that is made from a language model, where no argument says otherwise.
_NEW_PROJECTOR = "mlp2x_gelu"
_NEW_SETTINGS = {
    "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "tokenizer_padding_side": "right",
}
_MAX_LENGTH = 2048
# Width and height of the canvases of LLaVA-1.6.
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def build_model(args: Arguments) -> tuple[nn.Module, LlavaCausalLM, Any]:
    """Load what a run starts from, mark the parts that train, and add the LoRA that is asked for.

    Returns:
        The model to train, the LLaVA in it (the same without LoRA), and the tokenizer.

    Raises:
        UserInputError: no such model, parts that do not fit together, or settings that training
            cannot serve.
    """
    training = args.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    if training.fp16 and training.deepspeed:  # torch's own scaler wants float32 weights
        dtype = torch.float16
    packed: dict[str, Any] = {}
    if training.bits != 16:
        place = {"": training.device}
        packed = {"quantization_config": _quantization(training, dtype), "device_map": place}
    llava = load_start(args.model, dtype, seed=training.seed, **packed)
    tokenizer = load_tokenizer(local_checkpoint(args.model.model_name_or_path))
    if tokenizer is None:
        raise UserInputError(f"{args.model.model_name_or_path!r} has no tokenizer to train with")
    configure(llava, args)
    add_image_tokens(llava, tokenizer, args.model)
    mark_trained(llava, args.model, quantized=training.bits != 16)
    model = add_lora(llava, args) if training.lora_enable else llava
    return model, llava, tokenizer


def load_start(
    args: ModelArguments, dtype: torch.dtype, seed: int = 0, **packed: Any
) -> LlavaCausalLM:
    """Load a LLaVA, or a language model that becomes one, with tower and projector.

    Args:
        args: name the parts.
        dtype: of all weights that are not packed.
        seed: of a new projector.
        **packed: what transformers needs to quantize the language model.

    Raises:
        UserInputError: no such model, or parts that do not fit together.
    """
    folder = local_checkpoint(args.model_name_or_path)
    cls = model_class(native_form(read_config(folder), str(folder)))
    model: LlavaCausalLM = cls.from_pretrained(folder, dtype=dtype, **packed)
    own_tower = getattr(model.config, "mm_vision_tower", None)
    if args.vision_tower is None and own_tower is None:
        raise UserInputError("the model has no vision tower; give --vision_tower")
    if own_tower is None:
        args = replace(args, mm_projector_type=args.mm_projector_type or _NEW_PROJECTOR)
        model.config.update(_NEW_SETTINGS)
    inner = model.get_model()
    own_projector = getattr(inner, "mm_projector", None)
    _check_tower(model, args)
    with gathered(() if own_projector is None else own_projector.parameters(), write=True):
        inner.initialize_vision_modules(args)
    if own_projector is None and args.pretrain_mm_mlp_adapter is None:
        # Loading draws more or fewer random numbers with ZeRO-3; the start should be the same.
        torch.manual_seed(seed)
        for part in inner.mm_projector.modules():
            if isinstance(part, torch.nn.Linear):
                part.reset_parameters()
    newline = _newline_of(args)
    if newline is not None and hasattr(inner, "image_newline"):
        with gathered([inner.image_newline], write=True), torch.no_grad():
            inner.image_newline.copy_(newline)
    if zero_stage() != 3:  # which casts what it splits
        for part in (inner.vision_tower, inner.mm_projector):
            part.to(device=model.device, dtype=dtype)
        if hasattr(inner, "image_newline"):
            inner.image_newline.data = inner.image_newline.data.to(model.device, dtype)
    return model


def _check_tower(model: LlavaCausalLM, args: ModelArguments) -> None:
    """Refuse to put another tower in the place of one that was trained.

    Raises:
        UserInputError: the model has a trained tower, and another is asked for.
    """
    own = getattr(model.config, "mm_vision_tower", None)
    trained = own is not None and getattr(model.config, "unfreeze_mm_vision_tower", False)
    if trained and args.vision_tower is not None:
        if args.vision_tower.rstrip("/") != str(own).rstrip("/"):
            raise UserInputError(
                f"{args.model_name_or_path!r} holds a vision tower that was trained with it "
                f"({own!r}), which --vision_tower {args.vision_tower} would replace; leave "
                "--vision_tower out"
            )
        args.vision_tower = own


def _newline_of(args: ModelArguments) -> torch.Tensor | None:
    """Return the newline in a projector's file, if it has one."""
    if args.pretrain_mm_mlp_adapter is None:
        return None
    weights = read_tensors(user_path(args.pretrain_mm_mlp_adapter))
    return next((v for key, v in weights.items() if key.endswith("image_newline")), None)


def _quantization(training: TrainingArguments, dtype: torch.dtype) -> BitsAndBytesConfig:
    if training.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT_MODULES))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=training.double_quant,
        bnb_4bit_quant_type=training.quant_type,
        llm_int8_skip_modules=list(KEPT_MODULES),
    )


def configure(model: LlavaCausalLM, args: Arguments) -> None:
    """Write into the config what arguments ask for, and what a new LLaVA needs.

    Raises:
        UserInputError: settings that LLaVA does not have, or that training cannot serve.
    """
    config = model.config
    if args.data.image_aspect_ratio is not None:
        config.image_aspect_ratio = args.data.image_aspect_ratio
    anyres = getattr(config, "image_aspect_ratio", None) == "anyres"
    if anyres and not getattr(config, "image_grid_pinpoints", None):
        config.image_grid_pinpoints = _PINPOINTS
    limit = args.training.model_max_length or getattr(config, "tokenizer_model_max_length", None)
    config.tokenizer_model_max_length = limit or _MAX_LENGTH
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        asked = getattr(args.model, name)
        if asked is not None:
            setattr(config, name, asked)
    if args.model.unfreeze_mm_vision_tower or args.training.lora_vision_tower:
        config.unfreeze_mm_vision_tower = True
    check_config(model)
    own = model.pruning if args.pruning is None else args.pruning.config
    where = "--pruner" if args.pruning else "mm_token_pruning in its config.json"
    if own is not None and own.decoder is not None:
        raise UserInputError(
            f"this model prunes between layers with {own.decoder.method!r} ({where}), which works "
            "at inference only; remove it there, or train with --pruner none"
        )
    if needed_of_question(own, model.get_vision_tower()):
        assert own is not None
        raise UserInputError(
            f"{own.method!r} ({where}) reads the question of a prompt, of which a training sample "
            "has several; use a method that does not, such as zoo"
        )


def add_image_tokens(model: LlavaCausalLM, tokenizer: Any, args: ModelArguments) -> None:
    """Give the vocabulary the tokens for patches and for marks around images that are asked for.

    New rows start as the mean of the others. Marks are read from the projector's file too, where it
    has rows for them.

    Raises:
        UserInputError: under ZeRO-3, where tables cannot grow; rows of another shape.
    """
    config = model.config
    marks = bool(getattr(config, "mm_use_im_start_end", False))
    if not (marks or getattr(config, "mm_use_im_patch_token", False)):
        return
    known = model.get_input_embeddings().num_embeddings
    if zero_stage() == 3:
        raise UserInputError(
            "tokens cannot be added under ZeRO-3 (mm_use_im_start_end, mm_use_im_patch_token); "
            "use scripts/zero2.json"
        )
    attach_tokenizer(model, tokenizer)
    if not (marks and args.pretrain_mm_mlp_adapter):
        return
    file = user_path(args.pretrain_mm_mlp_adapter)
    rows = [v for key, v in read_tensors(file).items() if key.endswith("embed_tokens.weight")]
    if not rows:
        return
    table = model.get_input_embeddings().weight
    new = rows[0][-(len(table) - known) :] if len(table) > known else rows[0][-2:]
    if rows[0].shape[1:] != table.shape[1:] or len(rows[0]) not in (len(table), len(new)):
        raise UserInputError(
            f"{str(file)!r} holds embeddings of shape {list(rows[0].shape)}, the model has "
            f"{list(table.shape)}; give the file that was trained with this language model"
        )
    with torch.no_grad():
        table[-len(new) :] = new.to(table)


def mark_trained(model: LlavaCausalLM, args: ModelArguments, quantized: bool = False) -> None:
    """Mark the parameters that train; with LoRA, `add_lora` follows.

    Args:
        model: with tower and projector.
        args: say what stays frozen.
        quantized: weights of the language model are packed, and cannot train.
    """
    inner = model.get_model()
    tower, only_projector = inner.get_vision_tower(), args.tune_mm_mlp_adapter
    if args.freeze_backbone or only_projector or quantized:
        model.requires_grad_(False)
    inner.mm_projector.requires_grad_(not args.freeze_mm_mlp_adapter)
    if hasattr(inner, "image_newline"):  # belongs to the projector
        inner.image_newline.requires_grad_(not args.freeze_mm_mlp_adapter)
    if only_projector and getattr(model.config, "mm_use_im_start_end", False):
        model.get_input_embeddings().requires_grad_(True)  # the marks are new
    tower.requires_grad_(False)
    if args.unfreeze_mm_vision_tower:
        tower.unfreeze()
