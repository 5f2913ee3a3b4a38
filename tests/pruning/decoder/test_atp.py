"""ATP: scores against plain loops, thresholds by hand, counts of each image, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

from llava.model.language_model.decoder_layers import TransformersDecoder
from llava.pruning import PruningError
from llava.pruning.decoder.call import decoding
from llava.pruning.decoder.columns import PlacedImage, VisualColumns
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.layers import attention_rows
from llava.pruning.decoder.method import Stage
from llava.pruning.decoder.methods.atp import ATP, attention_of_text, received_logits
from llava.pruning.decoder.trace import DecoderTrace

TOKENS = 16
LAYERS = (1, 3)


def tensors_of(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in LAYERS:
        shapes = {"projection": (5, 2 * TOKENS), "redundant": (1, 5), "spatial": (1, 5)}
        for part, shape in shapes.items():
            made[f"modules.{layer}.{part}.weight"] = torch.randn(shape, generator=generator) / 3
            made[f"modules.{layer}.{part}.bias"] = torch.randn(shape[:1], generator=generator) / 3
    return made


@pytest.fixture
def heads(tmp_path: Path) -> str:
    save_file(tensors_of(), tmp_path / "heads.safetensors")
    return str(tmp_path / "heads.safetensors")


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    torch.manual_seed(5)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=8, num_hidden_layers=4, num_key_value_heads=2, **settings)
    return LlamaModel(config).eval().double()


def prompts(*texts: int) -> VisualColumns:
    """Rows of two tokens of text, an image, and so many more of text."""
    rows = []
    for number, text in enumerate(texts):
        image = torch.full((2 + TOKENS + text,), -1)
        image[2 : 2 + TOKENS] = number
        place = torch.zeros_like(image)
        place[2 : 2 + TOKENS] = torch.arange(TOKENS)
        rows.append((image, place))
    return VisualColumns.of_rows(rows, [PlacedImage(TOKENS)] * len(texts), "left")


def run(
    model: LlamaModel, columns: VisualColumns, embeds: Tensor, **options: object
) -> tuple[DecoderTrace, Tensor]:
    traces: list[DecoderTrace] = []
    config = DecoderConfig("atp", options=options)
    decoder = TransformersDecoder(model)
    mask = columns.mask.long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), decoding(decoder, config, columns, generating=True, done=traces.append):
        out = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=places,
            past_key_values=DynamicCache(),
        )
    return traces[0], out.last_hidden_state[:, -1]


def stage_of(model: LlamaModel, left: list[int], text: int = 3) -> Stage:
    """One prompt with the image's tokens at these places left."""
    width = 2 + len(left) + text
    torch.manual_seed(8)
    hidden = torch.randn(1, width, 32, dtype=torch.float64)
    decoder = TransformersDecoder(model)
    is_text = torch.ones(1, width, dtype=torch.bool)
    is_text[:, 2 : 2 + len(left)] = False
    return Stage(
        decoder=decoder,
        layer=1,
        cuts=[0],
        hidden=hidden,
        rotary=decoder.rotary(hidden, torch.arange(width)[None]),
        valid=torch.ones(1, width, dtype=torch.bool),
        columns=torch.arange(2, 2 + len(left))[None],
        present=torch.ones(1, len(left), dtype=torch.bool),
        rows=torch.tensor([0]),
        text=is_text,
        place=torch.tensor([left]),
        counts=[len(left)],
        images=(PlacedImage(TOKENS),),
    )


def test_scores_equal_plain_loops(model: LlamaModel) -> None:
    stage = stage_of(model, [0, 2, 3, 9, 15])
    with torch.no_grad():
        queries = stage.decoder.queries(1, stage.hidden, stage.rotary)[0]
        keys = stage.decoder.keys(1, stage.hidden, stage.rotary)[0]
        every = torch.arange(stage.hidden.shape[1])[None]
        attention = attention_rows(
            stage.decoder, 1, stage.hidden, stage.rotary, stage.valid, every
        )[0].mean(dim=0)
        logits, cross = received_logits(stage)[0], attention_of_text(stage)[0]
    for j in range(5):
        products = [
            float(queries[h, 2 + i] @ keys[h, 2 + j]) / 8**0.5
            for i in range(j, 5)
            for h in range(4)
        ]
        assert float(logits[j]) == pytest.approx(sum(products) / len(products), abs=1e-12)
        text = [float(attention[7 + t, 2 + j]) for t in range(3)]
        assert float(cross[j]) == pytest.approx(sum(text) / 3, abs=1e-12)


def test_thresholds_and_the_grid_decide(model: LlamaModel, heads: str) -> None:
    left = [0, 2, 3, 9, 10, 15]
    stage, own = stage_of(model, left), tensors_of()
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.4, 0.3]], dtype=torch.float64)
    read = torch.zeros(2 * TOKENS, dtype=torch.float64)
    grid = [0.25 if place // 4 % 2 == 0 and place % 4 % 2 == 0 else 0.0 for place in left]
    assert grid == [0.25, 0.25, 0, 0, 0.25, 0]
    read[left] = scores[0]
    read[[TOKENS + place for place in left]] = torch.tensor(grid).double()

    def linear(name: str, values: Tensor) -> Tensor:
        weight, bias = own[f"modules.1.{name}.weight"], own[f"modules.1.{name}.bias"]
        return weight.double() @ values + bias.double()

    hidden = linear("projection", read)
    theta_r, theta_s = (float(linear(n, hidden).sigmoid()) for n in ("redundant", "spatial"))
    kept = [
        place
        for place, (red, spat) in enumerate(zip(scores[0].tolist(), grid, strict=True))
        if red > theta_r or spat > theta_s
    ]
    assert ATP(heads=heads).select(stage, scores, [6])[0].tolist() == kept
    assert 0 < len(kept) < 6


def test_one_token_stays_where_none_is_above(model: LlamaModel, tmp_path: Path) -> None:
    own = {name: torch.zeros_like(part) for name, part in tensors_of().items()}
    for layer in LAYERS:
        own[f"modules.{layer}.redundant.bias"] += 20
        own[f"modules.{layer}.spatial.bias"] += 20
    save_file(own, tmp_path / "strict.safetensors")
    method = ATP(heads=str(tmp_path / "strict.safetensors"))
    scores = torch.tensor([[0.1, 0.3, 0.9, 0.2]])
    assert method.select(stage_of(model, [1, 5, 6, 8]), scores, [4]).tolist() == [[2]]


def test_images_of_a_batch_keep_what_they_keep_alone(model: LlamaModel, heads: str) -> None:
    columns = prompts(5, 3, 9)
    generator = torch.Generator().manual_seed(4)
    embeds = torch.randn(3, columns.width, 32, dtype=torch.float64, generator=generator)
    both, last = run(model, columns, embeds, heads=heads)
    assert len(set(both.tokens_last)) > 1, "the case must have counts that differ"
    assert all(counts[0] == TOKENS for counts in both.per_layer)
    for row in range(3):
        start = int((~columns.mask[row]).sum())
        alone, own = run(model, columns.row(row, start), embeds[row : row + 1, start:], heads=heads)
        assert alone.per_layer[0] == both.per_layer[row]
        torch.testing.assert_close(own[0], last[row], atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("options", "budget", "message"),
    [
        ({}, None, "heads=FILE with trained thresholds; .* the authors released none"),
        ({"heads": "missing.safetensors"}, None, "missing.safetensors cannot be read"),
        ({"heads": "HEADS"}, 64, "atp has no budget"),
        ({"heads": "HEADS", "strides": [2, 2, 4]}, None, "one for each of the 2 modules"),
    ],
)
def test_bad_settings_are_named(
    options: dict, budget: int | None, message: str, heads: str
) -> None:
    own = {key: heads if value == "HEADS" else value for key, value in options.items()}
    with pytest.raises(PruningError, match=message):
        DecoderConfig("atp", keep_tokens=budget, options=own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules.1.spatial.bias": None}, "lack modules.1.spatial.bias"),
        ({"modules.1.spatial.bias": torch.zeros(2)}, r"modules.1.spatial.bias .* is \[2\]"),
        ({"modules.3.projection.weight": torch.zeros(5)}, r"projection.weight .* is \[5\]"),
        ({"modules.3.redundant.bias": torch.tensor([torch.nan])}, "NaN or inf"),
        ({"other.weight": torch.zeros(2)}, "hold 'other.weight'"),
    ],
)
def test_bad_files_are_named(change: dict, message: str, tmp_path: Path) -> None:
    own = {**tensors_of(), **change}
    file = tmp_path / "bad.safetensors"
    save_file({name: part for name, part in own.items() if part is not None}, file)
    with pytest.raises(PruningError, match=message):
        ATP(heads=str(file))


def test_images_of_another_size_are_refused(model: LlamaModel, heads: str) -> None:
    stage = stage_of(model, [0, 1])
    stage.images = (PlacedImage(25),)
    with pytest.raises(PruningError, match="for images of 16 tokens in a square"):
        ATP(heads=heads).select(stage, torch.zeros(1, 2), [2])


def test_a_model_that_is_too_shallow_is_refused(heads: str) -> None:
    with pytest.raises(PruningError, match="layers must ascend and lie in 1 to 2"):
        ATP(heads=heads).plan(TOKENS, 3, None)
