"""Methods that read the vision tower, inside LLaVA-1.5 and 1.6 models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_next import ROWS, SHOWN, batch, prepared

from llava.constants import IMAGE_TOKEN_INDEX
from llava.pruning import PruningConfig, PruningTrace, prune

SELECTING = ("agilepruner", "fastervlm", "fopru", "hiprune", "scope", "vispruner")
MERGING = ("prumerge", "prumerge-plus", "visionzip")


@pytest.mark.parametrize("name", [*SELECTING, *MERGING])
def test_a_batch_of_tiled_images_keeps_exact_counts_and_equals_its_rows(
    name: str, small_next: Callable
) -> None:
    model, shown = small_next(), prepared(small_next(), SHOWN)
    ids, mask = batch(ROWS, left=True)
    config = PruningConfig(name, keep_tokens=6)
    with torch.no_grad(), prune(model, config):
        visual = model.prune_visual_tokens(model.encode_visual_tokens(**shown))
        embeds = model.prepare_inputs_labels_for_multimodal(
            ids, None, mask, None, None, shown["images"], shown["image_sizes"]
        )[4]
    assert isinstance(visual.trace, PruningTrace)
    assert visual.trace.tokens_after == [6] * len(SHOWN)
    lengths = [
        len([i for i in row if i != IMAGE_TOKEN_INDEX]) + 6 * len(own)
        for row, own in zip(ROWS, [(0, 1), (2,), (), (4,), (5, 6)], strict=True)
    ]
    assert embeds.shape[1] == max(lengths)
    for image, size in enumerate(SHOWN):
        assert visual.embeddings(image).shape[0] == 6
        alone = {"images": [shown["images"][image]], "image_sizes": [size]}
        with torch.no_grad(), prune(model, config):
            one = model.prune_visual_tokens(model.encode_visual_tokens(**alone))
        # The tower's products may round differently in a batch, no more.
        torch.testing.assert_close(visual.embeddings(image), one.embeddings(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [n for n in SELECTING if n != "hiprune"])
def test_a_joined_choice_of_all_tiles(name: str, small_next: Callable) -> None:
    model = small_next()
    shown = prepared(model, SHOWN)
    with torch.no_grad(), prune(model, PruningConfig(name, keep_tokens=6, allocation="global")):
        visual = model.prune_visual_tokens(model.encode_visual_tokens(**shown))
    assert visual.trace.tokens_after == [6] * len(SHOWN)


def test_fastervlm_over_all_tiles_takes_the_highest_attention(small_next: Callable) -> None:
    model = small_next()
    shown = prepared(model, SHOWN[:1])
    with (
        torch.no_grad(),
        prune(model, PruningConfig("fastervlm", keep_tokens=5, allocation="global")),
    ):
        encoded = model.encode_visual_tokens(**shown)
        pruned = model.prune_visual_tokens(encoded)
    scores = torch.stack(encoded.extras["cls_attention"])
    scores = scores.masked_fill(~encoded.valid, -1) if encoded.valid is not None else scores
    want = torch.zeros(scores.numel(), dtype=torch.bool)
    want[scores.flatten().topk(5).indices] = True
    got = torch.zeros_like(scores, dtype=torch.bool)
    for tile, row in enumerate(pruned.kept.tolist()):
        got[tile, [i for i in row if i >= 0]] = True
    assert torch.equal(got.flatten(), want)


@pytest.mark.parametrize("name", [*SELECTING, *MERGING])
def test_generates_under_every_method(name: str, small_model: Callable, pixels) -> None:
    model = small_model()
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5], [1, IMAGE_TOKEN_INDEX, 7]])
    model.pruning = {"method": name, "keep_tokens": 2}
    out = model.generate(ids, images=pixels(2, side=28), do_sample=False, max_new_tokens=3)
    assert out.shape[0] == 2
