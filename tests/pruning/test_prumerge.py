"""PruMerge and PruMerge+ equal their formulas, written as loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pruning_checks as checks
import pytest
import torch
from pruning_inputs import one_tile, read_visual
from torch import Tensor, nn

from llava.pruning import PruningConfig, VisualTokens, prune_visual_tokens

N = 100


def make(seed: int = 0, spread: float = 2.0) -> VisualTokens:
    """One tile of 10 x 10 tokens in float64 whose class attention has a long tail."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(1, N, 6)
    return VisualTokens(
        *(x, x.clone(), nn.Identity(), torch.zeros(1, dtype=torch.long), (10, 10)),
        extras={
            "next_single_head_attention": [(draw(N) * spread).softmax(dim=0)],
            "next_cls_attention": [draw(N).softmax(dim=0)],
            "next_keys": [draw(N, 5)],
        },
    )


def run(visual: VisualTokens, name: str, keep: int, **options: object) -> VisualTokens:
    return prune_visual_tokens(visual, PruningConfig.of(name, keep_tokens=keep, **options))


def formula(visual: VisualTokens, kept: list[int], attention: str = "single_head"):
    """Merged rows and their members, token by token."""
    x = visual.features[0].numpy()
    a = visual.extras[f"next_{attention}_attention"][0].numpy()
    keys = visual.extras["next_keys"][0].numpy()
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    rows, members = [], []
    for i in kept:
        others = sorted((j for j in range(N) if j != i), key=lambda j: -(keys[i] @ keys[j]))[:32]
        rows.append(x[i] + sum(a[j] * x[j] for j in others))
        members.append({i, *others})
    rest = [j for j in range(N) if j not in kept]
    rows.append(sum(a[j] * x[j] for j in rest))
    return torch.tensor(np.stack(rows)), [*members, set(rest)]


def attended(visual: VisualTokens, count: int, attention: str = "single_head") -> list[int]:
    a = visual.extras[f"next_{attention}_attention"][0]
    return a.argsort(descending=True)[:count].tolist()


def published_count(visual: VisualTokens) -> int:
    a = visual.extras["next_single_head_attention"][0].numpy()
    low, high = np.percentile(a, [25, 75])
    return int((a > high + 1.5 * (high - low)).sum())


def compare(out: VisualTokens, want: tuple[Tensor, list[set[int]]]) -> None:
    torch.testing.assert_close(out.embeddings(0), want[0], rtol=1e-9, atol=1e-9)
    got = [set(row.nonzero().flatten().tolist()) for row in out.sources[0][: len(want[1])]]
    assert got == want[1]


def test_fixed_count() -> None:
    visual = make()
    compare(run(visual, "prumerge", 12), formula(visual, attended(visual, 11)))
    # One token: the rest, which is everything.
    compare(run(visual, "prumerge", 1), formula(visual, []))


def test_raster_order() -> None:
    visual = make()
    out = run(visual, "prumerge", 12, emit_order="raster")
    compare(out, formula(visual, sorted(attended(visual, 11))))


def test_real_attention_of_the_block() -> None:
    visual = make()
    kept = attended(visual, 11, "cls")
    assert kept != attended(visual, 11)
    del visual.extras["next_single_head_attention"]
    out = run(visual, "prumerge", 12, single_head=False)
    compare(out, formula(visual, kept, "cls"))


def test_norm_makes_weighted_means() -> None:
    visual = make()
    out = run(visual, "prumerge", 12, merge_norm=True)
    a = visual.extras["next_single_head_attention"][0]
    for row in range(12):
        members = out.sources[0, row]
        mean = (a[members, None] * visual.features[0, members]).sum(dim=0) / a[members].sum()
        torch.testing.assert_close(out.embeddings(0)[row], mean)


def test_adaptive_count_is_the_published_one() -> None:
    visual = make()
    count = published_count(visual)
    assert 3 < count < 30
    out = run(visual, "prumerge", N - 1, adaptive=True)
    assert out.trace.tokens_after == [count + 1]
    compare(out, formula(visual, attended(visual, count)))
    # The budget stays a ceiling.
    assert run(visual, "prumerge", 3, adaptive=True).trace.tokens_after == [3]


def test_adaptive_plus_samples_evenly() -> None:
    visual = make()
    count = published_count(visual)
    kept = attended(visual, count)
    step = int(int(1 / (count / N)) / 3)
    assert step > 1
    kept += [i for i in range(0, N - 1, step) if i not in kept]
    out = run(visual, "prumerge-plus", N - 1, adaptive=True)
    assert out.trace.tokens_after == [len(kept) + 1]
    compare(out, formula(visual, kept))


def test_adaptive_counts_where_the_released_code_stops() -> None:
    flat = make()
    flat.extras["next_single_head_attention"] = [torch.full((N,), 0.01, dtype=torch.float64)]
    assert run(flat, "prumerge", 50, adaptive=True).trace.tokens_after == [2]
    # One attended patch, tokens 33 and 66, the rest.
    assert run(flat, "prumerge-plus", 50, adaptive=True).trace.tokens_after == [4]


@pytest.mark.parametrize("keep", [2, 5, 33, 64])
def test_plus_keeps_a_fixed_count(keep: int) -> None:
    visual = make()
    kept = attended(visual, math.ceil((keep - 1) / 4))
    rest = [i for i in range(N) if i not in kept]
    samples = keep - 1 - len(kept)
    kept += [rest[i * len(rest) // samples] for i in range(samples)]
    compare(run(visual, "prumerge-plus", keep), formula(visual, kept))


def test_adaptive_counts_differ_between_images_of_a_batch() -> None:
    visual = read_visual(3)
    visual.extras["next_single_head_attention"] = [
        torch.linspace(0, 1, checks.N).pow(power) for power in (1, 8, 30)
    ]
    out = run(visual, "prumerge", 30, adaptive=True)
    sizes = out.trace.tokens_after
    assert len(set(sizes)) > 1
    assert [out.embeddings(i).shape[0] for i in range(3)] == sizes
    assert out.valid.sum(dim=1).tolist() == sizes
    for image in range(3):
        alone = run(one_tile(visual, image), "prumerge", 30, adaptive=True)
        assert torch.equal(out.embeddings(image), alone.embeddings(0))
