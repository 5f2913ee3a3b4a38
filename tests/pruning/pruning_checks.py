"""Promises of llava.pruning as functions: the suite runs them, planted mutations must fail them."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

from llava.pruning import PruningConfig, VisualTokens, max_min, prune_visual_tokens
from llava.pruning.tokens import ENCODER_EXTRAS

GRID = (6, 6)
N = GRID[0] * GRID[1]
# Methods whose choice follows the tokens and not their places.
EQUIVARIANT = (
    *("agilepruner", "divprune", "fastervlm", "fopru", "norm", "scope", "vispruner"),
    *("zoo", "zoo-exact", "least-sensitive"),
)


def make_projector(dtype: torch.dtype = torch.float32, dv: int = 10, d: int = 14) -> nn.Module:
    """Linear-GELU-Linear with weights from a private generator."""
    generator = torch.Generator().manual_seed(7)
    projector = nn.Sequential(nn.Linear(dv, 17), nn.GELU(), nn.Linear(17, d)).to(dtype)
    with torch.no_grad():
        for p in projector.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
    return projector


def make_visual(
    tiles: int = 2,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    owners: list[int] | None = None,
    valid: Tensor | None = None,
    grid: tuple[int, int] = GRID,
) -> VisualTokens:
    """Random tokens; every tile its own image unless `owners` says otherwise."""
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    features = torch.randn(tiles, count, 10, generator=generator, dtype=torch.float64).to(dtype)
    projector = make_projector(dtype)
    with torch.no_grad():
        # Row by row: the same tokens are the same bits alone and in a batch.
        projected = torch.stack([projector(row.clone()) for row in features])
    index = torch.tensor(owners if owners is not None else list(range(tiles)))
    extras = encoder_extras(features)
    return VisualTokens(features, projected, projector, index, grid, valid, extras)


def encoder_extras(features: Tensor) -> dict[str, list[Tensor]]:
    """What a tower might have given for these features [T, N, 10]: each tile from its own alone."""
    generator = torch.Generator().manual_seed(17)
    mix = torch.randn(10, 13, generator=generator, dtype=torch.float64)
    wide = torch.promote_types(features.dtype, torch.float32)
    extras: dict[str, list[Tensor]] = {name: [] for name in ENCODER_EXTRAS}
    for tile in features:
        # No product: the same token gives the same bits wherever it stands.
        given = (tile.double()[..., None] * mix).sum(dim=1).sigmoid().to(wide)
        for column, name in enumerate(n for n in ENCODER_EXTRAS if n.endswith("attention")):
            extras[name].append(given[:, column].clone())
        extras["encoder_keys"].append(given[:, 5:9] - 0.5)
        extras["next_keys"].append(given[:, 5:13] - 0.5)
        extras["cls_feature"].append(given[:10, 0].to(features.dtype))
    return extras


def replace_tokens(visual: VisualTokens, features: Tensor) -> VisualTokens:
    """The same batch with other features, projected anew."""
    with torch.no_grad():
        projected = torch.stack([visual.projector(row.clone()) for row in features])
    return VisualTokens(
        features,
        projected,
        visual.projector,
        visual.image_index,
        visual.grid,
        visual.valid,
        encoder_extras(features),
    )


def one_tile(visual: VisualTokens, tile: int) -> VisualTokens:
    """Tile `tile` as a batch of its own."""
    return VisualTokens(
        visual.features[tile : tile + 1].clone(),
        visual.projected[tile : tile + 1].clone(),
        visual.projector,
        torch.zeros(1, dtype=torch.long),
        visual.grid,
        None if visual.valid is None else visual.valid[tile : tile + 1].clone(),
        visual.tile_extras([tile]),
    )


def check_count_and_order(name: str, keep: int = 9) -> None:
    """Promise 2: exactly num_kept sorted, unique, in-range indices; embeddings aligned."""
    visual = make_visual(3)
    config = PruningConfig(name, keep_tokens=keep)
    out = prune_visual_tokens(visual, config)
    for image in range(3):
        assert out.embeddings(image).shape[0] == config.num_kept(N)
        if name == "none":
            assert out is visual
            continue
        assert out.trace is not None
        assert out.trace.tokens_before == [N] * 3
        assert out.trace.tokens_after == [config.num_kept(N)] * 3
        if out.kept is None:
            assert out.sources is not None
            # The class token, where a method keeps it, was made of no patch.
            lone = 1 if "cls_feature" in config.pruner.needs else 0
            assert int((~out.sources[image].any(dim=1)).sum()) == lone
            continue
        row = out.kept[image]
        assert row.tolist() == sorted(set(row.tolist()))
        assert int(row.min()) >= 0
        assert int(row.max()) < N
        assert torch.equal(out.embeddings(image), visual.projected[image][row])


def check_valid_respected(name: str) -> None:
    """Padding is never kept, never compared with, and its content changes nothing."""
    valid = torch.ones(2, *GRID, dtype=torch.bool)
    valid[0, :2] = False
    valid[0, :, 5] = False  # a 4 x 5 rectangle stays
    valid[1, 5] = False
    visual = make_visual(2, valid=valid.view(2, N))
    garbage = make_visual(2, valid=valid.view(2, N))
    garbage.features[~garbage.valid] = torch.nan
    garbage.projected[~garbage.valid] = torch.inf
    for key in set(ENCODER_EXTRAS) - {"cls_feature"}:
        for tile, extra in enumerate(garbage.extras[key]):
            extra[~garbage.valid[tile]] = torch.nan
    for keep in (4, 10, 25):
        config = PruningConfig(name, keep_tokens=keep)
        out, other = prune_visual_tokens(visual, config), prune_visual_tokens(garbage, config)
        for image, size in enumerate((20, 30)):
            tokens = out.embeddings(image)
            assert tokens.shape[0] == config.num_kept(size)
            assert torch.equal(tokens, other.embeddings(image))
            if out.kept is not None:
                kept = out.kept[image][out.kept[image] >= 0]
                assert visual.valid[image][kept].all()


def check_batch_independence(name: str) -> None:
    """Promise 3: the same tokens alone, in a batch of 5 and in another order."""
    valid = torch.ones(5, N, dtype=torch.bool)
    valid[3, 24:] = False
    visual = make_visual(5, valid=valid, seed=3)
    config = PruningConfig(name, keep_tokens=9)
    batch = prune_visual_tokens(visual, config)
    flipped = prune_visual_tokens(
        VisualTokens(
            visual.features.flip(0),
            visual.projected.flip(0),
            visual.projector,
            visual.image_index,
            visual.grid,
            valid.flip(0),
            visual.tile_extras([4, 3, 2, 1, 0]),
        ),
        config,
    )
    for image in range(5):
        alone = prune_visual_tokens(one_tile(visual, image), config)
        assert torch.equal(batch.embeddings(image), alone.embeddings(0))
        assert torch.equal(batch.embeddings(image), flipped.embeddings(4 - image))
        if batch.kept is not None:
            assert torch.equal(batch.kept[image], alone.kept[0])


def check_deterministic(name: str) -> None:
    """Promise 4: no global random state is read or written, call order does not matter."""
    visual, config = make_visual(2), PruningConfig(name, keep_tokens=9)
    torch.manual_seed(1)
    first = prune_visual_tokens(visual, config)
    torch.manual_seed(2)
    prune_visual_tokens(make_visual(3, seed=9), PruningConfig("random", keep_tokens=5))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    second = prune_visual_tokens(visual, config)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.random.get_state()[1].tolist() == state[1]
    assert random.getstate() == state[2]
    for image in range(2):
        assert torch.equal(first.embeddings(image), second.embeddings(image))


def check_model_untouched(name: str) -> None:
    """Weights, buffers, gradients and training flags of the projector stay as they are."""
    visual = make_visual(2)
    visual.projector.append(nn.Dropout(0.5))
    visual.projector[0].eval()
    before = {key: value.clone() for key, value in visual.projector.state_dict().items()}
    flags = [module.training for module in visual.projector.modules()]
    features, projected = visual.features.clone(), visual.projected.clone()
    prune_visual_tokens(visual, PruningConfig(name, keep_tokens=9))
    after = visual.projector.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert flags == [module.training for module in visual.projector.modules()]
    assert all(p.grad is None for p in visual.projector.parameters())
    assert torch.equal(features, visual.features)
    assert torch.equal(projected, visual.projected)


def check_permutation(name: str) -> None:
    """Permuting tokens permutes the choice (margins are checked, so rounding cannot decide)."""
    visual = make_visual(1, dtype=torch.float64, seed=5)
    config = PruningConfig(name, keep_tokens=12)
    out = prune_visual_tokens(visual, config)
    margins = out.trace.margins[out.trace.margins.isfinite()]
    # DivPrune's first pick is one of two mutually nearest tokens or a lone one: exclude the tie.
    assert (margins > 1e-9).all()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    shuffled = prune_visual_tokens(replace_tokens(visual, visual.features[:, order]), config)
    assert set(order[shuffled.kept[0]].tolist()) == set(out.kept[0].tolist())


def check_duplicates(name: str) -> None:
    """Repeated tokens are never picked twice by index; the count stays exact."""
    visual = make_visual(1)
    features = visual.features[:, :4].repeat(1, N // 4, 1)
    config = PruningConfig(name, keep_tokens=12)
    out = prune_visual_tokens(replace_tokens(visual, features), config)
    assert out.embeddings(0).shape[0] == config.num_kept(N)
    if out.kept is not None:
        assert len(set(out.kept[0].tolist())) == 12


def check_constant_features(name: str) -> None:
    """All tokens equal: still an exact count of distinct tokens, and no NaN."""
    visual = make_visual(1)
    out = prune_visual_tokens(
        replace_tokens(visual, visual.features[:, :1].expand(-1, N, -1).clone()),
        PruningConfig(name, keep_tokens=6),
    )
    assert out.embeddings(0).isfinite().all()
    assert out.embeddings(0).shape[0] == (N if name == "none" else 6)


def check_ties_to_lowest() -> None:
    """Equal scores go to the lowest index, at every pick."""
    z = torch.ones(1, 8, 4)
    for first in ("importance", "isolated"):
        assert max_min(z, 5, first=first).tolist() == [[0, 1, 2, 3, 4]]
    weights = torch.tensor([[0.2, 0.9, 0.9, 0.1, 0.9, 0.0, 0.0, 0.0]])
    axes = torch.eye(8)[None]
    assert max_min(axes, 4, weights=weights).tolist() == [[1, 2, 4, 0]]


def brute_force(
    z: Tensor, k: int, weights: Tensor | None, valid: Tensor | None, first: str
) -> list[int]:
    """Max-min selection of one row in float64, as written in the papers: no running state."""
    tokens = [i for i in range(len(z)) if valid is None or bool(valid[i])]
    rows = z.double().numpy()
    w = np.ones(len(z)) if weights is None else weights.double().numpy()

    def distance(i: int, j: int) -> float:
        norms = max(np.linalg.norm(rows[i]), 1e-12) * max(np.linalg.norm(rows[j]), 1e-12)
        return min(max(1.0 - float(rows[i] @ rows[j]) / norms, 0.0), 2.0)

    picked: list[int] = []
    while len(picked) < k:
        rest = [i for i in tokens if i not in picked]
        if picked:
            scores = [w[i] * min(distance(i, j) for j in picked) for i in rest]
        elif first == "importance":
            scores = [w[i] for i in rest]
        else:
            scores = [min((distance(i, j) for j in tokens if j != i), default=0.0) for i in rest]
        picked.append(rest[int(np.argmax(scores))])
    return picked


def check_brute_force() -> None:
    """Promise 6: the torch reference equals the brute force, batched, weighted and masked."""
    generator = torch.Generator().manual_seed(11)
    z = torch.randn(5, 23, 7, generator=generator, dtype=torch.float64)
    weights = torch.rand(5, 23, generator=generator, dtype=torch.float64)
    valid = torch.rand(5, 23, generator=generator) > 0.3
    counts = torch.tensor([1, 5, 0, 12, 9])
    for first, w in (("importance", weights), ("isolated", None), ("isolated", weights)):
        got = max_min(z, counts, weights=w, valid=valid, first=first)
        for row, count in enumerate(counts.tolist()):
            want = brute_force(z[row], count, None if w is None else w[row], valid[row], first)
            assert got[row, :count].tolist() == want
            assert (got[row, count:] == -1).all()
