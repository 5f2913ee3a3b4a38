"""Projectors of transformers' own classes and others like them, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
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
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from llava.pruning.importance import sensitivity as module
from llava.pruning.importance.projectors import (
    JoinedMerger,
)

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


def as_black_box(monkeypatch) -> None:
    """Let no form be recognised from here on."""
    for name in ("two_layer", "normed_merger"):
        monkeypatch.setattr(module, name, lambda projector: None)
