"""The projector's pre-activations: what scores reuse of the way from features to embeddings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from llava.model.vision_inputs import PRE_ACTIVATIONS
from llava.pruning import PruningConfig, importance_of, prune


@pytest.fixture
def model(small_model: Callable):
    """With a projector that has something between its layers."""
    model = small_model()
    inner, config = model.get_model(), model.config
    generator = torch.Generator().manual_seed(0)
    layers = [nn.Linear(config.mm_hidden_size, 24), nn.GELU(), nn.Linear(24, config.hidden_size)]
    inner.mm_projector = nn.Sequential(*layers).to(model.dtype)
    with torch.no_grad():
        for parameter in inner.mm_projector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def encoded(model, images: torch.Tensor, method: str | None = "zoo-exact"):
    config = None if method is None else PruningConfig(method, keep_tokens=2)
    with prune(model, config):
        return model.encode_visual_tokens(images)


@pytest.mark.parametrize("method", ["zoo", "zoo-exact", "least-sensitive"])
def test_collected_for_methods_that_want_them(model, pixels, method) -> None:
    images = pixels(3, side=28)
    plain = encoded(model, images, None)
    assert PRE_ACTIVATIONS not in plain.extras
    visual = encoded(model, images, method)
    assert torch.equal(visual.projected, plain.projected)
    projector = model.get_model().mm_projector
    hidden = torch.stack(visual.extras[PRE_ACTIVATIONS])
    assert torch.equal(hidden, projector[0](visual.features))
    assert not hidden.requires_grad
    config = PruningConfig(method, keep_tokens=2)
    scores = importance_of(config, visual)
    del visual.extras[PRE_ACTIVATIONS]
    torch.testing.assert_close(scores, importance_of(config, visual), rtol=1e-5, atol=0)


def test_embeddings_keep_their_gradients(model, pixels) -> None:
    visual = encoded(model, pixels(1, side=28))
    visual.projected.sum().backward()
    assert model.get_model().mm_projector[0].weight.grad.abs().sum() > 0


def add_hook(projector: nn.Sequential) -> None:
    projector.register_forward_hook(lambda module, args, output: output * 2)


def add_hook_to_a_layer(projector: nn.Sequential) -> None:
    projector[0].register_forward_hook(lambda module, args, output: output * 2)


def replace_forward(projector: nn.Sequential) -> None:
    forward = projector.forward
    projector.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]


def work_in_place(projector: nn.Sequential) -> None:
    projector[1] = nn.ReLU(inplace=True)


def deepen(projector: nn.Sequential) -> None:
    projector.append(nn.LayerNorm(projector[2].out_features).to(projector[2].weight.dtype))


@pytest.mark.parametrize(
    "change", [add_hook, add_hook_to_a_layer, replace_forward, work_in_place, deepen]
)
def test_a_projector_that_does_more_is_called_as_it_is(model, pixels, change) -> None:
    images, projector = pixels(2, side=28), model.get_model().mm_projector
    change(projector)
    visual = encoded(model, images)
    assert PRE_ACTIVATIONS not in visual.extras
    assert torch.equal(visual.projected, projector(visual.features))
    importance_of(PruningConfig("zoo-exact", keep_tokens=2), visual)


def test_autocast_leaves_none(model, pixels) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        visual = encoded(model, pixels(1, side=28))
    assert PRE_ACTIVATIONS not in visual.extras


def test_a_replaced_encode_images_leaves_none(model, pixels, monkeypatch) -> None:
    own = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda images: own(images), raising=False)
    assert PRE_ACTIVATIONS not in encoded(model, pixels(1, side=28)).extras
