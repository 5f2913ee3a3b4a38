"""Which projectors are recognised, offloaded ones, and what methods ask of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from projector_inputs import (
    ESTIMATORS,
    FP64,
    NORMED,
    PLAIN,
    TEXT,
    VISION,
    Merger,
    RootMeanSquare,
    as_black_box,
    draw,
    filled,
    frobenius,
    plain,
    qwen3,
    tokens,
)
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3SimpleMLP
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.paligemma.configuration_paligemma import PaliGemmaConfig
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector

from llava.pruning import PruningError, select, sensitivity
from llava.pruning.importance.derivatives import derivative, elementwise
from llava.pruning.importance.offloaded import at_hand
from llava.pruning.importance.projectors import (
    JoinedMerger,
    linear_matrix,
    low_rank,
    normed_merger,
    two_layer,
    untrained,
    weights_of,
)
from llava.pruning.importance.structure import Answers, reads_only


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_plain_projectors_score_like_a_sequential(name, estimator) -> None:
    projector = PLAIN[name]()
    parts = two_layer(projector)
    assert parts is not None
    act = elementwise(parts.act)
    twin = nn.Sequential(parts.first, act, parts.second)
    x = tokens(projector)
    got = sensitivity(projector, x, estimator=estimator)
    assert torch.equal(got, sensitivity(twin, x, estimator=estimator))
    hidden = parts.first(x)
    reused = sensitivity(projector, x, estimator=estimator, hidden=hidden)
    torch.testing.assert_close(reused, got, rtol=1e-12, atol=0)
    if estimator == "exact":
        torch.testing.assert_close(got, frobenius(projector, x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_linear_projectors_are_constant(estimator) -> None:
    text = {"model_type": "llama", **TEXT, "intermediate_size": 8, "vocab_size": 8}
    idefics = Idefics3Config(vision_config=VISION, text_config=text, scale_factor=2)
    vision = {"model_type": "siglip_vision_model", **VISION, "projection_dim": 20}
    pali = PaliGemmaConfig(vision_config=vision, text_config={"model_type": "gemma", **TEXT})
    for projector in (Idefics3SimpleMLP(idefics), PaliGemmaMultiModalProjector(pali)):
        filled(projector)
        assert linear_matrix(projector, FP64) is not None
        got = sensitivity(projector, tokens(projector), estimator=estimator)
        assert got.unique().numel() == 1


def test_activations_are_known_by_what_they_compute() -> None:
    same = {
        "gelu": nn.GELU(),
        "gelu_python": nn.GELU(),
        "gelu_new": nn.GELU(approximate="tanh"),
        "gelu_pytorch_tanh": nn.GELU(approximate="tanh"),
        "silu": nn.SiLU(),
        "mish": nn.Mish(),
        "relu": nn.ReLU(),
    }
    h = draw(200) * 3
    for name, twin in same.items():
        assert repr(elementwise(ACT2FN[name])) == repr(twin)
        assert torch.equal(derivative(ACT2FN[name], h), derivative(twin, h))
    quick = ACT2FN["quick_gelu"]
    want = torch.func.jvp(quick, (h,), (torch.ones_like(h),))[1]
    torch.testing.assert_close(derivative(quick, h), want, rtol=1e-10, atol=1e-12)
    for other in (nn.Softmax(dim=-1), nn.LayerNorm(25), nn.Flatten(), nn.Linear(25, 25)):
        assert elementwise(other) is None
    assert elementwise(ACT2FN["relu2"]) is None  # not among those compared with


class Residual(Merger):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.reshape(-1, self.joined)[:, :20]


class Unnormed(Merger):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x.reshape(-1, self.joined))


class Reordered(Merger):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x).view(-1, 4, 12).flip(1).flatten(1))


class Scaled(Merger):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.001


class Population(RootMeanSquare):
    """Another norm with the same weights: its variance has another divisor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).rsqrt()


class OutsideTheRoot(RootMeanSquare):
    """eps is added to the root."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


def hooked(how: str) -> nn.Module:
    merger = Merger(nn.LayerNorm(12), 4, nn.GELU())
    layer = merger.mlp[1]
    if how == "forward":
        layer.forward = lambda h: h.sin()
    elif how == "hook":
        layer.register_forward_hook(lambda module, inputs, output: output.sin())
    else:
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
    return merger


LOOK_ALIKES: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: Residual(nn.LayerNorm(12), 4, nn.GELU()),
    "norm not used": lambda: Unnormed(nn.LayerNorm(12), 4, nn.GELU()),
    "patches in another order": lambda: Reordered(nn.LayerNorm(12), 4, nn.GELU()),
    "scaled": lambda: Scaled(nn.LayerNorm(12), 4, nn.GELU()),
    "other variance": lambda: Merger(Population(12, 1e-6), 4, nn.GELU()),
    "eps outside": lambda: Merger(OutsideTheRoot(12, 1e-6), 4, nn.GELU()),
    "not elementwise": lambda: Merger(nn.LayerNorm(12), 4, nn.Softmax(dim=-1)),
    "own forward": lambda: hooked("forward"),
    "hook": lambda: hooked("hook"),
    "pre-hook": lambda: hooked("pre-hook"),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_what_computes_something_else_is_not_mistaken(name) -> None:
    projector = JoinedMerger(filled(LOOK_ALIKES[name]()), 4)
    assert normed_merger(projector) is None
    x = tokens(projector)
    got = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(got, frobenius(projector, x), rtol=1e-6, atol=0)


def test_other_forwards_of_two_layers_are_not_mistaken() -> None:
    class Doubled(LlavaMultiModalProjector):
        def forward(self, image_features: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(image_features)

    projector = plain(LlavaConfig, Doubled)
    assert two_layer(projector) is None
    x = tokens(projector)
    want = frobenius(projector, x)
    got = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_an_attribute_changes_what_is_recognised() -> None:
    """The same module, read again after it was switched to the other norm's place."""
    merger = qwen3()
    assert normed_merger(JoinedMerger(merger, 4)).groups == 4
    merger.use_postshuffle_norm = True
    assert normed_merger(JoinedMerger(merger, 4)) is None  # its norm no longer fits
    merger.use_postshuffle_norm = False
    assert normed_merger(JoinedMerger(merger, 4)).groups == 4


def test_a_gemma_norm_is_told_from_others() -> None:
    merger = filled(Merger(Gemma3RMSNorm(12, eps=1e-6), 4, nn.GELU()))
    assert normed_merger(JoinedMerger(merger, 4)).norm.shift == 1
    assert normed_merger(NORMED["rms"][0]()).norm.shift == 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_changes_nothing_and_draws_nothing(estimator) -> None:
    merger = filled(Merger(nn.LayerNorm(12), 4, nn.GELU()))
    merger.mlp.insert(2, nn.Dropout(0.5))
    projector = JoinedMerger(merger, 4)
    x = tokens(projector)
    want = sensitivity(projector, x, estimator=estimator)
    state = torch.get_rng_state()
    projector.train()
    assert torch.equal(sensitivity(projector, x, estimator=estimator), want)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(layer.training for layer in projector.modules())


def test_looking_leaves_the_module_as_it_was() -> None:
    projector = JoinedMerger(qwen3(), 4)
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    calls = []
    projector.merger.linear_fc1.register_forward_hook(lambda *arguments: calls.append(1))
    assert normed_merger(projector) is None
    assert not calls
    for name, value in projector.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_hook_that_only_reads_is_looked_through(monkeypatch) -> None:
    """As families put one on a projector: neither recognising nor scoring calls it."""
    projector, calls = JoinedMerger(qwen3(), 4), []
    x = tokens(projector)
    want = sensitivity(projector, x, estimator="exact")

    @reads_only
    def hook(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        calls.append(1)

    projector.merger.register_forward_hook(hook)
    monkeypatch.setattr("llava.pruning.importance.projectors._forms", Answers())
    assert torch.equal(sensitivity(projector, x, estimator="exact"), want)
    assert not calls
    projector(x)
    assert calls == [1]


# --- offloaded weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["qwen3-vl", "llava"])
def test_offloaded_weights_score_the_same(name, where, tmp_path) -> None:
    projector = (PLAIN | {key: build for key, (build, _) in NORMED.items()})[name]().float()
    x = tokens(projector, dtype=torch.float32)
    want = {kind: sensitivity(projector, x, estimator=kind) for kind in ESTIMATORS}
    cut = sensitivity(low_rank(projector, 3), x)
    if where == "disk":
        disk_offload(projector, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        cpu_offload(projector, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in projector.parameters())
    before = [dict(vars(layer)) for layer in projector.modules()]
    for kind in ESTIMATORS:
        assert torch.equal(sensitivity(projector, x, estimator=kind), want[kind])
    loaded = at_hand(projector, x.device)
    assert torch.equal(sensitivity(low_rank(loaded, 3), x), cut)
    assert weights_of(at_hand(projector, x.device)) is weights_of(loaded)  # loaded once
    assert [dict(vars(layer)) for layer in projector.modules()] == before
    assert all(weight.is_meta for weight in projector.parameters())


def test_weights_without_data_are_refused() -> None:
    projector = PLAIN["llava"]()
    x = tokens(projector)
    with pytest.raises(PruningError, match="projector's weight has no data to score with"):
        sensitivity(projector.to("meta"), x)


# --- what methods ask for -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["zoo", "zoo-exact"])
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl"])
def test_methods_select(name, method, monkeypatch) -> None:
    projector = NORMED[name][0]()
    x = draw(40, 48, seed=2)
    arguments = {"features": x, "projected": projector(x), "projector": projector}
    kept = select(method, keep_tokens=9, **arguments)
    assert kept.shape == (9,)
    as_black_box(monkeypatch)
    assert torch.equal(kept, select(method, keep_tokens=9, **arguments))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_low_rank_of_a_merger(estimator) -> None:
    """Its weights are cut, its norm is not; at full rank it scores like the whole."""
    projector = JoinedMerger(qwen3(), 4)
    x = tokens(projector)
    want = sensitivity(projector, x, estimator=estimator)
    cut = low_rank(projector, 3)
    assert low_rank(JoinedMerger(projector.merger, 4), 3).merger is cut.merger  # made once
    assert normed_merger(cut) is not None
    if estimator == "exact":
        got = sensitivity(cut, x, estimator="exact")
        torch.testing.assert_close(got, frobenius(cut, x), rtol=1e-9, atol=0)
    full = sensitivity(low_rank(projector, 48), x, estimator=estimator)
    torch.testing.assert_close(full, want, rtol=1e-9, atol=0)


def test_low_rank_of_a_plain_projector() -> None:
    projector = PLAIN["llava"]()
    parts = two_layer(projector)
    twin = nn.Sequential(parts.first, nn.GELU(), parts.second)
    x = tokens(projector)
    for copies in (lambda p: low_rank(p, 3), lambda p: untrained(p, 3, 0)):
        got = sensitivity(copies(projector), x, estimator="exact")
        assert torch.equal(got, sensitivity(copies(twin), x, estimator="exact"))


def test_what_a_merger_cannot_do_is_refused() -> None:
    projector = JoinedMerger(qwen3(), 4)
    with pytest.raises(PruningError, match="use projector_weights='trained'"):
        untrained(projector, 3, 0)
    with pytest.raises(PruningError, match="leave it out"):
        sensitivity(projector, tokens(projector), hidden=draw(9, 48))
    with pytest.raises(PruningError, match="takes tokens of width 48, features have 24"):
        sensitivity(projector, draw(9, 24))
