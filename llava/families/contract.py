"""The contract between a vision-language model and everything that asks it.

Evaluation, chat and the adapters know models as `VisionLanguageModel` only and never ask which
family one is of:

    prepare -> encode -> place -> prune -> splice -> generate
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from llava.families.deep import DeepFeatures
from llava.families.dialogue import Dialogue
from llava.families.lengths import Limit, PromptLength
from llava.pruning.config import PruningConfig
from llava.pruning.decoder.columns import VisualColumns
from llava.pruning.decoder.layers import DecoderLayers
from llava.pruning.ragged import RaggedTokens
from llava.pruning.tokens import ImageTokens, VisualTokens

# Images that were encoded; ragged where their grids differ.
EncodedImages = VisualTokens | RaggedTokens


@dataclass(frozen=True)
class Picture:
    """One image as a model's processor made it; it can be sent between processes.

    Attributes:
        inputs: the processor's tensors by name.
        size: (width, height) before processing.
    """

    inputs: Mapping[str, Tensor]
    size: tuple[int, int]


@dataclass(frozen=True)
class ModelInputs:
    """A batch of prompts with their images, as the language model reads them.

    Attributes:
        embeds: [B, L, D], padded on the left.
        mask: [B, L], 0 at padding.
        positions: int64 [B, L], or [A, B, L] for A axes; None leaves them to the model.
        deep: visual features for inner layers, where the model has such.
        columns: where visual tokens stand, if the setting that counted prunes between layers.
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor | None = None
    deep: DeepFeatures | None = None
    columns: VisualColumns | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt, without padding."""
        return self.mask.sum(-1).tolist()

    def row(self, number: int) -> ModelInputs:
        """Return prompt `number` alone, without padding."""
        start = int((self.mask[number] == 0).sum())
        rows = slice(number, number + 1)
        positions = None if self.positions is None else self.positions[..., rows, start:]
        deep = None if self.deep is None else self.deep.row(number, start)
        columns = None if self.columns is None else self.columns.row(number, start)
        embeds, mask = self.embeds[rows, start:], self.mask[rows, start:]
        return ModelInputs(embeds, mask, positions, deep, columns)


class VisionLanguageModel(Protocol):
    """A model that is loaded, with all it takes to ask it about images.

    A prompt is a row of ids int64 [L] with IMAGE_TOKEN_INDEX once at the place of every image,
    whatever the family puts there. Images of a batch are numbered in the order of these marks.

    Methods that prune, encode or measure do so under the setting that counts for the caller: that
    of the innermost `with prune(self.model, ...)` block, else `self.pruning`.

    Attributes:
        model: transformers' model: `generation_config`, `device`, `dtype`, `config`.
        tokenizer: decodes answers.
        name: what the model is called.
        own_pruning: the setting that the checkpoint was saved with.
        pruning: the setting that counts for the caller; assigning changes the default of all.
        roles: what user and model are called in a chat.
        limits: of the model's context, the lowest first.
    """

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def name(self) -> str: ...
    @property
    def own_pruning(self) -> PruningConfig | None: ...
    @property
    def pruning(self) -> PruningConfig | None: ...
    @pruning.setter
    def pruning(self, value: PruningConfig | None) -> None: ...
    @property
    def roles(self) -> tuple[str, str]: ...
    @property
    def limits(self) -> list[Limit]: ...

    @property
    def prepare(self) -> Callable[[Image.Image], Picture]:
        """What makes a `Picture` of an image; it can be pickled and holds no weights.

        Raises (when called):
            PictureError: this image cannot be shown.
            UserInputError: no image can be, as the model's config stands.
        """

    def encode(
        self, pictures: Sequence[Picture], needs: Iterable[str] | None = None
    ) -> EncodedImages:
        """Encode images.

        Args:
            pictures: at least one.
            needs: names of what to collect beyond embeddings, see `VisualTokens.extras`; None for
                what the setting that counts asks for.
        """

    def decoder_layers(self) -> DecoderLayers:
        """Return the layers of the language model, between which tokens can be dropped.

        Raises:
            PruningError: they cannot be dropped there.
        """

    def reads_question(self, config: PruningConfig | None) -> bool:
        """Return whether a setting reads the question on this model."""

    def with_questions(self, visual: EncodedImages, questions: Sequence[str]) -> EncodedImages:
        """Add what the setting that counts reads of a question, one for each image."""

    def place(
        self, visual: EncodedImages, rows: Sequence[Tensor], questions: Sequence[str] | None = None
    ) -> EncodedImages:
        """Add what prompts say of their images: their room, places, and what is asked.

        Args:
            visual: encoded images in the order of the marks.
            rows: the prompts.
            questions: what each prompt asks, the user's words alone; needed where they are read.
        """

    def prune(self, visual: EncodedImages) -> ImageTokens:
        """Keep the tokens that the setting that counts keeps."""

    def render(self, dialogue: Dialogue) -> str:
        """Write a dialogue in the model's template, for people to read; marks are `<image>`."""

    def row(self, dialogue: Dialogue) -> Tensor:
        """Return the ids [L] of a dialogue in the model's template, on the model's device."""

    def measure(
        self, row: Tensor, pictures: Sequence[Picture], *, give_way: bool = False
    ) -> PromptLength:
        """Count the tokens of a prompt with its images; nothing is encoded.

        Args:
            row: the prompt.
            pictures: its images.
            give_way: count as `answer` does, where pruned images keep fewer tokens in a prompt of
                limited length; by default as the setting says.
        """

    def splice(self, visual: ImageTokens | None, rows: Sequence[Tensor]) -> ModelInputs:
        """Put images into prompts; None for prompts without any.

        Raises:
            UserInputError: a check that was left to this moment found NaN or inf.
        """

    def generate(self, inputs: ModelInputs, **settings: Any) -> Tensor:
        """Continue prompts with transformers' `generate` and return the new tokens, [B, new]."""

    def answer(
        self,
        rows: Sequence[Tensor],
        pictures: Sequence[Picture],
        questions: Sequence[str],
        *,
        strict: bool = False,
        **settings: Any,
    ) -> Tensor:
        """Do all steps in one call, those of `llava.model.call_context.steps_run_by` included.

        Args:
            rows: the prompts.
            pictures: their images in the order of the marks.
            questions: what each prompt asks, the user's words alone.
            strict: run the prompts one by one.
            **settings: of `generate`.

        Returns:
            The new tokens, int64 [B, new].
        """
