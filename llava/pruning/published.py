"""What papers report for the methods here, figures only: LLaVA-1.5-7B, 64 of 576 visual tokens.

Retention is the mean over a table's benchmarks of pruned score / unpruned score, in per cent.
Tables average different benchmarks and metrics, so figures compare inside one source only. A
method's first figure is that of the table with the most methods; then come its authors' own and,
where papers disagree, what else shows how far.
"""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """A table of a paper: `where` it stands, who ran it (`kind`), and what it `averages`."""

    where: str
    kind: str
    averages: str


class Retention(NamedTuple):
    """`percent` of the unpruned score in `source`, a key of SOURCES; `setting`: which options."""

    percent: float
    source: str
    setting: str = ""


KEEP_TOKENS = 64

SOURCES = {
    "cen-prune": Source(
        "Cen-Prune, arXiv 2608.30263, table for LLaVA-1.5-7B, column Avg.",
        "one re-run of all methods with their released code, selection in float32",
        "11 benchmarks: GQA, MMBench, MME perception, POPE, ScienceQA, VQAv2, TextVQA, OCRBench, "
        "VizWiz val, SEED image, MMMU",
    ),
    "zoo-prune": Source(
        "ZOO-Prune, arXiv 2509.24837 (CVPR version), table for LLaVA-1.5-7B",
        "the authors' own for ZOO-Prune, theirs of other methods",
        "9 benchmarks: GQA, MMBench, MME, POPE, ScienceQA, VQAv2, TextVQA, SEED, MMMU",
    ),
    "visionzip": Source(
        "VisionZip, arXiv 2412.04467, table for LLaVA-1.5-7B",
        "the authors' own",
        "11 benchmarks",
    ),
    "mmtok": Source(
        "MMTok, arXiv 2508.18264, table for LLaVA-1.5-7B",
        "the authors' own",
        "9 benchmarks: GQA, MMBench, MME total, POPE, ScienceQA, VQAv2, TextVQA, MMMU, SEED",
    ),
    "eadp": Source(
        "EADP paper, table for LLaVA-1.5-7B",
        "run by that paper; it prints scores, the ratios were averaged by this project",
        "9 benchmarks: VQAv2, GQA, ScienceQA, TextVQA, POPE, MME perception, MMBench, MMBench-CN, "
        "MM-Vet",
    ),
    "tops": Source(
        "TOPS paper, table for LLaVA-1.5-7B",
        "run by that paper",
        "8 benchmarks: GQA, ScienceQA, TextVQA, POPE, MME perception, MMBench, MMBench-CN, MM-Vet",
    ),
    "provip": Source(
        "ProViP paper, table for LLaVA-1.5-7B",
        "run by that paper, at a fixed budget that PruMerge does not define",
        "7 benchmarks: GQA, MMBench, MMBench-CN, MME total, POPE, ScienceQA, TextVQA",
    ),
}

# By registered name; a method that is not here has no published figure at this budget.
RETENTION: dict[str, tuple[Retention, ...]] = {
    "cdpruner": (Retention(96.3, "cen-prune"), Retention(95.1, "eadp")),
    "cen-prune": (
        Retention(96.2, "cen-prune", "host=divprune"),
        Retention(96.2, "cen-prune", "host=zoo"),
        Retention(97.0, "cen-prune", "host=cdpruner"),
    ),
    "divprune": (
        Retention(94.8, "cen-prune"),
        Retention(94.42, "zoo-prune"),
        Retention(93.4, "eadp"),
    ),
    "hiprune": (Retention(89.6, "eadp"),),
    "mmtok": (Retention(96.3, "cen-prune"), Retention(96.6, "mmtok")),
    "prumerge": (Retention(86.3, "provip"),),
    "prumerge-plus": (Retention(90.4, "eadp"), Retention(90.8, "tops")),
    "scope": (Retention(96.0, "tops"),),
    "visionzip": (
        Retention(93.4, "cen-prune"),
        Retention(94.0, "visionzip"),
        Retention(92.74, "zoo-prune"),
    ),
    "vispruner": (Retention(94.1, "cen-prune"),),
    "zoo": (Retention(95.5, "cen-prune"), Retention(95.20, "zoo-prune")),
}
