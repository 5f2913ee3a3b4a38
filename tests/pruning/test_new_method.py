"""One class with one method of its own is a pruning method everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pruning_checks as checks
import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningError, get_method, list_methods, prune, select
from llava.pruning.__main__ import main
from llava.pruning.method import Picks, PruningMethod

CHECKPOINT = Path(__file__).parents[1] / "goldens" / "llava" / "checkpoints" / "llava15-tiny"


@dataclass(frozen=True)
class LastTokens(PruningMethod):
    """Keep the last k tokens of every tile."""

    name: ClassVar[str] = "last-tokens"
    signal: ClassVar[str] = "place"
    paper: ClassVar[str] = "this test"
    equivariant: ClassVar[bool] = False

    def select(self, rows):
        return Picks.stack([tokens[-count:] for _, count, tokens in rows])


@pytest.fixture
def name() -> Iterator[str]:
    with checks.registered(LastTokens) as name:
        yield name


def test_it_is_listed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in list_methods()
    assert get_method(name) is LastTokens
    main(["list", "--markdown"])
    line = "| last-tokens | place | - | no | no | own | n/a | n/a | this test |"
    assert line in capsys.readouterr().out.splitlines()


def test_it_selects(name: str) -> None:
    tokens = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert select(name, projected=tokens, keep_tokens=3).tolist() == [6, 7, 8]


def test_it_prunes_a_model(name: str) -> None:
    model = load_pretrained_model(str(CHECKPOINT), device="cpu")[1]
    side = model.get_vision_tower().config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    prompt = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, 6]])
    with torch.no_grad(), prune(model, name, keep_tokens=16):
        every = model.encode_visual_tokens(pixels)
        embeds = model.prepare_inputs_labels_for_multimodal(
            prompt, None, torch.ones_like(prompt), None, None, pixels
        )[4]
        answer = model.generate(prompt, images=pixels, max_new_tokens=2, do_sample=False)
    assert embeds.shape[1] == 16 + 3
    torch.testing.assert_close(embeds[0, 1:17], every.projected[0, -16:], rtol=0, atol=1e-6)
    assert answer.shape[0] == 1


def test_it_is_gone_afterwards() -> None:
    with checks.registered(LastTokens):
        pass
    assert "last-tokens" not in list_methods()
    with pytest.raises(PruningError, match="last-tokens"):
        get_method("last-tokens")
