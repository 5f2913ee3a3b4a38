"""What a method file imports: the base class of all methods, and what methods are made of."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, dataclass_transform

import torch
from torch import Tensor

from llava.pruning.errors import PruningError
from llava.pruning.indices import constant, raster_order
from llava.pruning.late_checks import refuse_if
from llava.pruning.options import check_options, option, varies
from llava.pruning.registry import register
from llava.pruning.selection.rows import Merged, Picks, Rows
from llava.pruning.tokens import CLASS_ATTENTION, VisualTokens

__all__ = [
    "Merged",
    "Picks",
    "PruningMethod",
    "Rows",
    "VisualTokens",
    "option",
    "register",
    "varies",
]


@dataclass_transform(frozen_default=True)
@dataclass(frozen=True)
class PruningMethod:
    """A method: its fields are its options (`option`), with the published defaults.

    A method that selects defines `select`, or `pick` for one row, usually on top of `score`; one
    that merges defines `merge`. Budget, padding, guards, raster order and trace are done here and
    in the stage. `register` makes the class a frozen dataclass.

    Flags (class attributes, the method table is generated from them). One that depends on options
    is a property, see `varies`.

        name: registered name.
        signal: what tokens are selected by, in a few words.
        paper: where it was published, in a few words.
        needs: inputs beyond the projected tokens: `features`, `projector`, or a key of
            `VisualTokens.extras` that the pipeline collects only for methods naming it.
        wants: as `needs`, but only where the model can provide it; without, the method computes it
            itself, or does something else and says so in its `label`.
        query_aware: whether the text of the prompt changes the selection.
        keyword_rule: which words of a question become `question_embeddings`, see
            `llava.model.prompt_inputs`.
        merges: whether outputs are new vectors rather than some of the inputs.
        compares: whether it selects by how similar `Rows.z` are, times `Rows.weight`, so that
            others may wrap it (`cen-prune`).
        equivariant: whether the selection follows the tokens wherever they are; False where
            places or a seed have a part in it.
        needs_grid: whether rows and columns of a tile count, so that tiles cannot be selected from
            as one.
        fixed_count: whether the number of kept tokens is `num_kept`, whatever the content.
        budgeted: whether a budget must be given.
        shares_budget: where LLaVA-1.6 is read and counted as released (`tile_protocol`), whether
            the budget is divided among the tiles an image has, rather than among five.
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
    keyword_rule: ClassVar[str] = "release"
    merges: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    equivariant: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False
    fixed_count: ClassVar[bool] = True
    budgeted: ClassVar[bool] = True
    shares_budget: ClassVar[bool] = False
    stage: ClassVar[str] = "pre_llm"
    fidelity: ClassVar[str] = "own"
    control: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def collects(self) -> tuple[str, ...]:
        """What the pipeline collects for this method where it can: `needs` and `wants`."""
        return (*self.needs, *self.wants)

    def score(self, tokens: VisualTokens) -> Tensor | None:
        """Score every token, [T, N], higher is more important; None if the method has no score."""
        return None

    def compared(self, tokens: VisualTokens) -> Tensor:
        """Return the tokens that are compared with each other, [T, N, C]: `Rows.z`."""
        return tokens.projected

    def select(self, rows: Rows) -> Picks:
        """Pick rows.counts[r] valid tokens of every row r; by default one row after the other."""
        return Picks.stack([self.pick(rows, *row) for row in rows])

    def pick(self, rows: Rows, row: int, count: int, tokens: Tensor) -> Picks | Tensor:
        """Pick `count` of the valid `tokens` of one row, LongTensor [n]: indices, or `Picks`."""
        raise NotImplementedError(f"{type(self).__name__} selects: it must define select()")

    def merge(self, tokens: VisualTokens, counts: Tensor) -> Merged:
        """Make counts[t] new tokens from the valid ones of every tile t; keeps gradients.

        Without a fixed count (`fixed_count`) it may make fewer, but at least one.
        """
        raise NotImplementedError(f"{type(self).__name__} merges: it must define merge()")

    def num_kept(self, n: int, budget: int) -> int:
        """Return the tokens an image of `n` has after pruning to `budget`: a pure function.

        Without a fixed count (`fixed_count`) the most it may have.
        """
        return min(n, budget)

    def label(self, tokens: VisualTokens) -> str:
        """Return what the trace calls this method on `tokens`.

        Without a class token its attention is that which patches receive, which the label says.
        """
        if tokens.class_token or not any(need in CLASS_ATTENTION for need in self.needs):
            return self.name
        return f"{self.name}(attention=received)"

    def rows(self, tokens: VisualTokens, scores: Tensor | None, counts: Tensor) -> Rows:
        """Return what `select` gets for `tokens`, their scores and LongTensor counts [T]."""
        return Rows(tokens, self.compared(tokens), scores, counts, tokens.valid)

    def checked_select(
        self, tokens: VisualTokens, scores: Tensor | None, counts: list[int]
    ) -> Picks:
        """Call `select`, hold it to its contract and sort its indices. Used by the stage.

        Args:
            tokens: one row for every selection to be made: a tile, or all tokens of an image.
            scores: what `score` gave, arranged like `tokens`.
            counts: picks of every row.

        Raises:
            PruningError: a row has not exactly its count of distinct, valid tokens; on an
                accelerator later, see `refuse_if`.
        """
        picks = self.select(self.rows(tokens, scores, torch.tensor(counts, dtype=torch.long)))
        padded = picks.indices.shape[1] != min(counts, default=0)
        indices = raster_order(picks.indices, padded)
        total = tokens.projected.shape[1]

        def explain() -> PruningError:
            return PruningError(
                f"method {self.name!r} broke its contract: it must return {counts} distinct valid "
                f"token indices below {total} for its {len(counts)} rows"
            )

        if indices.shape != (len(counts), max(counts, default=0)):
            raise explain()
        broken = partial(_breaks, indices, tuple(counts), total, tokens.valid)
        refuse_if(indices.device, broken, explain)
        if indices.device.type != "cpu":  # not refused yet, and no gather may leave its tensor
            indices = indices.clamp(-1 if padded else 0, total - 1)
        return Picks(indices, picks.margins)


def _breaks(indices: Tensor, counts: tuple[int, ...], total: int, valid: Tensor | None) -> Tensor:
    """Return which rows of sorted indices [R, K] are not `counts` distinct, valid tokens: [R]."""
    real = indices >= 0
    wrong = real.sum(dim=1) != constant(counts, indices.device)
    wrong |= (indices >= total).any(dim=1)
    wrong |= ((indices[:, 1:] == indices[:, :-1]) & real[:, 1:]).any(dim=1)
    if valid is not None:
        inside = indices.clamp(min=0, max=valid.shape[1] - 1)
        wrong |= (~valid.gather(1, inside) & real).any(dim=1)
    return wrong
