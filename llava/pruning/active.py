"""The setting that prunes a call: the model's default, or that of a `with prune(...)` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava.pruning.config import PruningConfig
from llava.pruning.decoder.trace import DecoderTrace
from llava.pruning.errors import PruningError
from llava.pruning.layout import ImageLayout
from llava.pruning.lookup import family_of, known_classes, unwrapped
from llava.pruning.tokens import ImageTokens
from llava.pruning.trace import PruningTrace
from llava.pruning.visualize import overlay_tokens

Locate = Callable[[ImageLayout, tuple[int, int]], ImageLayout]


@dataclass
class PruningRun:
    """What a `with prune(...) as run` block does.

    Attributes:
        config: the setting of the block; None where it switches pruning off.
        tokens: of the last call that pruned images: what was left of each, without embeddings.
        locate: completes the layout of an image of (width, height) pixels, where the model does
            not know the size of what it sees.
        decoder_trace: what the last call that pruned between layers dropped there.
    """

    config: PruningConfig | None
    tokens: ImageTokens | None = None
    locate: Locate | None = None
    decoder_trace: DecoderTrace | None = None

    @property
    def trace(self) -> PruningTrace | None:
        """What the stage did in the last call that pruned; None before, and if it cut nothing.

        That is so with a decoder method alone: what it dropped is in `decoder_trace`.
        """
        return None if self.tokens is None else self.tokens.trace

    def overlay(self, image: Image.Image, index: int = 0, *, dim: float = 0.25) -> Image.Image:
        """Dim everything of a picture that the tokens kept of it in the last call do not show.

        Args:
            image: the picture at its original size.
            index: which image of the call it was.
            dim: brightness of what was dropped, 0 is black.

        Returns:
            An RGB image of the same size.

        Raises:
            PruningError: no call has seen an image yet, or the tokens show no part of it, see
                `llava.pruning.visualize.kept_pixels`.
        """
        if self.tokens is None:
            raise PruningError(
                "nothing was pruned inside this block yet; call model.generate or model(...) with "
                "an image first"
            )
        layout = self.tokens.layout_of(index)
        if layout is not None and self.locate is not None:
            layout = self.locate(layout, image.size)
            if layout.base_box is None:
                raise PruningError(
                    "this model does not tell where its tiles lie in the picture, so no overlay "
                    "can be drawn; have the processor make one tile of the image"
                )
        return overlay_tokens(image, self.tokens, index, dim=dim, layout=layout)


@dataclass(eq=False)
class _Block:
    """A `with prune(...)` block: its model, its run, and whether it has ended."""

    target: Prunable
    run: PruningRun
    ended: bool = False


# The blocks around the caller, outermost first. A context that was copied inside a block keeps it
# after its end, where it no longer counts.
_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("pruning_blocks", default=())


class Prunable:
    """A model that `prune` works on, or what stands for one.

    Attributes:
        default_pruning: the setting of callers outside any block. Subclasses decide where to store
            it.
    """

    default_pruning: PruningConfig | None = None

    @property
    def prunable(self) -> Prunable:
        """The model itself, also through a wrapper that passes attributes on, such as PEFT's."""
        return self

    @property
    def pruning(self) -> PruningConfig | None:
        """The setting that applies to the caller; assigning changes the default of all callers."""
        run = current_run(self)
        return self.default_pruning if run is None else run.config

    @pruning.setter
    def pruning(self, value: PruningConfig | None) -> None:
        self.default_pruning = value

    @property
    def saved_pruning(self) -> PruningConfig | None:
        """The setting that the model was saved with."""
        return self.default_pruning

    def installed(self) -> AbstractContextManager[None]:
        """Make calls of the model prune inside, where they do not by themselves."""
        return nullcontext()

    def stay_installed(self, on: bool) -> None:
        """Make calls of the model prune from now on, or no longer, as `installed` does inside."""


def current_run(target: Prunable) -> PruningRun | None:
    """Return the run of the innermost block around the caller; None outside any."""
    for block in reversed(_blocks.get()):
        if block.target is target and not block.ended:
            return block.run
    return None


def record(target: Prunable, tokens: ImageTokens, locate: Locate | None = None) -> None:
    """Tell the run of the innermost block what a call left of its images."""
    run = current_run(target)
    if run is not None:
        run.tokens, run.locate = tokens.without_embeddings(), locate


def record_decoder(target: Prunable, trace: DecoderTrace) -> None:
    """Tell the run of the innermost block what a call dropped between layers."""
    run = current_run(target)
    if run is not None:
        run.decoder_trace = trace


def find_prunable(model: Any) -> Prunable:
    """Return what prunes a model.

    Raises:
        PruningError: nothing does.
    """
    own = getattr(model, "prunable", None)
    if isinstance(own, Prunable):
        return own
    model = unwrapped(model)
    family = family_of(model)
    if family is None:
        raise PruningError(
            f"{type(model).__name__} is not a model that can be pruned; load the model with "
            "llava.model.builder.load_pretrained_model, or use one of transformers' classes "
            f"{', '.join(known_classes())} (others through an entry point `llava.families`)"
        )
    target: Prunable = family.attachment(model)
    return target


def read_setting(
    config: PruningConfig | Mapping[str, Any] | str | None, settings: Mapping[str, Any]
) -> PruningConfig | None:
    """Read a setting as `prune` and `attach` take it.

    Raises:
        PruningError: the settings are wrong.
    """
    if isinstance(config, str):
        return PruningConfig.of(config, **settings)
    if settings:
        words = ", ".join(sorted(settings))
        raise PruningError(f"{words}: settings go with a method name, prune(model, 'zoo', ...)")
    return PruningConfig.read(config)


@contextmanager
def prune(
    model: Any, config: PruningConfig | Mapping[str, Any] | str | None = None, **settings: Any
) -> Iterator[PruningRun]:
    """Prune inside the block: `with prune(model, "zoo", keep_tokens=64): model.generate(...)`.

    The setting is the caller's own: other threads and tasks that use the model do not see it, and
    the model's default stays as it is. Like `torch.no_grad`, it does not reach into a thread that
    is started inside (`contextvars.copy_context().run` takes it along, until the block ends).
    Blocks nest; the innermost applies. `prune(model)` switches pruning off inside the block. A
    generator that yields inside a block leaves the block on for its caller until it continues.

    Args:
        model: one of this package's models, or one of transformers' classes that
            `llava.families` knows, see docs/families.md; also inside PEFT or a compiled module.
        config: a PruningConfig, its dict form, or a method name with budget and options in
            `settings`.

    Yields:
        The run: its `config`, and after a call its `trace` and `overlay(image)`.

    Raises:
        PruningError: the model cannot be pruned, or the settings are wrong.
    """
    target = find_prunable(model)
    run = PruningRun(read_setting(config, settings))
    with target.installed(), _entered(target, run):
        yield run


@contextmanager
def holding(target: Any) -> Iterator[None]:
    """Hold the setting that counts for the caller, though others change the model's default."""
    run = current_run(target)
    with _entered(target, PruningRun(target.default_pruning) if run is None else run):
        yield


@contextmanager
def _entered(target: Prunable, run: PruningRun) -> Iterator[None]:
    own = _Block(target, run)
    _blocks.set((*_blocks.get(), own))
    try:
        yield
    finally:
        own.ended = True
        # Generators may end in another order than they began, or in another thread.
        _blocks.set(tuple(block for block in _blocks.get() if block is not own))


def attach(
    model: Any, config: PruningConfig | Mapping[str, Any] | str | None = None, **settings: Any
) -> None:
    """Let a model prune every call from now on, and say so in its config, which is saved with it.

    Args:
        model, config, settings: as in `prune`. Without a config the one that the model's own config
            was saved with.

    Raises:
        PruningError: the model cannot be pruned, the settings are wrong, or none were saved.
    """
    target = find_prunable(model)
    setting = read_setting(config, settings) or target.saved_pruning
    if setting is None:
        raise PruningError(
            "this model was saved without a pruning setting; give one, such as "
            "attach(model, 'zoo', keep_tokens=64)"
        )
    target.default_pruning = setting
    target.stay_installed(True)


def detach(model: Any) -> None:
    """Undo `attach`: the model prunes inside `prune` blocks alone, its config names no setting.

    Raises:
        PruningError: the model cannot be pruned at all.
    """
    target = find_prunable(model)
    target.default_pruning = None
    target.stay_installed(False)
