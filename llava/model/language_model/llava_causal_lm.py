"""What the LLaVAs on all language models share: loading, saving, forward, generate."""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import LogitsProcessorList, PretrainedConfig, PreTrainedModel

from llava.model.between_layers import (
    decoder_setting,
    embeddings_between_layers,
    generating_between_layers,
    passing_between_layers,
    reading_columns,
)
from llava.model.call_context import asking, padding_side, tower_from_checkpoint
from llava.model.checkpoint import (
    KEY_MAPPING,
    TOWER_PREFIX,
    check_loading,
    check_shapes,
    checkpoint_weights,
    local_checkpoint,
    name_in_memory,
    native_name,
    read_config,
)
from llava.model.checks import check_images, check_prompt
from llava.model.config_values import build_config, choose_dtype
from llava.model.generation import (
    check_length,
    check_settings,
    generate_rows,
    read_generation_config,
)
from llava.model.hugging_face import native_form
from llava.model.layouts import MERGE_TYPES
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from llava.model.multimodal_encoder.builder import TOWER_CLASSES, is_portable, read_own_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.types import Images
from llava.pruning.active import holding
from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.lookup import known_classes
from llava.utils import UserInputError
from llava.value_rules import library_errors

logger = logging.getLogger(__name__)


# transformers' own class of a language model or its config follows among the bases of a whole one.
_Transformers: Any = object


class LlavaConfigMixin(_Transformers):
    """LLaVA's `mm_*` keys in a language model's config: they are kept as they are."""

    # Known to the class, so that it can be given when a checkpoint is loaded.
    mm_next_protocol = "native"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, with `rope_theta` also where older readers of config.json look."""
        data = super().to_dict()
        theta = (data.get("rope_parameters") or {}).get("rope_theta")
        return data if theta is None else {**data, "rope_theta": theta}


class LlavaCausalLM(LlavaMetaForCausalLM, _Transformers):
    """What every language model that reads images does; comes before transformers' class.

    Weights on disk carry the names of LLaVA's own files, whatever they are called in memory.

    Attributes:
        base_type: `model_type` of the language model without images.
        inner_class: its layers, with tower and projector.
        undivided: modules whose parts must stay on one device: the tower is called block by block.
    """

    base_type: ClassVar[str]
    inner_class: ClassVar[type[LlavaMetaModel]]
    undivided: ClassVar[tuple[str, ...]] = tuple(tower.__name__ for tower in TOWER_CLASSES)

    def __init__(self, config: PretrainedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.inner_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        supplied: Collection[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint folder (or hub name), or a plain Llama to be made a LLaVA.

        LLaVA's own format and Hugging Face's are told apart by their config and names of weights.

        A tower that the checkpoint holds is loaded with it; otherwise the tower stays without
        weights until `get_vision_tower().load_model()`, which `load_pretrained_model` calls.
        Keyword arguments are those of transformers; `supplied` names weights that the caller
        fills in afterwards, so that the checkpoint may lack them.

        Raises:
            UserInputError: files missing or damaged, another kind of model, weights that do not
                match the config.
        """
        folder = local_checkpoint(str(pretrained_model_name_or_path), kwargs.get("revision"))
        weights = {name_in_memory(k): v for k, v in checkpoint_weights(folder).items()}
        if config is None:
            config, kwargs = native_config(folder, cls, **kwargs)
        torch_dtype = kwargs.pop("torch_dtype", None)  # its older name
        asked = kwargs.pop("dtype", None) or torch_dtype
        kwargs["dtype"] = choose_dtype(asked, config, (v.dtype for v in weights.values()))
        answers = kwargs.pop("generation_config", None) or read_generation_config(folder, config)
        config.name_or_path = str(folder)  # a relative name of a tower refers to it
        tower_config = read_own_tower(config, weights, folder)
        what = f"{str(folder)!r} cannot be loaded"
        remedy = "correct its config.json, or the arguments it is loaded with"
        refusals = library_errors(what, remedy, (ValueError, ImportError, OSError))
        with tower_from_checkpoint(tower_config), refusals:
            if getattr(config, "quantization_config", None) is None:  # else weights are packed
                with torch.device("meta"):
                    check_shapes(cls(config), weights, folder, supplied)
            model, info = super().from_pretrained(
                str(folder),
                *model_args,
                config=config,
                generation_config=answers,
                key_mapping=KEY_MAPPING,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        check_loading(info, folder, supplied)
        model.generation_config = answers  # transformers made a copy, which it would not save
        if tower_config is not None:
            name = config.mm_vision_tower
            logger.info("the vision tower's weights come from %s, not from %r", folder, name)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save under the names of LLaVA's own files.

        The vision tower's weights are written where they came with the checkpoint, where
        `config.unfreeze_mm_vision_tower` says they may have changed, or where the tower was found
        relative to the checkpoint and would not be found from the new folder; a folder with the
        tower's description is then written next to them.
        """
        tower = self._tower_to_save()
        state = self.state_dict() if state_dict is None else state_dict
        named = {}
        for key, value in state.items():
            if tower is not None or not key.startswith(TOWER_PREFIX):
                named[native_name(key)] = value
        # The names are final: transformers would translate them back to its own layout.
        super().save_pretrained(
            save_directory,
            is_main_process=is_main_process,
            state_dict=named,
            save_original_format=False,
            **kwargs,
        )
        if tower is not None and is_main_process and not is_portable(tower):
            tower.save_description(Path(save_directory) / tower.vision_tower_name)

    def _tower_to_save(self) -> VisionTower | None:
        """Return the tower, if its weights belong into a saved model."""
        tower = self.get_vision_tower()
        if tower is None or not tower.is_loaded:
            return None
        unfrozen = bool(getattr(self.config, "unfreeze_mm_vision_tower", False))
        return tower if tower.from_checkpoint or unfrozen or not is_portable(tower) else None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the language model on the merged sequence of text and images.

        Args:
            input_ids: int64 [B, L] with IMAGE_TOKEN_INDEX at every image mark.
            images: see `encode_visual_tokens`; used only without `inputs_embeds`.
            image_sizes: (width, height) of the original images.

        Returns:
            transformers' output; logits have the merged length, which pruning shortens. Where
            tokens are dropped between layers, theirs are those of the last token before them that
            was not.
        """
        layers: AbstractContextManager[None] = nullcontext()
        if inputs_embeds is not None:
            layers = embeddings_between_layers(self, past_key_values)
        else:
            columns: list[VisualColumns] = []
            with holding(self):
                setting = None if images is None else decoder_setting(self)
                with reading_columns(setting, columns, past_key_values):
                    merged = self.prepare_inputs_labels_for_multimodal(
                        input_ids,
                        position_ids,
                        attention_mask,
                        past_key_values,
                        labels,
                        images,
                        image_sizes,
                    )
            input_ids, position_ids, attention_mask, _, inputs_embeds, labels = merged
            layers = passing_between_layers(self, setting, columns, past_key_values)
        if attention_mask is None and position_ids is not None and inputs_embeds is not None:
            # Positions without a mask would be read as several packed sequences.
            attention_mask = position_ids.new_ones(inputs_embeds.shape[:2])
        with layers:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                **kwargs,
            )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        images: Images | None = None,
        image_sizes: list[tuple[int, int]] | None = None,
        *,
        questions: Sequence[str] | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generate text about images, or from text alone.

        Rows are always padded on the left, whatever the config says: a row padded on the right
        would continue from its padding.

        Args:
            inputs: int64 [B, L] prompts with IMAGE_TOKEN_INDEX at every mark (also as
                `input_ids`). Give `attention_mask` where rows are padded.
            images: see `encode_visual_tokens`.
            questions: what each prompt asks, without template and system text; read by pruning
                methods that choose by it, and by nothing else.
            strict: run the rows one by one, so that each is bit for bit what it is alone; in a
                batch, rounding may decide between tokens of nearly equal scores. Sampling still
                draws from the global generator, one row after the other.

        Returns:
            The new tokens only, int64 [B, new], or transformers' dictionary of them.

        Raises:
            NotImplementedError: `inputs_embeds` was given.
            UserInputError: no prompt, ids, masks or images of the wrong kind, or images that do not
                match the marks; settings that cannot be used, or a `max_length`, which counts the
                prompt and its images too, that leaves no room for an answer.
        """
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported; pass ids and images")
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        position_ids = kwargs.pop("position_ids", None)
        attention_mask = kwargs.pop("attention_mask", None)
        check_prompt(input_ids, attention_mask, self.get_input_embeddings().num_embeddings)
        check_images(images)
        kwargs = check_settings(self, kwargs)
        if strict and len(input_ids) > 1:
            kwargs["position_ids"] = position_ids
            return generate_rows(
                self, input_ids, attention_mask, images, image_sizes, questions, **kwargs
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        columns: list[VisualColumns] = []
        with holding(self), padding_side("left"), asking(questions):
            setting = decoder_setting(self)
            with reading_columns(setting, columns, kwargs.get("past_key_values")):
                _, positions, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                    input_ids, position_ids, attention_mask, None, None, images, image_sizes
                )
            if embeds is None:
                # Text goes the same way, so that its rows are padded on the left too.
                positions, mask, embeds, _ = self.splice_visual_tokens(
                    None, input_ids, position_ids, attention_mask
                )
        if positions is not None:
            kwargs["position_ids"] = positions
        check_length(self, kwargs, embeds.shape[1])
        layers = generating_between_layers(self, setting, columns, kwargs)
        what, remedy = "generate cannot run with these arguments", "correct them, or leave them out"
        with layers, library_errors(what, remedy, (ValueError, ImportError)):
            return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Return transformers' processors, with `repetition_penalty` on every new token of a row.

        transformers leaves out as many tokens of a row as it has padding. That is meant for prompts
        of ids, which come before the new tokens; prompts of embeddings do not.
        """
        processors = super()._get_logits_processor(*args, **kwargs)
        for processor in processors:
            if isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor):
                processor.prompt_ignore_length = None
        return processors


def native_config(
    folder: Path, model_class: type[LlavaCausalLM], **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Read the config of a folder for `model_class`, with the type corrected.

    Released checkpoints call their type `llava`, which transformers takes for its own class, so
    the architecture decides and the type is corrected.

    Args:
        folder: of the checkpoint.
        model_class: the LLaVA that it is to be.
        **kwargs: attributes that override those of the file, and other arguments.

    Returns:
        The config, and the keyword arguments that are not attributes of it.

    Raises:
        UserInputError: another architecture, settings of a later LLaVA, values that no model has.
    """
    raw = native_form(read_config(folder), str(folder))
    check_architecture(raw, str(folder), model_class)
    config_class = model_class.config_class
    raw = {k: v for k, v in raw.items() if k not in ("text_config", "vision_config")}
    raw["model_type"] = config_class.model_type
    return build_config(config_class, raw, f"in {str(folder / 'config.json')!r}", **kwargs)


def describes(config: Mapping[str, Any], model_class: type[LlavaCausalLM]) -> bool:
    """Whether a config is that of `model_class`, or of its language model without images."""
    architectures = config.get("architectures") or []
    model_type = config.get("model_type")
    if model_class.__name__ in architectures or model_type == model_class.config_class.model_type:
        return True
    if model_type == "llava" and "mm_vision_tower" in config:
        # Early checkpoints name their type only, and have a Llama language model.
        return not architectures and model_class.base_type == "llama"
    return model_type == model_class.base_type and "text_config" not in config


def check_architecture(
    config: Mapping[str, Any], where: str, model_class: type[LlavaCausalLM]
) -> None:
    """Refuse a config that describes another model.

    Raises:
        UserInputError: names what the checkpoint is and what to use instead.
    """
    if not describes(config, model_class):
        held = ", ".join(config.get("architectures") or ["an unnamed architecture"])
        raise UserInputError(
            f"{where!r} holds {held} (type {config.get('model_type')!r}), as its config.json says, "
            f"not {model_class.__name__}; give a LLaVA with a Llama or Mistral language model, "
            "such as liuhaotian/llava-v1.5-7b or llava-hf/llava-1.5-7b-hf; llava.families.load "
            f"also loads {', '.join(known_classes())}"
        )
    aspect = str(config.get("image_aspect_ratio") or "")
    merge = str(config.get("mm_patch_merge_type") or "flat")
    if (aspect.startswith("anyres") and aspect != "anyres") or merge not in MERGE_TYPES:
        raise UserInputError(
            f"{where!r} is of a LLaVA after 1.6 (image_aspect_ratio {aspect!r}, "
            f"mm_patch_merge_type {merge!r}), which this version does not run; "
            "use a LLaVA-1.5 or 1.6 checkpoint"
        )
