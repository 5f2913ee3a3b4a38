"""The stage lets the GPU work on: the host never waits for it, and a CUDA graph can record it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from pruning_inputs import visual_for
from test_cuda import METHODS, on_gpu
from test_waiting import WAITING, image_of_tiles

from llava.pruning import PruningConfig, PruningError, prune_visual_tokens

pytestmark = pytest.mark.gpu

FREE = [name for name in METHODS if name not in WAITING]
each_free_method = pytest.mark.parametrize("name", FREE)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make every synchronisation of host and device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_free_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_never_waits(name: str, dtype: torch.dtype) -> None:
    visual = on_gpu(visual_for(name, 3, grid=(24, 24), dtype=dtype))
    config = PruningConfig(name, keep_tokens=64)
    want = prune_visual_tokens(visual, config)  # what is computed once is computed here
    with no_waiting():
        got = prune_visual_tokens(visual, config)
    got.settle()
    assert torch.equal(got.projected, want.projected)


@each_free_method
def test_the_host_never_waits_for_tiles(name: str) -> None:
    if name in ("grid", "pool"):
        pytest.skip("the rectangle of a padded tile is read from its mask")
    visual = on_gpu(image_of_tiles(name))
    config = PruningConfig(name, keep_tokens=40)
    want = prune_visual_tokens(visual, config)
    with no_waiting():
        got = prune_visual_tokens(visual, config)
    assert torch.equal(got.embeddings(0), want.embeddings(0))


@pytest.mark.parametrize("name", ["divprune", "norm", "zoo", "zoo-exact", "cdpruner"])
def test_a_graph_records_the_stage(name: str) -> None:
    """What it replays on other tokens is what the stage does to them."""
    visual = on_gpu(visual_for(name, grid=(24, 24), dtype=torch.bfloat16))
    other = on_gpu(visual_for(name, grid=(24, 24), dtype=torch.bfloat16, seed=5))
    config = PruningConfig(name, keep_tokens=64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(3):
            prune_visual_tokens(visual, config)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.graph(graph):
            recorded = prune_visual_tokens(visual, config)
        visual.features.copy_(other.features)
        visual.projected.copy_(other.projected)
        for key, extra in visual.extras.items():
            for mine, theirs in zip(extra, other.extras[key], strict=True):
                mine.copy_(theirs)
        graph.replay()
        want = prune_visual_tokens(other, config)
    torch.cuda.synchronize()
    assert torch.equal(recorded.kept, want.kept)
    assert torch.equal(recorded.projected, want.projected)


def test_nan_is_found_when_the_host_waits_anyway() -> None:
    visual = on_gpu(visual_for("zoo-exact", grid=(24, 24)))
    config = PruningConfig("zoo-exact", keep_tokens=64)
    prune_visual_tokens(visual, config)
    visual.projected[0, 3, 0] = torch.nan
    with no_waiting():
        pruned = prune_visual_tokens(visual, config)
    assert bool(((pruned.kept >= 0) & (pruned.kept < 576)).all())
    with pytest.raises(PruningError, match="NaN or inf"):
        pruned.settle()
