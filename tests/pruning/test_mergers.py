"""Sensitivity of the projectors of other model families, built by transformers' own classes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.idefics3.configuration_idefics3 import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3SimpleMLP
from transformers.models.internvl.configuration_internvl import InternVLConfig
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next.configuration_llava_next import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector
from transformers.models.llava_onevision.configuration_llava_onevision import LlavaOnevisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import (
    LlavaOnevisionMultiModalProjector,
)
from transformers.models.paligemma.configuration_paligemma import PaliGemmaConfig
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from llava.pruning import PruningError, select, sensitivity
from llava.pruning.importance import normed
from llava.pruning.importance import sensitivity as module
from llava.pruning.importance.derivatives import derivative, elementwise
from llava.pruning.importance.projectors import (
    JoinedMerger,
    linear_matrix,
    low_rank,
    normed_merger,
    two_layer,
    untrained,
)
from llava.pruning.importance.structure import Answers, reads_only
from llava.pruning.late_checks import collecting

FP64, BF16 = torch.float64, torch.bfloat16
ESTIMATORS = ("zeroth_order", "exact")
VISION = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"hidden_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = FP64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=FP64).to(dtype)


def filled(projector: nn.Module, dtype: torch.dtype = FP64) -> nn.Module:
    """Give every weight, those of norms included, random numbers."""
    with torch.no_grad():
        for seed, p in enumerate(projector.parameters()):
            p.copy_(draw(*p.shape, seed=seed) * 0.4)
    return projector.to(dtype).eval()


def plain(config_class: type, projector_class: type, **settings) -> nn.Module:
    vision = {"model_type": "clip_vision_model", **VISION}
    text = {"model_type": "llama", "intermediate_size": 8, "vocab_size": 8, **TEXT}
    config = config_class(vision_config=vision, text_config=text, **settings)
    return filled(projector_class(config))


def internvl(act: str = "gelu") -> nn.Module:
    text = {"model_type": "qwen2", "intermediate_size": 8, "vocab_size": 8, **TEXT}
    config = InternVLConfig(vision_config=VISION, text_config=text, projector_hidden_act=act)
    return filled(InternVLMultiModalProjector(config))


def qwen3(after_joining: bool = False) -> nn.Module:
    config = Qwen3VLVisionConfig(hidden_size=12, out_hidden_size=20, num_heads=2, depth=1)
    return filled(Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=after_joining))


class RootMeanSquare(nn.Module):
    """RMSNorm that stays in float64, where transformers' goes through float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (
            x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        )


class Shifted(RootMeanSquare):
    """As in Gemma: the weight is kept as its difference from 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + self.weight) / self.weight


class Merger(nn.Module):
    """A merger of any norm and activation: patches [n * groups, width] to tokens [n, out]."""

    def __init__(self, norm: nn.Module, groups: int, act: nn.Module, sides=(12, 30, 20)) -> None:
        super().__init__()
        width, inner, out = sides
        self.norm = norm
        self.mlp = nn.Sequential(nn.Linear(groups * width, inner), act, nn.Linear(inner, out))
        self.joined = groups * width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x).view(-1, self.joined))


# Projector of [n, Dv], and whether it computes in float64 throughout.
NORMED: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "internvl": (internvl, True),
    "qwen2-vl": (lambda: JoinedMerger(filled(PatchMerger(20, 12)), 4), True),
    "qwen2.5-vl": (lambda: JoinedMerger(filled(Qwen2_5_VLPatchMerger(20, 12)), 4), False),
    "qwen3-vl": (lambda: JoinedMerger(qwen3(), 4), True),
    "qwen3-vl deepstack": (lambda: qwen3(after_joining=True), True),
    "rms": (lambda: JoinedMerger(filled(Merger(RootMeanSquare(12, 1e-6), 4, nn.GELU())), 4), True),
    "large eps": (
        lambda: JoinedMerger(filled(Merger(nn.LayerNorm(12, 2.0), 4, nn.GELU())), 4),
        True,
    ),
    "rms, large eps": (
        lambda: JoinedMerger(filled(Merger(RootMeanSquare(12, 2.0), 2, nn.SiLU())), 2),
        True,
    ),
    "no eps": (lambda: JoinedMerger(filled(Merger(nn.LayerNorm(12, 0.0), 4, nn.SiLU())), 4), True),
    "gemma norm": (lambda: JoinedMerger(filled(Merger(Shifted(12, 1e-3), 3, nn.Tanh())), 3), True),
    "no weights in the norm": (
        lambda: filled(
            nn.Sequential(
                nn.LayerNorm(12, elementwise_affine=False),
                nn.Linear(12, 300, bias=False),
                nn.GELU("tanh"),
                nn.Linear(300, 7),
            )
        ),
        True,
    ),
    "wide": (
        lambda: JoinedMerger(filled(Merger(nn.LayerNorm(8), 9, nn.GELU(), (8, 600, 700))), 9),
        True,
    ),
}
PLAIN = {
    "llava": lambda: plain(LlavaConfig, LlavaMultiModalProjector),
    "llava-next": lambda: plain(LlavaNextConfig, LlavaNextMultiModalProjector),
    "llava-onevision": lambda: plain(LlavaOnevisionConfig, LlavaOnevisionMultiModalProjector),
    "no bias": lambda: plain(
        LlavaConfig, LlavaMultiModalProjector, multimodal_projector_bias=False
    ),
    "tanh": lambda: plain(
        LlavaConfig, LlavaMultiModalProjector, projector_hidden_act="gelu_pytorch_tanh"
    ),
}


def width_of(projector: nn.Module) -> int:
    return next(layer.in_features for layer in projector.modules() if isinstance(layer, nn.Linear))


def tokens(projector: nn.Module, count: int = 9, dtype: torch.dtype = FP64) -> torch.Tensor:
    """Tokens of different sizes, off the origin."""
    sizes = torch.logspace(-1, 1, count, dtype=FP64)[:, None]
    return ((draw(count, width_of(projector), seed=7) + 0.3) * sizes).to(dtype)


def frobenius(projector: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """||J||_F / sqrt(Dv) from brute-force Jacobians, token by token."""
    jacobian = torch.func.jacrev(lambda row: projector(row[None])[0])
    return torch.stack([jacobian(row).norm() for row in x]) / x.shape[1] ** 0.5


@pytest.fixture
def as_black_box(monkeypatch):
    def switch() -> None:
        for name in ("two_layer", "normed_merger"):
            monkeypatch.setattr(module, name, lambda projector: None)

    return switch


# --- normed mergers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMED)
def test_closed_form_equals_brute_force_jacobians(name) -> None:
    build, double = NORMED[name]
    projector = build()
    assert normed_merger(projector) is not None
    x = tokens(projector)
    got = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(
        got, frobenius(projector, x), rtol=1e-9 if double else 1e-5, atol=1e-12
    )


@pytest.mark.parametrize("name", NORMED)
def test_shortcut_equals_black_box(name, as_black_box) -> None:
    build, double = NORMED[name]
    projector = build()
    x = tokens(projector)
    short = sensitivity(projector, x)
    as_black_box()
    want = sensitivity(projector, x)
    torch.testing.assert_close(short, want, rtol=1e-9 if double else 1e-2, atol=0)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "silu", "relu", "quick_gelu"])
def test_activations_of_transformers(act) -> None:
    projector = internvl(act)
    assert normed_merger(projector) is not None
    x = tokens(projector)
    got = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(got, frobenius(projector, x), rtol=1e-9, atol=0)


def test_a_token_without_variance() -> None:
    """v = 0 and sigma = sqrt(eps): the largest derivative there is, and no division by zero."""
    projector = JoinedMerger(qwen3(), 4)
    x = torch.full((2, 48), 0.7, dtype=FP64)
    x[1] = tokens(projector)[3]
    got = sensitivity(projector, x, estimator="exact")
    torch.testing.assert_close(got, frobenius(projector, x), rtol=1e-9, atol=0)
    assert torch.isfinite(sensitivity(projector, x)).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NORMED)
def test_float32_is_close_to_float64(name, estimator) -> None:
    build, _ = NORMED[name]
    projector = build()
    x = tokens(projector, dtype=torch.float32)
    want = sensitivity(projector, x.double(), estimator=estimator)
    got = sensitivity(projector.float(), x, estimator=estimator)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_precision_of_products(estimator, dtype) -> None:
    """float32 in 16-bit models, unless `compute` says otherwise; that is below the spread."""
    projector = JoinedMerger(qwen3(), 4).to(dtype)
    x = tokens(projector, 40, dtype)
    want = sensitivity(copy.deepcopy(projector).double(), x.double(), estimator=estimator)
    errors = [
        float(((got.double() - want) / want).abs().max())
        for compute in ("float32", "split", "bf16")
        for got in [sensitivity(projector, x, estimator=estimator, compute=compute)]
    ]
    assert errors[0] < 1e-4 and errors[1] < 4e-3 and 1e-5 < errors[2] < 4e-3


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", ["qwen3-vl", "internvl"])
def test_a_row_scores_the_same_alone_in_a_batch_and_in_pieces(name, estimator, monkeypatch) -> None:
    projector = NORMED[name][0]().float()
    x = torch.stack([tokens(projector, 31, torch.float32), draw(31, 48, dtype=torch.float32)])
    batch = sensitivity(projector, x, estimator=estimator)
    for row in range(2):
        assert torch.equal(batch[row], sensitivity(projector, x[row].clone(), estimator=estimator))
    projector, x = projector.double(), x.double()
    whole = sensitivity(projector, x, estimator=estimator)
    for size in (1, 100_000):
        monkeypatch.setattr(module, "CHUNK_BYTES", size)
        pieces = sensitivity(projector, x, estimator=estimator)
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_waits_for_an_accelerator(estimator) -> None:
    """A meta tensor has no data, so whatever reads some raises."""
    for build in (internvl, lambda: JoinedMerger(qwen3(), 4), PLAIN["llava"]):
        projector = build().to("meta", BF16)
        x = torch.empty(2, 30, width_of(projector), device="meta", dtype=BF16)
        for compute in ("float32", "split", "bf16"):
            with collecting() as late:
                for _ in range(2):
                    scores = sensitivity(projector, x, estimator=estimator, compute=compute)
            assert scores.shape == (2, 30)
            assert late  # the second call checks the weights, later
            late.clear()


def test_forms_are_made_once_and_follow_the_weights(monkeypatch) -> None:
    merger = qwen3()
    x, calls = tokens(JoinedMerger(merger, 4)), []
    make = normed._quadratic_forms

    def counted(*arguments):
        calls.append(1)
        return make(*arguments)

    monkeypatch.setattr(normed, "_quadratic_forms", counted)
    for _ in range(3):
        sensitivity(JoinedMerger(merger, 4), x, estimator="exact")
    assert len(calls) == 1
    for layer in (merger.norm, merger.linear_fc1, merger.linear_fc2):
        layer.weight.data.mul_(1.5)
        got = sensitivity(JoinedMerger(merger, 4), x, estimator="exact")
        want = frobenius(JoinedMerger(merger, 4), x)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    assert len(calls) == 4


def test_joined_merger_shares_the_merger() -> None:
    merger = qwen3()
    joined, x = JoinedMerger(merger, 4), draw(2, 5, 48)
    assert {p.data_ptr() for p in joined.parameters()} == {
        p.data_ptr() for p in merger.parameters()
    }
    assert torch.equal(joined(x), merger(x.view(-1, 12)).view(2, 5, 20))
    with pytest.raises(PruningError, match="groups must be at least 1"):
        JoinedMerger(merger, 0)


# --- what is recognised ---------------------------------------------------------------------------


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


# --- what methods ask for -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["zoo", "zoo-exact"])
@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl"])
def test_methods_select(name, method, as_black_box) -> None:
    projector = NORMED[name][0]()
    x = draw(40, 48, seed=2)
    arguments = {"features": x, "projected": projector(x), "projector": projector}
    kept = select(method, keep_tokens=9, **arguments)
    assert kept.shape == (9,)
    as_black_box()
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
