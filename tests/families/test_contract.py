"""What everything above the model relies on, for every implementation of the contract."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "eval"))

from implementations import IMPLEMENTATIONS
from tiny_llava import draw_picture

from llava.constants import IMAGE_TOKEN_INDEX
from llava.families.contract import ModelInputs, Picture, VisionLanguageModel
from llava.families.dialogue import IMAGE, Dialogue
from llava.families.lengths import Limit, PromptLength, exceeded_limits
from llava.families.loaded import FamilyModel
from llava.pruning import list_methods, prune
from llava.sampling import Sampling
from llava.utils import UserInputError

TOKENS = 5
SETTINGS: dict[str, dict] = {
    "unpruned": {},
    "zoo": {"config": "zoo", "keep_tokens": 20},
    "ratio": {"config": "norm", "keep_ratio": 0.1},
    "original": {"config": "divprune", "keep_tokens": 20, "positions": "original"},
    "shared": {"config": "zoo", "keep_ratio": 0.05, "scope": "prompt"},
    "merging": {"config": "prumerge", "keep_tokens": 20},
    "question": {"config": "mmtok", "keep_tokens": 20},
}
# One image, several, several with text between them, none.
DIALOGUES = (
    Dialogue(((IMAGE, "\n", "What colour is the circle?"),)),
    Dialogue(((IMAGE, "\n", IMAGE, "\n", "Are both the same?"),)),
    Dialogue((("Is ", IMAGE, " like ", IMAGE, "?"),)),
    Dialogue((("What is red?",),)),
)
QUESTIONS = ("What colour is the circle?", "Are both the same?", "Is like?", "What is red?")
IMAGES = (1, 2, 2, 0)
# For models that take one image a prompt.
LONE = Dialogue((("Name a colour of ", IMAGE, "."),))


class Asked(NamedTuple):
    """Prompts of one batch."""

    dialogues: tuple[Dialogue, ...]
    questions: tuple[str, ...]
    images: tuple[int, ...]


def asked_of(loaded: VisionLanguageModel) -> Asked:
    """What a model is asked in the tests of this suite."""
    if isinstance(loaded, FamilyModel) and loaded.family.lone_images is not None:
        questions = (QUESTIONS[0], "Name a colour.", QUESTIONS[3])
        return Asked((DIALOGUES[0], LONE, DIALOGUES[3]), questions, (1, 1, 0))
    return Asked(DIALOGUES, QUESTIONS, IMAGES)


def setting_of(loaded: VisionLanguageModel, name: str) -> dict:
    """The setting of a name; where nothing comes after the features, PruMerge has no readings."""
    if name == "merging" and isinstance(loaded, FamilyModel) and not reads_next_block(loaded):
        return {"config": "visionzip", "keep_tokens": 20}
    return SETTINGS[name]


def reads_next_block(loaded: FamilyModel) -> bool:
    """Whether the features of a model come from before the last block of its tower."""
    return loaded.model.config.vision_config.model_type.startswith("clip")


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> VisionLanguageModel:
    torch.set_num_threads(1)
    return IMPLEMENTATIONS[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest, loaded: VisionLanguageModel) -> Iterator[None]:
    with torch.inference_mode(), prune(loaded.model, **setting_of(loaded, request.param)):
        yield


def shown(number: int) -> Image.Image:
    """A picture; every second one is wide, so that tiles differ in number."""
    image = draw_picture(number)
    return image.resize((400, 190)) if number % 2 else image


def pictures(loaded: VisionLanguageModel, count: int, first: int = 0) -> list[Picture]:
    return [loaded.prepare(shown(first + number)) for number in range(count)]


def settings_of(loaded: VisionLanguageModel) -> dict:
    sampling = Sampling(temperature=0, max_new_tokens=TOKENS)
    return sampling.arguments_for(loaded.model, loaded.tokenizer) | {"eos_token_id": None}


def step_by_step(
    loaded: VisionLanguageModel,
    rows: Sequence[Tensor],
    shown: Sequence[Picture],
    questions: Sequence[str],
) -> ModelInputs:
    if not shown:
        return loaded.splice(None, rows)
    visual = loaded.place(loaded.encode(shown), rows, questions)
    return loaded.splice(loaded.prune(visual), rows)


def continued(loaded: VisionLanguageModel, inputs: ModelInputs) -> list[list[int]]:
    return loaded.generate(inputs, pad_token_id=0, **settings_of(loaded)).tolist()


def test_steps_are_one_answer(loaded: VisionLanguageModel, setting: None) -> None:
    """Prompts of different lengths in one batch, some with several images, one without."""
    dialogues, questions, counts = asked_of(loaded)
    rows, images = [loaded.row(said) for said in dialogues], pictures(loaded, sum(counts))
    new = continued(loaded, step_by_step(loaded, rows, images, questions))
    whole = loaded.answer(rows, images, questions, pad_token_id=0, **settings_of(loaded))
    assert new == whole.tolist()
    # These tiny models may say the same twice; test_family_checkpoints has their right answers.
    least = 2 if isinstance(loaded, FamilyModel) else len(rows)
    assert len({tuple(row) for row in new}) >= least, "the prompts are told apart"


def test_a_batch_is_its_rows(loaded: VisionLanguageModel, setting: None) -> None:
    dialogues, questions, counts = asked_of(loaded)
    rows, images = [loaded.row(said) for said in dialogues], pictures(loaded, sum(counts))
    batch = step_by_step(loaded, rows, images, questions)
    together, first = continued(loaded, batch), 0
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        own = images[first : first + count]
        alone = step_by_step(loaded, [row], own, [questions[number]])
        assert batch.lengths[number] == alone.lengths[0] == alone.embeds.shape[1]
        cut = batch.row(number)
        assert torch.allclose(cut.embeds, alone.embeds, atol=1e-5)
        assert cut.positions is None or torch.equal(cut.positions, alone.positions)
        assert continued(loaded, cut)[0] == together[number]
        assert continued(loaded, alone)[0] == together[number]
        first += count
    strict = loaded.answer(
        rows, images, questions, strict=True, **{**settings_of(loaded), "pad_token_id": 0}
    )
    assert strict.tolist() == together


def test_lengths_are_known_before_anything_is_encoded(
    loaded: VisionLanguageModel, setting: None
) -> None:
    dialogues, questions, counts = asked_of(loaded)
    rows, first = [loaded.row(said) for said in dialogues], 0
    for number, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if count == 0:
            continue
        images = pictures(loaded, count, first)
        inputs = step_by_step(loaded, [row], images, [questions[number]])
        length = loaded.measure(row, images)
        assert length.text == len(row) - count
        if loaded.pruning is None or loaded.pruning.pruner.fixed_count:
            assert length.total == inputs.lengths[0]
        assert inputs.lengths[0] <= length.total <= length.positions
        if inputs.positions is not None:
            last = int(inputs.positions.max())
            # M-RoPE gives an image fewer positions than it has tokens.
            several = inputs.positions.ndim == 3
            assert last < length.positions if several else last == length.positions - 1
        first += count


def test_pictures_can_be_made_and_sent_elsewhere(loaded: VisionLanguageModel) -> None:
    """What makes them holds no weights."""
    prepare = pickle.loads(pickle.dumps(loaded.prepare))
    assert len(pickle.dumps(loaded.prepare)) < 200_000
    for number in range(2):
        own, other = loaded.prepare(shown(number)), prepare(shown(number))
        sent = pickle.loads(pickle.dumps(other))
        assert own.size == sent.size == shown(number).size
        assert own.inputs.keys() == sent.inputs.keys()
        for name, value in own.inputs.items():
            assert torch.equal(value, sent.inputs[name])


@torch.inference_mode()
def test_images_are_encoded_once_for_many_prompts(loaded: VisionLanguageModel) -> None:
    """Encoded and pruned images may be taken in any order, as evaluation does."""
    images, row = pictures(loaded, 2), loaded.row(DIALOGUES[0])
    with prune(loaded.model, "grid", keep_tokens=20):
        pruned = loaded.prune(loaded.encode(images))
        taken = loaded.splice(pruned.take_images([1, 0, 1]), [row, row, row])
        for number, image in enumerate((1, 0, 1)):
            alone = step_by_step(loaded, [row], [images[image]], [QUESTIONS[0]])
            assert torch.allclose(taken.row(number).embeds, alone.embeds, atol=1e-5)


def test_a_prompt_has_one_mark_for_every_image(loaded: VisionLanguageModel) -> None:
    for said, count in zip(DIALOGUES, IMAGES, strict=True):
        row = loaded.row(said)
        assert row.dtype == torch.long and row.ndim == 1
        assert int((row == IMAGE_TOKEN_INDEX).sum()) == count
        assert loaded.render(said).count("<image>") == count


def test_an_image_mark_that_somebody_wrote_is_text(loaded: VisionLanguageModel) -> None:
    said = Dialogue((("What does <image> mean?",),))
    if isinstance(loaded, FamilyModel) and loaded.mark == "<image>":
        with pytest.raises(UserInputError, match="stands for images"):
            loaded.row(said)
        return
    for dialogue in (said, said.say("An <image>.").say("Thanks."), Dialogue(said.turns, "<image>")):
        row = loaded.row(dialogue)
        assert int((row == IMAGE_TOKEN_INDEX).sum()) == 0
        assert "<image> mean?" in loaded.tokenizer.decode(row)
        assert "\0" not in loaded.render(dialogue)


def test_turns_follow_each_other(loaded: VisionLanguageModel) -> None:
    """What was said before stays as it was, so a chat goes on where it ended."""
    asked = DIALOGUES[0]
    answered = asked.say("It is red.")
    again = answered.say("And the square?")
    assert asked.is_open and not answered.is_open and again.is_open
    prompts = [loaded.render(said) for said in (asked, answered, again)]
    assert prompts[1].startswith(prompts[0]) and prompts[2].startswith(prompts[1])
    assert "It is red." in prompts[1] and "And the square?" in prompts[2]
    system = Dialogue(again.turns, "Speak of nothing but squares.")
    assert "Speak of nothing but squares." in loaded.render(system)
    user, model = loaded.roles
    assert user and model and user != model


def test_settings_belong_to_their_caller(loaded: VisionLanguageModel) -> None:
    """Two threads with different settings, and a default that neither of them changes."""
    row, image = loaded.row(DIALOGUES[0]), pictures(loaded, 1)
    lengths: dict[int, int] = {}
    both = threading.Barrier(2)

    @torch.inference_mode()
    def ask(budget: int) -> None:
        with prune(loaded.model, "grid", keep_tokens=budget):
            both.wait(timeout=30)
            inputs = step_by_step(loaded, [row], image, QUESTIONS[:1])
            lengths[budget] = inputs.lengths[0] - len(row) + 1

    threads = [threading.Thread(target=ask, args=(budget,)) for budget in (7, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert lengths == {7: 7, 30: 30}
    assert loaded.pruning is None
    loaded.pruning = {"method": "grid", "keep_tokens": 9}
    try:
        assert loaded.measure(row, image).visual == 9
        with prune(loaded.model):
            assert loaded.pruning is None
    finally:
        loaded.pruning = None


def test_who_reads_the_question(loaded: VisionLanguageModel) -> None:
    assert not loaded.reads_question(None)
    with prune(loaded.model, "mmtok", keep_tokens=5), torch.inference_mode():
        assert loaded.reads_question(loaded.pruning)
        visual, row = loaded.encode(pictures(loaded, 1)), loaded.row(DIALOGUES[0])
        placed = loaded.place(visual, [row], QUESTIONS[:1])
        known = loaded.with_questions(visual, QUESTIONS[:1])
        for one, other in zip(
            known.extras["question_embeddings"], placed.extras["question_embeddings"], strict=True
        ):
            assert torch.equal(one, other)
        with pytest.raises(UserInputError, match="question"):
            loaded.place(visual, [row])
    with prune(loaded.model, "zoo", keep_tokens=5):
        assert not loaded.reads_question(loaded.pruning)


def test_limits_are_named_lowest_first(loaded: VisionLanguageModel) -> None:
    limits = loaded.limits
    assert limits == sorted(limits, key=lambda limit: limit.tokens)
    assert any(limit.answer for limit in limits), "positions are limited"
    longest = max(limit.tokens for limit in limits)
    assert exceeded_limits(limits, PromptLength(longest, 1, longest + 1)) == limits
    assert exceeded_limits([Limit("x", 5, 0)], PromptLength(5, 0, 5)) == []


def test_the_settings_of_this_suite_exist() -> None:
    named = {setting["config"] for setting in SETTINGS.values() if setting}
    assert named <= set(list_methods())
