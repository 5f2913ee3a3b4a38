"""The lines that a run writes: one per answer, and one of times per batch and arm."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from llava.eval.engine.decode import Decoded
from llava.eval.engine.provenance import hash_json
from llava.eval.engine.run_folder import Record
from llava.eval.tasks.base import Item
from llava.pruning import VisualTokens


@dataclass(frozen=True)
class Outcome:
    """One arm's answers to one batch; times in ms for the whole batch, of `prunings` images."""

    decoded: Decoded
    texts: list[str]
    tokens_in: list[int]
    kept: list[str]
    prunings: int = 0
    prune_ms: float | None = None
    score_ms: float | None = None
    select_ms: float | None = None
    splice_ms: float | None = None

    def timings(self) -> Record:
        """Times per image (prune) and per question (the rest), in ms, and the count of tokens."""
        questions = len(self.texts)

        def share(value: float | None, among: int) -> float | None:
            return None if value is None else value / among

        return {
            "prune_ms": share(self.prune_ms, self.prunings),
            "score_ms": share(self.score_ms, self.prunings),
            "select_ms": share(self.select_ms, self.prunings),
            "splice_ms": share(self.splice_ms, questions),
            "prefill_ms": share(self.decoded.prefill_ms, questions),
            "decode_ms": share(self.decoded.step_ms, questions),
            "new_tokens": sum(len(row) for row in self.decoded.tokens),
        }


def answer_id(run_key: str, arm: str, item: Item) -> str:
    """Names an answer for ever. The index is in it, because some benchmarks repeat their ids."""
    return hash_json([run_key, arm, item.index, item.question_id])[:16]


def failure(reason: str) -> Record:
    """The answer part of a record whose item could not be asked: an image cannot be read."""
    return {"tokens_in": None, "kept": None, "answer": "", "score": None, "error": reason}


def failed_items(answers: Sequence[Record]) -> int:
    """How many items could not be asked."""
    return len({line["index"] for line in answers if "error" in line})


def kept_digests(visual: VisualTokens | None, shares: Sequence[Sequence[int]]) -> list[str]:
    """Per prompt, of the images numbered in its share, what was kept.

    "all", "none" without images, or a short hash of indices (of sources where tokens were merged).
    """
    return [_kept_digest(visual, share) for share in shares]


def _kept_digest(visual: VisualTokens | None, images: Sequence[int]) -> str:
    if visual is None or not images:
        return "none"
    if visual.kept is None and visual.sources is None:
        return "all"
    rows = [tile for image in images for tile in visual.tiles_of(image)]
    if visual.kept is not None:
        chosen = visual.kept[rows][visual.kept[rows] >= 0].tolist()
    else:
        chosen = visual.sources[rows].nonzero().tolist()
    return hashlib.sha256(repr(chosen).encode()).hexdigest()[:16]
