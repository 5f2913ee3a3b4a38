"""What makes a language model a LLaVA: encode images, prune their tokens, splice them into text.

    images -> encode_visual_tokens -> prune_visual_tokens -> splice_visual_tokens -> embeddings

Each step is a method that may be called, replaced or patched alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.anyres import unpad_image
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.call_context import call_context
from llava.model.checks import check_ids, check_prompt
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.vision_tower import VisionTower
from llava.model.multimodal_projector.builder import build_vision_projector, load_projector
from llava.model.prompt_inputs import add_prompts, add_questions
from llava.model.splice import cut_rows, pad_rows, splice_prompts, unpadded, visual_columns
from llava.model.types import Images
from llava.model.vision_inputs import encode, for_projector, tower_of
from llava.pruning.active import Prunable, holding, record
from llava.pruning.config import PruningConfig
from llava.pruning.stage import prune_visual_tokens
from llava.pruning.tokens import ImageTokens, VisualTokens
from llava.utils import UserInputError

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image"]

# What LLaVA takes where neither the arguments nor the model say it.
_VISION_DEFAULTS = {
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_projector_type": "linear",
}


class LlavaMetaModel:
    """Mixin of the inner model: owns vision tower, projector and LLaVA-1.6's newline."""

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower = build_vision_tower(config, delay_load=True)
            tower_config = call_context().tower_config
            if getattr(config, "mm_hidden_size", None) is None:  # as in early checkpoints
                config.mm_hidden_size = (tower_config or self.vision_tower).hidden_size
            self.mm_projector = build_vision_projector(config)
            if tower_config is not None:
                self.vision_tower.build(tower_config)
            if "unpad" in (getattr(config, "mm_patch_merge_type", None) or ""):
                self.add_newline()

    def add_newline(self) -> None:
        """Add the embedding that ends a row of patches: `image_newline` [D], to be learnt."""
        size = self.config.hidden_size
        self.image_newline = nn.Parameter(torch.randn(size) * size**-0.5)

    def get_vision_tower(self) -> VisionTower | None:
        return getattr(self, "vision_tower", None)

    def initialize_vision_modules(self, model_args: Any) -> None:
        """Attach a tower and a projector to a language model, before training.

        What is left out, or None, stays as the model has it.

        Args:
            model_args: LLaVA's model arguments: `vision_tower`, `mm_vision_select_layer`,
                `mm_vision_select_feature`, `mm_projector_type`, `mm_patch_merge_type`,
                `pretrain_mm_mlp_adapter` (a file whose keys contain `mm_projector.`).

        Raises:
            UserInputError: a projector of another type, or for another tower, than the model has.
        """
        config = self.config
        given = {
            "mm_vision_tower": getattr(model_args, "vision_tower", None),
            **{name: getattr(model_args, name, None) for name in _VISION_DEFAULTS},
        }
        has_projector = getattr(self, "mm_projector", None) is not None
        own = getattr(config, "mm_projector_type", None) or "linear"
        if has_projector and given["mm_projector_type"] not in (None, own):
            raise UserInputError(
                f"the model has a projector of type {own!r}, not {given['mm_projector_type']!r}; "
                "leave mm_projector_type out, or start from the language model"
            )
        for name, value in given.items():
            if value is None:
                value = getattr(config, name, None)
            setattr(config, name, _VISION_DEFAULTS.get(name) if value is None else value)
        config.use_mm_proj = True
        tower = self.get_vision_tower()
        if tower is None or tower.vision_tower_name != config.mm_vision_tower:
            self.vision_tower = build_vision_tower(config, delay_load=True)
        self.vision_tower.select_layer = config.mm_vision_select_layer
        self.vision_tower.select_feature = config.mm_vision_select_feature
        self.vision_tower.load_model()
        width = self.vision_tower.hidden_size
        if has_projector and getattr(config, "mm_hidden_size", width) != width:
            raise UserInputError(
                f"the vision tower {config.mm_vision_tower!r} has features of width {width}, but "
                f"the model's projector takes {config.mm_hidden_size}; give the model's own tower, "
                "or start from the language model"
            )
        config.mm_hidden_size = width
        if not has_projector:
            self.mm_projector = build_vision_projector(config)
        self.mm_projector.requires_grad_(True)
        has_newline = hasattr(self, "image_newline")
        if "unpad" in config.mm_patch_merge_type and not has_newline:
            self.add_newline()
        elif "unpad" not in config.mm_patch_merge_type and has_newline:
            del self.image_newline  # the saved model would have no place for it
        adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
        if adapter is not None:
            load_projector(self.mm_projector, Path(adapter))


class LlavaMetaForCausalLM(Prunable):
    """Mixin of the causal language model: the way from images and ids to embeddings.

    Attributes:
        text_tokenizer: the language model's tokenizer, for methods that read the question.
    """

    # Of transformers' class, which follows this one among the bases.
    config: Any
    generation_config: Any
    device: torch.device
    model: Any

    text_tokenizer: Any = None

    def get_model(self) -> Any:
        return self.model

    def get_vision_tower(self) -> VisionTower | None:
        return self.get_model().get_vision_tower()

    @property
    def default_pruning(self) -> PruningConfig | None:
        """The setting `model.pruning` outside of `prune` blocks: what is saved with the model.

        Stored as plain JSON in `config.mm_token_pruning`. Accepts a PruningConfig, its dict form,
        or None for the unpruned model.
        """
        settings = getattr(self.config, "mm_token_pruning", None)
        return None if settings is None else PruningConfig.from_dict(settings)

    @default_pruning.setter
    def default_pruning(self, value: PruningConfig | Mapping[str, Any] | None) -> None:
        config = PruningConfig.read(value)
        self.config.mm_token_pruning = None if config is None else config.to_dict()

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Turn pixels [B, 3, H, W] into embeddings [B, N, hidden_size].

        LLaVA's method, which forks replace: `encode_visual_tokens` then uses theirs.
        """
        projector = self.get_model().mm_projector
        return projector(for_projector(projector, tower_of(self)(images)))

    # Stays LLaVA's own where a fork replaces `encode_images`.
    own_encode_images = encode_images

    def encode_visual_tokens(
        self,
        images: Images,
        image_sizes: list[tuple[int, int]] | None = None,
        needs: Iterable[str] | None = None,
    ) -> VisualTokens:
        """Encode every tile of every image once.

        Args:
            images: pixels [B, 3, H, W] (one tile an image), [B, T, 3, H, W], or a list of
                [3, H, W] or [T, 3, H, W]. Tower features that were computed before are taken
                too, as [B, N, mm_hidden_size] or a list of [N, mm_hidden_size]: the tower is
                frozen, so a trainer may run it once.
            image_sizes: (width, height) of all original images. Tiles are arranged by them
                (`spatial`, `spatial_unpad`); images of one tile need them only for pictures of
                what was kept and for methods that leave the square's padding out.
            needs: what to collect beyond features and embeddings, by the names that methods put
                into their `needs`; by default what the active method asks for.

        Returns:
            VisualTokens, flat over tiles: features [T, N, Dv], projected [T, N, D].

        Raises:
            UserInputError: shapes that are none of these, `image_sizes` that are not one pair for
                each image or that the tiles do not fit, features computed before where the
                method needs more of the tower, and NaN or inf wherever it comes from.
        """
        return encode(self, images, image_sizes, needs)

    def with_questions(self, visual: VisualTokens, questions: Sequence[str]) -> VisualTokens:
        """Add what the active method reads of a question; nothing else is computed.

        Args:
            visual: encoded images.
            questions: what is asked of each image, the user's words alone.

        Raises:
            UserInputError: another number of questions than images, or the model lacks the text
                tower or the tokenizer that the method needs.
        """
        return add_questions(self, visual, questions)

    def prune_visual_tokens(self, visual: VisualTokens) -> ImageTokens:
        """Keep the tokens that the active settings keep; without settings nothing changes."""
        pruned = prune_visual_tokens(visual, self.pruning)
        record(self, pruned)
        return pruned

    def splice_visual_tokens(
        self,
        visual: ImageTokens | None,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Insert visual tokens at the image marks of a batch.

        Rows are freed of padding, spliced, cut to `tokenizer_model_max_length` (with a warning)
        and padded again with zero embeddings on `tokenizer_padding_side`.

        Args:
            visual: encoded, perhaps pruned images in the order of the marks; None for text only.
            input_ids: int64 [B, L] with IMAGE_TOKEN_INDEX at every mark.
            position_ids, attention_mask, labels: [B, L] or None.

        Returns:
            position_ids, attention_mask, inputs_embeds [B, L', D], labels; each of the others is
            None where the caller gave None, and the mask keeps the caller's dtype. With
            `positions="original"` position_ids and attention_mask are always returned.

        Raises:
            UserInputError: a check that was left to this moment found NaN or inf.
        """
        if visual is not None:
            visual.settle()
        rows = unpadded(input_ids, attention_mask)
        targets = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        embed = self.get_model().embed_tokens
        merged = splice_prompts(visual, rows, unpadded(targets, attention_mask), embed)
        config = self.config
        merged = cut_rows(merged, rows, getattr(config, "tokenizer_model_max_length", None))
        own_side = getattr(config, "tokenizer_padding_side", "right")
        side = call_context().padding_side or own_side
        batch, batch_mask = pad_rows(merged, side)
        if (columns := call_context().columns) is not None:
            columns.append(visual_columns(visual, rows, merged, side))
        original = visual is not None and visual.original_positions
        positions = batch.positions if original else _as_given(batch.positions, position_ids)
        implied = original and attention_mask is None
        mask = batch_mask if implied else _as_given(batch_mask, attention_mask)
        return positions, mask, batch.embeds, _as_given(batch.labels, labels)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Any,
        labels: torch.Tensor | None,
        images: Images | None,
        image_sizes: list[tuple[int, int]] | None = None,
    ) -> tuple[Any, Any, Any, Any, torch.Tensor | None, Any]:
        """Replace ids with embeddings that contain the images.

        Without a tower, without images, and in a decoding step (one token that is no image mark)
        everything passes through and the embeddings are None.

        Returns:
            (None or input_ids, position_ids, attention_mask, past_key_values, inputs_embeds or
            None, labels), with all lengths those of the merged sequence.

        Raises:
            UserInputError: image marks without images, another number of images than marks, or
                tensors of the wrong kind.
        """
        input_ids = check_ids(input_ids)
        decoding = input_ids.shape[1] == 1 and not bool((input_ids == IMAGE_TOKEN_INDEX).any())
        if self.get_vision_tower() is None or images is None or decoding:
            if not decoding and bool((input_ids == IMAGE_TOKEN_INDEX).any()):
                raise UserInputError(
                    "the prompt has an <image> mark but no image can be shown: pass images=, and "
                    "use a model with a vision tower"
                )
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        check_prompt(
            input_ids,
            attention_mask,
            self.get_model().embed_tokens.num_embeddings,
            labels=labels,
            position_ids=position_ids,
        )
        runner = call_context().run_step

        def run(name: str, step: Callable[..., Any], *arguments: Any) -> Any:
            return step(*arguments) if runner is None else runner(name, step, *arguments)

        # One setting for all steps, also if another thread changes the model's default meanwhile.
        with holding(self):
            visual = run("encode", self.encode_visual_tokens, images, image_sizes)
            visual = add_prompts(self, visual, unpadded(input_ids, attention_mask))
            visual = run("prune", self.prune_visual_tokens, visual)
        position_ids, attention_mask, inputs_embeds, labels = self.splice_visual_tokens(
            visual, input_ids, position_ids, attention_mask, labels
        )
        return None, position_ids, attention_mask, past_key_values, inputs_embeds, labels


def _as_given(value: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
    """Return a value in the type that the caller gave it in; None where it was not given."""
    return None if given is None else value.to(given.dtype)
