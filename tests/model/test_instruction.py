"""The question on its way to the methods that read it: CLIP's text tower, the model's own words."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.call_context import asking
from llava.model.multimodal_encoder import clip_text
from llava.model.prompt_inputs import keywords, without_answer_format
from llava.pruning import PruningConfig, PruningError, prune
from llava.utils import UserInputError

IMG = IMAGE_TOKEN_INDEX
GREEDY = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
LETTERS = "abcdefghijklmnopqrstuvwxyz?"


def save_clip(folder: Path) -> CLIPModel:
    """A complete CLIP with random weights whose tower fits llava15-tiny, and a tokenizer."""
    vocabulary = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    end = len(vocabulary) - 1
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    text = CLIPTextConfig(
        **{**layers, "hidden_size": 32},
        vocab_size=end + 1,
        num_hidden_layers=2,
        max_position_embeddings=12,
        bos_token_id=end - 1,
        eos_token_id=end,
        pad_token_id=end,
    )
    vision = CLIPVisionConfig(**layers, num_hidden_layers=3, image_size=336, patch_size=14)
    torch.manual_seed(3)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24
    )
    clip = CLIPModel(config).eval()
    with torch.no_grad():
        for weight in clip.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    clip.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return clip


@pytest.fixture
def clip_folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """llava15-tiny next to a complete CLIP model."""
    save_clip(tmp_path / "clip-tiny-patch14-336")
    shutil.copytree(tiny_folder, tmp_path / "llava15-tiny")
    return tmp_path / "llava15-tiny"


@pytest.fixture
def with_text(clip_folder: Path) -> LlavaLlamaForCausalLM:
    return load_pretrained_model(str(clip_folder), device="cpu")[1]


class Letters:
    """A tokenizer for the language model: a letter is an id."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [3 + ord(letter) % 50 for letter in text]}


def spy(model, monkeypatch) -> list:
    """What the stage gets and gives from now on."""
    seen, own = [], model.prune_visual_tokens

    def watched(visual):
        seen.append((visual, own(visual)))
        return seen[-1][1]

    monkeypatch.setattr(model, "prune_visual_tokens", watched)
    return seen


def test_embeddings_are_clips_own(with_text, clip_folder, pixels, monkeypatch, record_error):
    clip = CLIPModel.from_pretrained(clip_folder.parent / "clip-tiny-patch14-336").eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder.parent / "clip-tiny-patch14-336")
    seen, images = spy(with_text, monkeypatch), pixels(1)
    with_text.pruning = PruningConfig("cdpruner", 40)
    question = "red cat? Answer the question using a single word or phrase."
    with_text.generate(torch.tensor([[1, IMG, 7]]), images=images, questions=[question], **GREEDY)
    ((before, after),) = seen
    assert after.trace.method == "cdpruner"
    assert set(before.extras) == {"clip_image", "clip_text"}
    with torch.no_grad():
        hidden = clip.vision_model(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        image = clip.visual_projection(clip.vision_model.post_layernorm(hidden))[0]
        ids = tokenizer("red cat?", return_tensors="pt")
        text = clip.get_text_features(**ids)
        text = text if isinstance(text, torch.Tensor) else text.pooler_output
    for name, want in (("clip_image", image), ("clip_text", text)):
        error = float((before.extras[name][0] - want).abs().max())
        record_error(f"cdpruner: {name}", error)
        assert error < 1e-5
    cosine = torch.cosine_similarity(image, text)
    r = (cosine.max() - cosine + 1e-6) / (cosine.max() - cosine.min())
    got = PruningConfig("cdpruner", 40).pruner.score(before)[0]
    torch.testing.assert_close(got, r, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_questions_are_read_outside_autocast(with_text, pixels, dtype: torch.dtype) -> None:
    with prune(with_text, "cdpruner", keep_tokens=40), torch.no_grad():
        visual = with_text.encode_visual_tokens(pixels(1))
        want = with_text.with_questions(visual, ["red cat?"])
        with torch.autocast("cpu", dtype=dtype):
            got = with_text.with_questions(visual, ["red cat?"])
    for name in ("clip_image", "clip_text"):
        assert torch.equal(got.extras[name][0], want.extras[name][0]), name


@pytest.mark.parametrize("method", ["cdpruner", "mmtok"])
def test_every_row_has_its_own_question(method, with_text, pixels, monkeypatch) -> None:
    with_text.text_tokenizer = Letters()
    seen, images = spy(with_text, monkeypatch), pixels(4)
    with_text.pruning = PruningConfig(method, 30)
    rows = [[1, IMG, IMG, 7], [1, 5, 6, 8], [1, 9, IMG, 4]]
    questions = ["red cat", "never shown", "blue dog near a tree"]
    mask = torch.ones(3, 4, dtype=torch.long)
    with_text.generate(
        torch.tensor(rows), images=images, attention_mask=mask, questions=questions, **GREEDY
    )
    kept = seen.pop()[1].kept
    for row, own in ((0, [0, 1]), (2, [3])):
        alone = {"images": images[own], "questions": [questions[row]]}
        with_text.generate(torch.tensor([rows[row]]), **alone, **GREEDY)
        assert torch.equal(seen.pop()[1].kept, kept[own])
    other = {"images": images[:2], "questions": [questions[2]]}
    with_text.generate(torch.tensor([rows[0]]), **other, **GREEDY)
    assert not torch.equal(seen.pop()[1].kept, kept[:2])


@pytest.mark.parametrize("method", ["cdpruner", "mmtok"])
@pytest.mark.parametrize("allocation", ["per_tile", "global"])
def test_tiles_share_their_images_question(
    method, allocation, clip_folder, tiny_folder, pixels, monkeypatch
) -> None:
    folder = clip_folder.parent / "llava16-tiny"
    shutil.copytree(tiny_folder.parent / "llava16-tiny", folder)
    model = load_pretrained_model(str(folder), device="cpu")[1]
    model.text_tokenizer = Letters()
    seen = spy(model, monkeypatch)
    model.pruning = PruningConfig(method, 40, allocation=allocation)
    images, sizes = [pixels(3), pixels(5, seed=1)], [(336, 672), (672, 672)]
    questions = ["red cat", "blue dog near a tree"]
    ids, mask = torch.tensor([[1, IMG, 7]] * 2), torch.ones(2, 3, dtype=torch.long)
    model.generate(
        ids, images=images, image_sizes=sizes, attention_mask=mask, questions=questions, **GREEDY
    )
    _, both = seen.pop()
    assert both.trace.method == method
    assert both.trace.tokens_after == [40, 40]
    for i in range(2):
        alone = {"image_sizes": sizes[i : i + 1], "questions": questions[i : i + 1]}
        model.generate(ids[:1], images=images[i : i + 1], **alone, **GREEDY)
        _, single = seen.pop()
        assert torch.equal(single.sequence(0).place, both.sequence(i).place)


def test_without_a_text_tower(tiny, pixels, monkeypatch) -> None:
    seen, ids = spy(tiny, monkeypatch), torch.tensor([[1, IMG, 7]])
    tiny.pruning = PruningConfig("cdpruner", 30)
    tiny.generate(ids, images=pixels(1), **GREEDY)
    auto = seen.pop()[1]
    assert auto.trace.method == "cdpruner(relevance=none)"
    tiny.pruning = PruningConfig("cdpruner", 30, options={"relevance": "none"})
    tiny.generate(ids, images=pixels(1), **GREEDY)
    assert torch.equal(seen.pop()[1].kept, auto.kept)
    tiny.pruning = PruningConfig("cen-prune", 30, options={"host": "cdpruner"})
    tiny.generate(ids, images=pixels(1), **GREEDY)
    assert seen.pop()[1].trace.method == "cen-prune(cdpruner(relevance=none))"
    tiny.pruning = PruningConfig("cdpruner", 30, options={"relevance": "clip"})
    with pytest.raises(UserInputError, match="comes without a text tower"):
        tiny.generate(ids, images=pixels(1), questions=["cat?"], **GREEDY)


def test_cen_prune_hands_the_question_on(with_text, pixels, monkeypatch) -> None:
    seen = spy(with_text, monkeypatch)
    with_text.pruning = PruningConfig("cen-prune", 30, options={"host": "cdpruner"})
    ids = torch.tensor([[1, IMG, 7]])
    with_text.generate(ids, images=pixels(1), questions=["cat?"], **GREEDY)
    before, after = seen.pop()
    assert after.trace.method == "cen-prune(cdpruner)"
    assert set(before.extras) == {"clip_image", "clip_text"}


def test_words_are_the_models_own(tiny, pixels, monkeypatch) -> None:
    seen, ids = spy(tiny, monkeypatch), torch.tensor([[1, IMG, 7]])
    tiny.pruning = PruningConfig("mmtok", 30)
    with pytest.raises(UserInputError, match="knows no tokenizer"):
        tiny.generate(ids, images=pixels(1), questions=["cat?"], **GREEDY)
    tiny.text_tokenizer = Letters()
    tiny.generate(ids, images=pixels(1), questions=["Which is the cat?"], **GREEDY)
    want = tiny.get_input_embeddings()(torch.tensor([3 + ord(letter) % 50 for letter in "cat"]))
    assert torch.equal(seen.pop()[0].extras["question_embeddings"][0], want)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        (None, r"'mmtok' reads the question.*pass questions=\[...\] to generate"),
        (["a", "b"], "2 texts were given for 1 prompts"),
        ([" "], "not blank"),
        ([3], "not blank"),
        ("cat", "must be a list of texts"),
    ],
)
def test_questions_are_checked_where_they_are_read(questions, message, tiny, pixels) -> None:
    tiny.text_tokenizer = Letters()
    ids = torch.tensor([[1, IMG, 7]])
    tiny.pruning = PruningConfig("mmtok", 30)
    with pytest.raises(UserInputError, match=message):
        tiny.generate(ids, images=pixels(1), questions=questions, **GREEDY)
    tiny.pruning = PruningConfig("divprune", 30)
    tiny.generate(ids, images=pixels(1), questions=questions, **GREEDY)


def test_forward_reads_the_question_too(tiny, pixels) -> None:
    tiny.text_tokenizer = Letters()
    ids = torch.tensor([[1, IMG, 7]])
    with prune(tiny, "mmtok", keep_tokens=5), torch.no_grad():
        with asking(["cat"]):
            assert tiny(ids, images=pixels(1)).logits.shape[1] == 7
        with pytest.raises(UserInputError, match="reads the question"):
            tiny(ids, images=pixels(1))
        visual = tiny.encode_visual_tokens(pixels(1))
        with pytest.raises(PruningError, match="question_embeddings"):
            tiny.prune_visual_tokens(visual)
        with pytest.raises(UserInputError, match="2 texts were given for 1 images"):
            tiny.with_questions(visual, ["cat", "dog"])
        assert tiny.prune_visual_tokens(tiny.with_questions(visual, ["cat"])).kept.shape == (1, 5)


def test_nothing_is_computed_unasked(with_text, pixels, monkeypatch) -> None:
    def never(*_):
        raise AssertionError("this was not asked for")

    monkeypatch.setattr(clip_text, "_load", never)
    with_text.text_tokenizer = never
    ids = torch.tensor([[1, IMG, 7]])
    for name, options in (("zoo", {}), ("divprune", {}), ("cdpruner", {"relevance": "none"})):
        with_text.pruning = PruningConfig(name, 30, options=options)
        with_text.generate(ids, images=pixels(1), questions=["cat"], **GREEDY)
    with_text.pruning = None
    visual = with_text.encode_visual_tokens(pixels(1))
    assert with_text.with_questions(visual, ["cat"]) is visual


def test_text_tower_is_kept_and_never_saved(with_text, monkeypatch) -> None:
    tower, names = with_text.get_vision_tower(), set(with_text.state_dict())
    text = clip_text.text_tower_of(tower)
    assert clip_text.text_tower_of(tower) is text
    assert set(with_text.state_dict()) == names


def test_long_texts_are_cut_into_segments(with_text) -> None:
    text = clip_text.text_tower_of(with_text.get_vision_tower())
    assert text.segment_length == 12
    ids = text.tokenizer("abcdefgh ijklmnop")["input_ids"]
    assert len(ids) == 18
    got = text.encode("abcdefgh ijklmnop")
    assert got.shape == (2, 24)
    with torch.no_grad():
        # The second segment has the end token, then padding that is masked out.
        rows = torch.tensor([ids[:12], ids[12:] + [0] * 6])
        mask = torch.tensor([[1] * 12, [1] * 6 + [0] * 6])
        want = text.text_projection(text.text_model(rows, mask).pooler_output)
        short = text.text_model(torch.tensor([ids[12:]])).pooler_output
    assert torch.equal(got, want)
    torch.testing.assert_close(got[1:], text.text_projection(short), atol=1e-5, rtol=0)


def test_damaged_text_towers_are_named(clip_folder) -> None:
    (clip_folder.parent / "clip-tiny-patch14-336" / "vocab.json").write_text("{")
    model = load_pretrained_model(str(clip_folder), device="cpu")[1]
    with pytest.raises(UserInputError, match="cannot load the text tower"):
        clip_text.text_tower_of(model.get_vision_tower())


def test_keywords() -> None:
    toy = "What color is the cat's left-hand toy?"
    assert keywords(toy) == "color cat s left hand toy"
    assert keywords(toy, "content") == "color cat's left-hand toy"
    suffix = "\nAnswer the question using a single word or phrase."
    assert keywords("What is it?" + suffix) == "What is it?"
    assert keywords("Is it there?" + suffix, "content") == "Is it there?" + suffix
    assert without_answer_format("Is it red?" + suffix) == "Is it red?"
    assert keywords("Ist der Ball größer?") == "Ist der Ball größer"
