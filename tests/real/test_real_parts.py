"""The stage on real parts, through the contract: DINOv2-S fine-tuned for saliency and SmolLM2.

The projector between them is not trained, so nothing here says how good an answer is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "families"))

from family_checks import GREEDY, STEPS, Shortened, error
from parts import (
    IMAGE_TOKEN,
    TRAINED_SIDE,
    RealLlava,
    build_llava,
    onnx_graph,
    photographs,
    save_dinov2,
)

from llava.constants import IMAGE_TOKEN_INDEX
from llava.families.dialogue import IMAGE, Dialogue
from llava.families.loaded import FamilyModel
from llava.pruning import get_method, list_methods, prune
from llava.pruning.lookup import FAMILIES

pytestmark = pytest.mark.real

FAMILY = FAMILIES.get("llava")()
TOKENS, KEPT, GRID = 576, 64, 24
QUESTION = "What is shown in the picture?"
# Images and questions of three prompts of different lengths.
PROMPTS = ((1, QUESTION), (0, "Name a planet."), (2, "Do both show a flag?"))
METHODS = [name for name in list_methods() if get_method(name).budgeted]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealLlava:
    return build_llava(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def half(real: RealLlava) -> Any:
    """The same with a language model in bfloat16."""
    model = copy.deepcopy(real.model)
    model.model.language_model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16, "tied to the embeddings"
    return model


def inputs_of(
    real: RealLlava,
    prompts: Sequence[tuple[int, str]] = PROMPTS,
    images: Sequence[Image.Image] | None = None,
) -> dict[str, Any]:
    """Return the processor's output for prompts of so many images and these questions."""
    said = [
        [*[{"type": "image"}] * count, {"type": "text", "text": question}]
        for count, question in prompts
    ]
    texts = [
        real.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        for content in said
    ]
    images = photographs() if images is None else images
    made = real.processor(text=texts, images=[*images] or None, padding=True, return_tensors="pt")
    return dict(made)


def spearman(one: Tensor, other: Tensor) -> float:
    """Return the rank correlation of two rows of scores."""
    ranks = torch.stack([row.argsort().argsort().double() for row in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_the_tower_is_the_graph(tmp_path: Path) -> None:
    """At the size that the graph was exported for, whose positions it interpolates itself."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    model = onnx_graph()
    nodes = [*model.graph.node]
    last = max(i for i, node in enumerate(nodes) if node.name.startswith("/backbone/layernorm"))
    output = helper.make_tensor_value_info(nodes[last].output[0], 1, None)
    graph = helper.make_graph(
        nodes[: last + 1], "backbone", model.graph.input, [output], model.graph.initializer
    )
    part = helper.make_model(graph, opset_imports=model.opset_import)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    name = model.graph.input[0].name
    (wanted,) = ReferenceEvaluator(part).run(None, {name: pixels.numpy()})
    tower = save_dinov2(tmp_path, TRAINED_SIDE)
    with torch.no_grad():
        found = tower(pixels).last_hidden_state
    assert error([found], [torch.from_numpy(wanted)]) <= 1e-5


def test_positions_are_those_that_the_tower_interpolates(real: RealLlava, tmp_path: Path) -> None:
    pixels = inputs_of(real)["pixel_values"]
    with torch.no_grad():
        wanted = save_dinov2(tmp_path, TRAINED_SIDE)(pixels).last_hidden_state
        found = real.model.model.vision_tower(pixels).last_hidden_state
    assert torch.equal(found, wanted) and found.shape == (3, TOKENS + 1, 384)


def test_the_language_model_knows_something(real: RealLlava) -> None:
    inputs = inputs_of(real, [(0, "What is the capital of France?")], [])
    new = real.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in real.processor.tokenizer.decode(new[0, inputs["input_ids"].shape[1] :])


def test_prompts_are_those_of_its_own_template(real: RealLlava) -> None:
    loaded, tokenizer = asked(real), real.processor.tokenizer
    for turns in (((IMAGE, QUESTION),), (("Hello.",), ("Hello!",), (QUESTION,))):
        texts = ["".join(IMAGE_TOKEN if part is IMAGE else part for part in t) for t in turns]
        roles = ("user", "assistant", "user")
        text = tokenizer.apply_chat_template(
            [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)],
            chat_template=real.own_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert "SmolLM" in text
        row, mark = loaded.row(Dialogue(turns)), real.model.config.image_token_id
        wanted = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert torch.equal(row, wanted.masked_fill(wanted == mark, IMAGE_TOKEN_INDEX))


def test_a_budget_of_all_tokens_changes_nothing(real: RealLlava) -> None:
    inputs = inputs_of(real, PROMPTS[:2], photographs()[:1])
    stock = real.model.generate(**inputs, **GREEDY)
    with prune(real.model, "zoo", keep_tokens=TOKENS):
        found = real.model.generate(**inputs, **GREEDY)
    assert torch.equal(found.sequences, stock.sequences)
    assert all(map(torch.equal, found.logits, stock.logits))


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_decoding_equals_an_uncached_reference(real: RealLlava, positions: str) -> None:
    inputs = inputs_of(real)
    with prune(real.model, "zoo", keep_tokens=KEPT, positions=positions) as run:
        found = real.model.generate(**inputs, **GREEDY)
    assert run.trace.tokens_before == [TOKENS] * 3 and run.trace.tokens_after == [KEPT] * 3
    short = Shortened(FAMILY, real.model, inputs, run.tokens)
    for row in range(len(PROMPTS)):
        tokens, logits = short.greedy(row, STEPS)
        assert found.sequences[row, -STEPS:].tolist() == tokens
        assert error([step[row] for step in found.logits], logits) <= 1e-4


@pytest.mark.parametrize("method", ["zoo-exact", "visionzip"])
def test_a_batch_equals_its_rows(real: RealLlava, method: str) -> None:
    images, first = photographs(), 0
    with prune(real.model, method, keep_tokens=KEPT):
        batch = real.model.generate(**inputs_of(real), **GREEDY)
        for row, prompt in enumerate(PROMPTS):
            own = images[first : first + prompt[0]]
            first += prompt[0]
            alone = real.model.generate(**inputs_of(real, [prompt], own), **GREEDY)
            assert torch.equal(batch.sequences[row, -STEPS:], alone.sequences[0, -STEPS:])
            assert error([s[row] for s in batch.logits], [s[0] for s in alone.logits]) <= 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_same_whatever_the_language_model_computes_in(
    real: RealLlava, half: Any, method: str, record_error: Callable[[str, float], None]
) -> None:
    """Only methods that read the question read the language model: its embeddings of words."""
    inputs, kept = inputs_of(real, [(1, QUESTION)] * 2, photographs()[:2]), []
    for model in (real.model, half):
        with torch.no_grad(), prune(model, method, keep_tokens=KEPT) as run:
            logits = model(**inputs, questions=[QUESTION] * 2, logits_to_keep=1).logits
        assert logits.isfinite().all() and run.trace.tokens_before == [TOKENS] * 2
        counts, fixed = run.trace.tokens_after, get_method(method).fixed_count
        assert counts == [KEPT] * 2 or (not fixed and all(0 < n <= KEPT for n in counts))
        kept.append([run.tokens.sequence(image).place for image in range(2)])
    for one, other in zip(*kept, strict=True):
        if one is None:  # every token of it is merged from many
            assert other is None
        elif not get_method(method).query_aware:
            assert torch.equal(one, other)
        else:
            moved = 1 - len({*one.tolist()} & {*other.tolist()}) / len(one)
            record_error(f"{method}: share of tokens moved by bfloat16 words", moved)
            assert moved <= 0.1


def test_two_photographs_keep_different_tokens(real: RealLlava) -> None:
    inputs = inputs_of(real, [(1, QUESTION)] * 2, photographs()[:2])
    with torch.no_grad(), prune(real.model, "zoo-exact", keep_tokens=KEPT) as run:
        real.model(**inputs, logits_to_keep=1)
    one, two = ({*run.tokens.sequence(image).place.tolist()} for image in range(2))
    assert len(one & two) < KEPT // 2


def test_zoo_ranks_real_features_as_its_limit_does(
    real: RealLlava, record_error: Callable[[str, float], None]
) -> None:
    """Reported: how far the ranks by 64 random directions are from those by all of them."""
    inputs = inputs_of(real)
    with torch.no_grad(), prune(real.model):  # the hooks are there, nothing is pruned
        given = {"pixel_values": inputs["pixel_values"]}
        visual = FAMILY.encode(real.model, given, inputs["input_ids"], ("features",))
        sampled, exact = (get_method(name)().score(visual) for name in ("zoo", "zoo-exact"))
    for image in range(len(exact)):
        found = spearman(sampled[image], exact[image])
        record_error("zoo and zoo-exact: 1 - rank correlation", 1 - found)
        assert 0.9 < found < 1


def test_an_overlay_shows_what_was_kept(real: RealLlava) -> None:
    """The processor cuts the middle out of a photograph that is higher than wide."""
    photograph = photographs()[0]
    inputs = inputs_of(real, PROMPTS[:1], [photograph])
    with torch.no_grad(), prune(real.model, "divprune", keep_tokens=KEPT) as run:
        real.model(**inputs, logits_to_keep=1)
    drawn, (width, height) = run.overlay(photograph, dim=0.25), photograph.size
    dimmed = photograph.point(lambda value: value * 0.25)
    place, margin = {*run.tokens.sequence(0).place.tolist()}, (height - width) // 2
    for token in range(TOKENS):
        row, column = divmod(token, GRID)
        at = int((column + 0.5) / GRID * width), margin + int((row + 0.5) / GRID * width)
        wanted = photograph if token in place else dimmed
        assert drawn.getpixel(at) == wanted.getpixel(at)
    for edge in (margin // 2, height - margin // 2):
        assert drawn.getpixel((width // 2, edge)) == dimmed.getpixel((width // 2, edge))


def asked(real: RealLlava) -> FamilyModel:
    """Return the model as evaluation and chat know it."""
    processor = real.processor
    return FamilyModel(
        family=FAMILY,
        model=real.model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        chat_template=processor.tokenizer.chat_template,
        name="real parts",
    )


def test_asking_is_generating(real: RealLlava) -> None:
    loaded, photograph = asked(real), photographs()[0]
    row, settings = loaded.row(Dialogue(((IMAGE, QUESTION),))), {**GREEDY, "pad_token_id": 2}
    picture = loaded.prepare(photograph)
    inputs = inputs_of(real, PROMPTS[:1], [photograph])
    assert torch.equal(picture.inputs["pixel_values"], inputs["pixel_values"])
    with prune(real.model, "mmtok", keep_tokens=KEPT) as run:
        length = loaded.measure(row, [picture])
        answer = loaded.answer([row], [picture], [QUESTION], **settings)
        wanted = real.model.generate(**inputs, questions=[QUESTION], **settings)
    assert length.visual == KEPT == run.trace.tokens_after[0]
    assert length.text == inputs["input_ids"].shape[1] - TOKENS
    assert answer.sequences.tolist() == wanted.sequences[:, -STEPS:].tolist()
    assert error(answer.logits, wanted.logits) <= 1e-4
