"""LLaVA-1.6 end to end: batches of rows that differ in images and tiles, pruned and not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import MistralConfig, MistralForCausalLM

from llava.anyres import NEXT_PROTOCOLS, SPATIAL_PROTOCOLS
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, prune, prune_visual_tokens
from llava.pruning.layout import NEWLINE
from llava.pruning.visualize import kept_pixels, overlay_tokens
from llava.utils import UserInputError

IMG = IMAGE_TOKEN_INDEX
ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "llava"
# (width, height) and tiles: 2 x 2, 3 in a row, 3 in a column, 2 in a row.
SIZES = [(64, 48), (118, 31), (26, 90), (41, 12)]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
Make = Callable[..., LlavaLlamaForCausalLM]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Noise of (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def prepared(model, sizes: list[tuple[int, int]]) -> dict:
    """`images` and `image_sizes` of noise pictures, the same for the same size and place."""
    pictures = [picture(size, seed) for seed, size in enumerate(sizes)]
    pixels = process_images(pictures, model.get_vision_tower().image_processor, model.config)
    return {"images": pixels, "image_sizes": sizes}


def batch(rows: list[list[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded on one side."""
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    both = zip(rows, pads, strict=True)
    ids = [[*pad, *row] if left else [*row, *pad] for row, pad in both]
    both = zip(rows, pads, strict=True)
    mask = [[*pad, *([1] * len(row))] if left else [*([1] * len(row)), *pad] for row, pad in both]
    return torch.tensor(ids), torch.tensor(mask)


# Two images, one, none (with its dummy image), one, and two of the same: B = 5.
ROWS = [[1, 5, IMG, 6, IMG, 7], [1, IMG, 8], [1, 20, 21], [9, IMG], [1, IMG, 3, IMG]]
SHOWN = [SIZES[0], SIZES[1], SIZES[2], SIZES[0], SIZES[3], SIZES[3], SIZES[1]]
OWNED = [(0, 1), (2,), (3,), (4,), (5, 6)]
SETTINGS = [
    None,
    {"method": "zoo", "keep_tokens": 9},
    {"method": "zoo", "keep_tokens": 12, "newline": "keep"},
    {"method": "divprune", "keep_ratio": 0.4, "allocation": "global"},
    {"method": "zoo", "keep_tokens": 9, "positions": "original"},
    {"method": "random", "keep_tokens": 9},
]


@pytest.mark.parametrize("pruning", SETTINGS)
@pytest.mark.parametrize("left", [True, False])
def test_batch_equals_rows(pruning, left, small_next: Make) -> None:
    model = small_next()
    model.pruning = pruning
    inputs = prepared(model, SHOWN)
    ids, mask = batch(ROWS, left)
    together = model.generate(ids, attention_mask=mask, **inputs, **GREEDY)
    kept = together_kept(model, inputs)
    for row, images in enumerate(OWNED):
        own = {
            "images": [inputs["images"][i] for i in images],
            "image_sizes": [SHOWN[i] for i in images],
        }
        alone = model.generate(torch.tensor([ROWS[row]]), **own, **GREEDY)
        assert together[row].tolist() == alone[0].tolist()
        if pruning is not None and pruning["method"] != "random":
            assert together_kept(model, own) == [kept[i] for i in images]


def together_kept(model, inputs: dict) -> list[list[int]]:
    """Places of the kept tokens of every image; these tiny cases have no near ties."""
    visual = model.prune_visual_tokens(model.encode_visual_tokens(**inputs))
    return [visual.sequence(image).place.tolist() for image in range(visual.num_images)]


@pytest.mark.parametrize("settings", [{"method": "none"}, {"method": "zoo", "keep_ratio": 1.0}])
def test_a_full_budget_is_the_unpruned_model(settings, small_next: Make) -> None:
    model = small_next()
    inputs = prepared(model, SHOWN)
    ids, mask = batch(ROWS)
    wanted = model(ids, attention_mask=mask, **inputs).logits
    model.pruning = settings
    assert torch.equal(model(ids, attention_mask=mask, **inputs).logits, wanted)


def test_embeddings_labels_and_mask_stay_aligned(small_next: Make) -> None:
    model = small_next()
    inputs = prepared(model, SHOWN)
    ids, mask = batch(ROWS)
    labels = ids.masked_fill((ids == IMG) | (mask == 0), IGNORE_INDEX)
    model.pruning = {"method": "zoo", "keep_tokens": 10, "newline": "keep"}
    with torch.no_grad():
        visual = model.prune_visual_tokens(model.encode_visual_tokens(**inputs))
        out = model.prepare_inputs_labels_for_multimodal(
            *(ids, None, mask, None, labels), *inputs.values()
        )
    embed = model.get_model().embed_tokens
    for row, (given, images) in enumerate(zip(ROWS, OWNED, strict=True)):
        parts, wanted, shown = [], [], iter(images)
        for token in given:
            tokens = visual.embeddings(next(shown)) if token == IMG else embed.weight[[token]]
            parts.append(tokens)
            wanted += [IGNORE_INDEX] * len(tokens) if token == IMG else [token]
        merged = torch.cat(parts)
        assert torch.equal(out[4][row, : len(merged)], merged)
        assert out[5][row, : len(merged)].tolist() == wanted
        assert out[2][row].tolist() == [1] * len(merged) + [0] * (out[2].shape[1] - len(merged))


def test_original_positions(small_next: Make) -> None:
    """Every token where it stood in the unpruned sequence, text included; then one after it."""
    model = small_next()
    inputs = prepared(model, SHOWN)
    ids, mask = batch(ROWS)
    with torch.no_grad():
        lengths = model.prepare_inputs_labels_for_multimodal(
            *(ids, None, mask, None, None), *inputs.values()
        )[2].sum(dim=1)
        model.pruning = {"method": "zoo", "keep_tokens": 9, "positions": "original"}
        visual = model.prune_visual_tokens(model.encode_visual_tokens(**inputs))
        out = model.prepare_inputs_labels_for_multimodal(
            *(ids, None, None, None, None), *inputs.values()
        )
        assert out[1] is not None and out[2] is not None, "positions need a mask too"
        out = model.prepare_inputs_labels_for_multimodal(
            *(ids, None, mask, None, None), *inputs.values()
        )
    for row, (given, images) in enumerate(zip(ROWS, OWNED, strict=True)):
        wanted, start, shown = [], 0, iter(images)
        for token in given:
            if token != IMG:
                wanted.append(start)
                start += 1
                continue
            sequence = visual.sequence(next(shown))
            wanted += [start + place for place in sequence.place.tolist()]
            start += sequence.total
        assert start == lengths[row]
        assert out[1][row, : len(wanted)].tolist() == wanted
    # Prompts end with text, so decoding goes on where a longer prompt would put the same tokens.
    own = {"images": [inputs["images"][2]], "image_sizes": SHOWN[2:3]}
    new = model.generate(ids[1:2, :3], **own, **GREEDY)
    sequence = torch.tensor([ROWS[1]])
    for token in new[0].tolist():
        assert model(sequence, **own).logits[0, -1].argmax() == token
        sequence = torch.cat([sequence, torch.tensor([[token]])], dim=1)


def test_second_turn_equals_a_fresh_run(small_next: Make) -> None:
    model = small_next()
    model.pruning = {"method": "zoo", "keep_tokens": 9}
    inputs = prepared(model, SIZES[:1])
    first = torch.tensor([[1, 5, IMG, 9]])
    answer = model.generate(first, **inputs, **GREEDY)
    second = torch.cat([first, answer, torch.tensor([[30, 31]])], dim=1)
    after_chat = model.generate(second, **inputs, **GREEDY)
    torch.manual_seed(7)
    fresh = small_next()
    fresh.pruning = model.pruning
    assert fresh.generate(second, **inputs, **GREEDY).tolist() == after_chat.tolist()


def test_global_random_state_is_left_alone(small_next: Make) -> None:
    model = small_next()
    model.pruning = {"method": "zoo", "keep_tokens": 9}
    inputs = prepared(model, SIZES)
    first = together_kept(model, inputs)
    state = torch.get_rng_state()
    assert together_kept(model, {key: value[::-1] for key, value in inputs.items()}) == first[::-1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("protocol", NEXT_PROTOCOLS)
def test_protocol_changes_the_unpruned_model_too(protocol, small_next: Make) -> None:
    model = small_next(mm_next_protocol=protocol)
    visual = model.encode_visual_tokens(**prepared(model, SIZES))
    counts = [len(visual.embeddings(image)) for image in range(4)]
    if protocol == "fixed2880":
        assert counts == [20, 20, 20, 20]
    elif protocol in SPATIAL_PROTOCOLS:
        assert counts == [4 * len(visual.tiles_of(image)) for image in range(4)]
        assert visual.valid is None and visual.newline is None
    else:
        assert counts[0] == 4 + 4 * (4 + 1) and len(set(counts)) > 1


def test_released_protocol_end_to_end(small_next: Make) -> None:
    model = small_next(mm_next_protocol="zoo-release")
    model.pruning = {"method": "zoo", "keep_tokens": 10}
    inputs = prepared(model, SIZES[:1])
    visual = model.prune_visual_tokens(model.encode_visual_tokens(**inputs))
    assert (visual.sequence(0).source != NEWLINE).all()
    # 2 of each of 5 tiles, and 4 rows with one more each, unless that was kept anyway.
    assert 10 < len(visual.embeddings(0)) <= 14


def test_errors(small_next: Make, small_model: Make, pixels) -> None:
    model = small_next()
    inputs = prepared(model, SIZES[:2])
    with pytest.raises(UserInputError, match="image_sizes"):
        model.encode_visual_tokens(inputs["images"])
    with pytest.raises(UserInputError, match="tiles, but 5 were given"):
        model.encode_visual_tokens(inputs["images"][:1], [SIZES[1]])
    grids = model.config.image_grid_pinpoints
    without = small_model(image_aspect_ratio="anyres", image_grid_pinpoints=grids)
    without.config.mm_patch_merge_type = "spatial_unpad"
    with pytest.raises(UserInputError, match="no image_newline among its weights"):
        without.encode_visual_tokens(**inputs)
    model.config.mm_next_protocol = "fixed"
    with pytest.raises(UserInputError, match="use one of native"):
        model.encode_visual_tokens(**inputs)


def as_mistral(llama: LlavaLlamaForCausalLM, folder: Path, **changes) -> LlavaMistralForCausalLM:
    """The same weights as a Mistral, saved in `folder` and loaded by what it holds."""
    llama.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
    (folder / "config.json").write_text(json.dumps(config | changes))
    model = load_pretrained_model(str(folder), device="cpu")[1]
    assert type(model) is LlavaMistralForCausalLM
    return model


@pytest.mark.parametrize("settings", SETTINGS[1:4])
def test_a_pruned_mistral_is_a_plain_one_on_pruned_tokens(
    settings: dict, tmp_path: Path, small_next: Make
) -> None:
    """transformers' Mistral reads what is pruned and spliced by hand; its window cuts in."""
    llama = small_next(num_key_value_heads=2, max_position_embeddings=512)
    model = as_mistral(llama, tmp_path / "llava", sliding_window=5)
    text = {
        key: value
        for key, value in model.config.to_dict().items()
        if not key.startswith(("mm_", "image_")) and key not in ("architectures", "model_type")
    }
    plain = MistralForCausalLM(MistralConfig(**text)).eval()
    beside = ("model.vision_tower.", "model.mm_projector.", "model.image_newline")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(beside)}
    plain.load_state_dict(weights)

    inputs = prepared(model, SHOWN)
    with torch.no_grad():
        visual = model.encode_visual_tokens(**inputs)
        pruned = prune_visual_tokens(visual, PruningConfig.from_dict(settings))
    wanted = []
    for row, images in zip(ROWS, OWNED, strict=True):
        shown = iter(images)
        pieces = [
            pruned.embeddings(next(shown))
            if token == IMG
            else plain.model.embed_tokens.weight[[token]]
            for token in row
        ]
        embeds = torch.cat(pieces)[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        new = plain.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
        wanted.append(new[0].tolist())
        assert embeds.shape[1] > 5 or IMG not in row, "too short for the window"
    ids, mask = batch(ROWS)
    model.pruning = settings
    assert model.generate(ids, attention_mask=mask, **inputs, **GREEDY).tolist() == wanted
    model.pruning = None
    unpruned = model.generate(ids, attention_mask=mask, **inputs, **GREEDY)
    assert unpruned.tolist() != wanted, "pruning changes nothing here"


def test_mistral(tmp_path: Path, small_next: Make) -> None:
    """Saved as a Mistral and loaded by what the folder holds, it answers like the same Llama."""
    llama = small_next(num_key_value_heads=2, max_position_embeddings=512)
    mistral = as_mistral(llama, tmp_path / "llava", sliding_window=None)
    inputs = prepared(llama, SHOWN)
    ids, mask = batch(ROWS)
    for pruning in (None, {"method": "zoo", "keep_tokens": 9}):
        llama.pruning = mistral.pruning = pruning
        with torch.no_grad():
            wanted = llama(ids, attention_mask=mask, **inputs).logits
            got = mistral(ids, attention_mask=mask, **inputs).logits
        assert torch.allclose(got, wanted, atol=1e-5)
        answers = [
            m.generate(ids, attention_mask=mask, **inputs, **GREEDY) for m in (llama, mistral)
        ]
        assert answers[0].tolist() == answers[1].tolist()
    mistral.save_pretrained(tmp_path / "again")
    again = load_pretrained_model(str(tmp_path / "again"), device="cpu")[1]
    assert type(again) is LlavaMistralForCausalLM
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in mistral.state_dict().items()
    )


def test_the_tower_of_the_checkpoint_is_used_and_named(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    model = load_pretrained_model(str(GOLDENS / "checkpoints" / "llava16-tiny"), device="cpu")[1]
    assert model.get_vision_tower().from_checkpoint
    assert "the vision tower's weights come from" in caplog.text
    stock = load_pretrained_model(str(GOLDENS / "checkpoints" / "llava15-tiny"), device="cpu")[1]
    ours, theirs = (m.get_vision_tower().state_dict() for m in (model, stock))
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)
    model.save_pretrained(tmp_path)
    again = load_pretrained_model(str(tmp_path), device="cpu")[1]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.fixture(scope="module")
def tiled_tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """llava-tiny, the same weights, looking at images in tiles."""
    folder = tmp_path_factory.mktemp("tiny") / "llava-tiny"
    ignored = shutil.ignore_patterns("benchmark")
    shutil.copytree(ROOT / "playground" / "llava-tiny", folder, ignore=ignored)
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_aspect_ratio": "anyres", "tokenizer_model_max_length": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return load_pretrained_model(str(folder), device="cpu")


@pytest.mark.parametrize("merge", ["flat", "spatial"])
@pytest.mark.parametrize("keep", [160, 320, 640])
def test_llava_tiny_on_tiles(keep, merge, tiled_tiny) -> None:
    tokenizer, model, processor, _ = tiled_tiny
    model.config.mm_patch_merge_type = merge
    image = Image.open(ROOT / "playground" / "llava-tiny" / "example.png").convert("RGB")
    inputs = {
        "images": process_images([image], processor, model.config),
        "image_sizes": [image.size],
    }
    ids = torch.tensor([[1, IMG, *tokenizer("What is in the picture?").input_ids[1:]]])
    with prune(model, "zoo-exact", keep_tokens=keep), torch.no_grad():
        visual = model.prune_visual_tokens(model.encode_visual_tokens(**inputs))
        new = model.generate(ids, **inputs, **GREEDY)
    assert visual.trace.tokens_before == [576 * visual.layouts[0].tiles]
    assert visual.trace.tokens_after == [keep] == [len(visual.embeddings(0))]
    assert new.shape == (1, 5)
    shown = kept_pixels(visual, 0, image.size)
    assert len(shown) == keep
    mask = torch.zeros(image.height, image.width, dtype=torch.bool)
    for left, top, right, bottom in shown:
        mask[top:bottom, left:right] = True
    white = Image.new("RGB", image.size, "white")
    lit = overlay_tokens(white, visual).convert("L").tobytes()
    assert torch.equal(
        torch.frombuffer(bytearray(lit), dtype=torch.uint8).view_as(mask) == 255, mask
    )
    assert 0 < mask.sum() < mask.numel() or keep == 640


def test_settings_are_saved(tmp_path: Path, small_next: Make) -> None:
    model = small_next()
    model.pruning = PruningConfig("zoo", keep_tokens=9, newline="keep", positions="original")
    model.save_pretrained(tmp_path)
    again = load_pretrained_model(str(tmp_path), device="cpu", mm_next_protocol="fixed2880")[1]
    assert again.pruning == model.pruning
    assert again.config.mm_next_protocol == "fixed2880"
