"""The base class of all methods: what a method declares, and what it gets for free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava.pruning.errors import PruningError
from llava.pruning.selection.picks import Picks
from llava.pruning.tokens import CLASS_ATTENTION, TILE_EXTRAS, VisualTokens


class Merged(NamedTuple):
    """New tokens: `projected` [T, K, D], zero padded; `sources` BoolTensor [T, K, N].

    A token that is none of the N, such as the class token, has no source. `places` LongTensor
    [T, K] says where outputs of crops (LLaVA-1.6) stand in the sequence: in the place of that patch
    of their tile, or after all those, first -1, then -2, tile by tile. Base views, and everything
    without `places`, are read in the order of K.
    """

    projected: Tensor
    sources: Tensor
    places: Tensor | None = None


def stack_merged(tiles: list[tuple[Tensor, Tensor, Tensor]]) -> Merged:
    """Merged from (projected [K, D], sources [K, N], places [K]) of every tile."""
    projected, sources, places = zip(*tiles, strict=True)
    return Merged(
        pad_sequence(list(projected), batch_first=True),
        pad_sequence(list(sources), batch_first=True),
        pad_sequence(list(places), batch_first=True, padding_value=-1),
    )


def listed(visual: VisualTokens, picks: Tensor) -> Merged:
    """Tokens as they are, in the order of LongTensor picks [T, K] and as often as they stand there.

    For options that reproduce what no set of tokens in raster order can: such methods then merge.
    """
    rows = picks.clamp(min=0)[..., None].expand(-1, -1, visual.projected.shape[-1])
    projected = visual.projected.gather(1, rows).masked_fill((picks < 0)[..., None], 0)
    tokens = torch.arange(visual.projected.shape[1], device=picks.device)
    return Merged(projected, picks[..., None] == tokens)


@dataclass(frozen=True)
class PruningMethod:
    """A method: frozen dataclass, its fields are its options with the published defaults.

    A method that selects implements `choose`, usually on top of `importance`; one that merges
    implements `merge`. Budget, padding, guards, raster order and trace are done here and in the
    stage.

    Flags (class attributes, the method table is generated from them):
        name: registered name.
        signal: what tokens are chosen by, in a few words.
        paper: where it was published, in a few words.
        needs: inputs beyond the projected tokens: `features`, `projector`, or a key of
            `VisualTokens.extras` that the pipeline collects only for methods naming it. Where that
            depends on options, an instance has its own (`set_needs`).
        wants: as `needs`, but only where the model can provide it; without, the method does
            something else and says so in its `label`.
        query_aware: whether the text of the prompt changes the choice.
        merges: whether outputs are new vectors rather than some of the inputs. Where that depends
            on options, an instance has its own (`set_merges`).
        equivariant: whether the choice follows the tokens wherever they stand; False where places
            or a seed have a part in it.
        fixed_count: whether the number of kept tokens is `num_kept`, whatever the content.
        budgeted: whether a budget must be given.
        shares_budget: where LLaVA-1.6 is read and counted as released (`tile_budgets`), whether the
            budget is divided among the tiles an image has, rather than among five.
        stage: `pre_llm` or `decoder`.
        fidelity: `golden` (equals stored outputs of the official code), `vectors` (equals an
            independent reference of the published formulas), `reconstructed` (something had to be
            filled in that nobody published), `own` (a baseline that nobody published).
        control: a control experiment for tables, not a method anyone proposes.
    """

    name: ClassVar[str] = ""
    signal: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    wants: ClassVar[tuple[str, ...]] = ()
    query_aware: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    equivariant: ClassVar[bool] = True
    fixed_count: ClassVar[bool] = True
    budgeted: ClassVar[bool] = True
    shares_budget: ClassVar[bool] = False
    stage: ClassVar[str] = "pre_llm"
    fidelity: ClassVar[str] = "own"
    control: ClassVar[bool] = False

    def importance(self, visual: VisualTokens) -> Tensor | None:
        """[T, N] score of every token, higher is more important; None if the method has none."""
        return None

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        """Pick counts[t] valid tokens of every tile t. counts: LongTensor [T] on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} selects: it must define choose()")

    def merge(self, visual: VisualTokens, counts: Tensor) -> Merged:
        """Make counts[t] new tokens from the valid ones of every tile t; keeps gradients."""
        raise NotImplementedError(f"{type(self).__name__} merges: it must define merge()")

    def adapt(self, visual: VisualTokens, counts: list[int]) -> list[int]:
        """Tokens of every tile, at most counts[t] and at least one: for methods that merge.

        Methods without a fixed count say here what the content asks for.
        """
        return counts

    def num_kept(self, n: int, budget: int) -> int:
        """Tokens an image of `n` tokens has after pruning to `budget`: a pure function.

        Without a fixed count (`fixed_count`) the most it may have.
        """
        return min(n, budget)

    def label(self, visual: VisualTokens) -> str:
        """What the trace calls this method on `visual`.

        Without a class token its attention is that which patches receive, which the label says.
        """
        of_class = not visual.class_token and self.reads_class_attention
        return f"{self.name}(attention=received)" if of_class else self.name

    @property
    def reads_class_attention(self) -> bool:
        """Whether the class token's attention counts with these options."""
        return any(need in CLASS_ATTENTION for need in self.needs)

    @property
    def keyword_rule(self) -> str:
        """Which words of a question become `question_embeddings`: see `llava.model.instruction`."""
        return "release"

    def set_needs(self, *needs: str, wants: tuple[str, ...] = ()) -> None:
        """What this instance needs with its options; called from `__post_init__`."""
        object.__setattr__(self, "needs", needs)
        object.__setattr__(self, "wants", wants)

    def set_merges(self) -> None:
        """With its options this instance merges, see `listed`; called from `__post_init__`."""
        object.__setattr__(self, "merges", True)

    @property
    def needs_grid(self) -> bool:
        """Whether rows and columns of a tile count, so that tiles cannot be chosen from as one."""
        return False

    def pick(self, rows: VisualTokens, importance: Tensor | None, counts: list[int]) -> Picks:
        """`choose`, held to its contract; indices come back sorted. Used by the stage.

        Args:
            rows: one row for every choice to be made: a tile, or all tokens of an image.
            importance: what `importance` gave, arranged like `rows`.
            counts: picks of every row.
        """
        picks = self.choose(rows, importance, torch.tensor(counts, dtype=torch.long))
        indices = raster_order(picks.indices)
        check_picks(self.name, indices, counts, rows)
        return Picks(indices, picks.margins)


@dataclass(frozen=True)
class SimilarityMethod(PruningMethod):
    """A method that picks by how similar tokens are; others may wrap it (`cen-prune`)."""

    @property
    def compares(self) -> bool:
        """Whether the options let similarity count at all."""
        return True

    def compared(self, visual: VisualTokens) -> Tensor:
        """[T, N, C] the tokens that are compared with each other."""
        return visual.projected

    def choose_among(
        self,
        z: Tensor,
        importance: Tensor | None,
        counts: Tensor,
        *,
        valid: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Picks:
        """`choose` among tokens z [T, N, C].

        Args:
            z: what `compared` gave, perhaps changed.
            importance: [T, N], what `importance` gave.
            counts: LongTensor [T] on the CPU.
            valid: BoolTensor [T, N] or None.
            factor: [T, N], times what every token counts after the method's own normalisation.
        """
        raise NotImplementedError(f"{type(self).__name__} selects: it must define choose_among()")

    def choose(self, visual: VisualTokens, importance: Tensor | None, counts: Tensor) -> Picks:
        return self.choose_among(self.compared(visual), importance, counts, valid=visual.valid)


def raster_order(indices: Tensor) -> Tensor:
    """Sort every row of LongTensor [T, K] ascending; the -1 padding stays at the end."""
    last = torch.iinfo(indices.dtype).max
    ordered = indices.masked_fill(indices < 0, last).sort(dim=1).values
    return ordered.masked_fill(ordered == last, -1)


def refuse_non_finite(visual: VisualTokens) -> None:
    """Raise PruningError if a valid token holds NaN or inf: every comparison would lie.

    Or what was read of it in the tower, which can overflow where its features do not.
    """
    held = {"features": visual.features, "projected": visual.projected}
    for name in TILE_EXTRAS:
        values = visual.extras.get(name, ())
        if len(values) and all(isinstance(value, Tensor) for value in values):
            held[name] = torch.stack(list(values))
    for name, values in held.items():
        of_tokens = name != "cls_feature"
        bad = ~values.isfinite()
        if not of_tokens or bad.dim() == 3:
            bad = bad.any(dim=-1)
        if visual.valid is not None and of_tokens:
            bad = bad & visual.valid.to(bad.device)
        if bad.any():
            tile, *token = bad.nonzero()[0].tolist()
            place = f"tile {tile}, token {token[0]}" if token else f"tile {tile}"
            raise PruningError(
                f"{name} of {place} is NaN or inf "
                f"({int(bad.sum())} such {'tokens' if token else 'tiles'}), so pruning would pick "
                "at random; check the pixels and the weights, or load the model in float32"
            )


def check_picks(name: str, kept: Tensor, counts: list[int], visual: VisualTokens) -> None:
    """Raise PruningError unless every row has exactly its count of distinct, valid tokens."""
    total = visual.projected.shape[1]
    real = kept >= 0
    fits = (
        kept.shape == (len(counts), max(counts, default=0)) and real.sum(dim=1).tolist() == counts
    )
    fits = fits and bool((kept < total).all())
    fits = fits and not bool(((kept[:, 1:] == kept[:, :-1]) & real[:, 1:]).any())
    if fits and visual.valid is not None:
        fits = bool((visual.valid.gather(1, kept.clamp(min=0)) | ~real).all())
    if not fits:
        raise PruningError(
            f"method {name!r} broke its contract: it must return {counts} distinct valid token "
            f"indices below {total} for its {len(counts)} rows"
        )


def check_whole(name: str, value: object, at_least: int) -> None:
    """Raise PruningError unless `value` is a whole number of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise PruningError(f"{name} must be a whole number of at least {at_least}, got {value!r}")


def check_seed(value: object) -> None:
    """Raise PruningError unless `value` is a seed that random generators take."""
    check_whole("seed", value, at_least=0)
    if isinstance(value, int) and value >= 2**64:
        raise PruningError(f"seed must be below 2**64, got {value!r}")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise PruningError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise PruningError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_switch(name: str, value: object) -> None:
    """Raise PruningError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise PruningError(f"{name} must be true or false, got {value!r}")


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise PruningError unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        span = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise PruningError(f"{name} must be a number {span}, got {value!r}")
