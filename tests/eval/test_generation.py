"""An evaluation decodes as `model.generate` does, whatever the model's generation_config says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from llava.eval.engine.batches import Plan
from llava.eval.engine.decode import Decoded, decode, end_tokens, row_seed, until_end
from llava.eval.engine.request import Arm
from llava.eval.engine.runner import Runner
from llava.eval.prompts import question
from llava.eval.tasks.base import Item
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.loaded import LoadedModel
from llava.model.prompting import render
from llava.sampling import Sampling
from llava.utils import UserInputError

GREEDY = Sampling(temperature=0, max_new_tokens=8)
BEAMS = Sampling(temperature=0, num_beams=3, max_new_tokens=8)
DRAWN = Sampling(temperature=0.9, max_new_tokens=8)
SEARCHED = Sampling(temperature=0.9, num_beams=2, max_new_tokens=8)
Rows = list[list[int]]
Settings = dict[str, Any]

# Settings that change some greedy answer, made from the tokens that the model says without them.
CHANGING: dict[str, Callable[[Rows], Settings]] = {
    "repetition_penalty": lambda said: {"repetition_penalty": 3.0},
    "suppress_tokens": lambda said: {"suppress_tokens": [row[3] for row in said]},
    "begin_suppress_tokens": lambda said: {"begin_suppress_tokens": [row[0] for row in said]},
    "no_repeat_ngram_size": lambda said: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda said: {"bad_words_ids": [[said[0][1]], said[1][2:4]]},
    "sequence_bias": lambda said: {"sequence_bias": [[[said[0][0]], -50.0]]},
    "forced_bos_token_id": lambda said: {"forced_bos_token_id": 30},
    "forced_eos_token_id": lambda said: {"forced_eos_token_id": 2},
    "exponential_decay": lambda said: {"exponential_decay_length_penalty": (2, 3.0)},
    "watermark": lambda said: {"watermarking_config": {"bias": 4.0}},
    "selfhash": lambda said: {"watermarking_config": {"bias": 4.0, "seeding_scheme": "selfhash"}},
    "another_end": lambda said: {"eos_token_id": said[0][2]},
    "several_ends": lambda said: {"eos_token_id": [2, said[0][2], said[1][4]]},
    "end_that_pads": lambda said: {"eos_token_id": said[0][2], "pad_token_id": said[0][2]},
    "min_new_tokens": lambda said: {"eos_token_id": said[0][1], "min_new_tokens": 4},
    "min_length": lambda said: {"eos_token_id": [row[1] for row in said], "min_length": 760},
    "stop_strings": lambda said: {"stop_strings": ["h", "s"]},
    "stop_strings_alone": lambda said: {"stop_strings": "h", "eos_token_id": None},
}
UNCHANGING: dict[str, Settings] = {
    "nothing": {},
    "no_end": {"eos_token_id": None},
    "pad_is_end": {"pad_token_id": 2},
    "no_pad": {"pad_token_id": None},
    "encoder_only": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    "flags_come_first": {
        **{"do_sample": True, "temperature": 0.5, "top_p": 0.3},
        **{"num_beams": 4, "max_new_tokens": 2, "use_cache": False},
    },
    "max_length": {"max_length": 20},
    "max_time": {"max_time": 600.0},
    "beams_only": {"length_penalty": -3.0, "early_stopping": "never", "low_memory": True},
    "renormalize": {"renormalize_logits": True, "remove_invalid_values": True},
    "outputs": {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "states": {"output_attentions": True, "output_hidden_states": True},
    "cache": {"cache_implementation": "static"},
    "groups_of_one_beam": {"num_beam_groups": 2, "diversity_penalty": 0.5},
}
OF_BEAMS: dict[str, Callable[[Rows], Settings]] = {
    "length_penalty": lambda said: {"length_penalty": -3.0, "eos_token_id": said[0][1:4]},
    "early_stopping": lambda said: {"early_stopping": True, "eos_token_id": said[0][1:4]},
    "never_early": lambda said: {"early_stopping": "never", "eos_token_id": said[0][1:4]},
    "repetition_penalty": lambda said: {"repetition_penalty": 3.0},
    "stop_strings": lambda said: {"stop_strings": ["h", "s"], "eos_token_id": None},
}
OF_DRAWS: dict[str, Settings] = {
    "top_k": {"top_k": 2},
    "no_top_k": {"top_k": 0},
    "min_p": {"min_p": 0.2},
    "top_h": {"top_h": 0.3},
    "typical_p": {"typical_p": 0.4},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05},
    "eta_cutoff": {"eta_cutoff": 0.1},
    "penalty": {"repetition_penalty": 1.8, "top_k": 0},
    "stop_strings": {"stop_strings": ["h", "s"]},
    "contrastive_needs_no_draws": {"penalty_alpha": 0.6},
}


@pytest.fixture
def configure(subject: LoadedModel) -> Iterator[Callable[[Settings], None]]:
    """Change the model's generation_config, as a generation_config.json would; undone after."""
    model, own = subject.model, copy.deepcopy(subject.model.generation_config)

    def change(settings: Settings) -> None:
        model.generation_config = GenerationConfig.from_dict({**own.to_dict(), **settings})

    yield change
    model.generation_config = own


Answers = Callable[[Sampling], tuple[list[str], Rows]]


@pytest.fixture
def answers(make_runner: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Answers and tokens of an evaluation: three prompts of different lengths in one batch."""
    rows: Rows = []

    def watched(*args: Any, **kwargs: Any) -> Decoded:
        decoded = decode(*args, **kwargs)
        rows[:] = decoded.tokens
        return decoded

    monkeypatch.setattr("llava.eval.engine.runner.decode", watched)

    def answer(sampling: Sampling) -> tuple[list[str], Rows]:
        runner = make_runner(sampling=sampling)
        runner.plan = Plan.of(questions(runner), 3)
        ((records, _),) = runner.run([Arm("none")])
        assert [record["index"] for record in records] == [0, 1, 2]
        return [record["answer"] for record in records], list(rows)

    return answer


def questions(runner: Runner) -> list[Item]:
    images = runner.plan.items[0].images  # of one image, so that no plan reorders them
    return [
        replace(item, text=item.text + 5 * n * " please", images=images)
        for n, item in enumerate(runner.plan.items[:3])
    ]


@pytest.fixture
def generated(subject: LoadedModel, make_runner: Callable[..., Runner]) -> Answers:
    """The same of `model.generate`, prompt by prompt."""
    model, tokenizer, runner = subject.model, subject.tokenizer, make_runner()

    def generate(sampling: Sampling) -> tuple[list[str], Rows]:
        rows, ends = [], end_tokens(model.generation_config)
        for item in questions(runner):
            prompt = render(question(item.text), subject.template, model.config)
            image = runner.benchmark.load_image(item.images[0])
            torch.manual_seed(row_seed(0, item.index))
            output = model.generate(
                inputs=tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None],
                images=process_images([image], subject.image_processor, model.config),
                tokenizer=tokenizer,
                **sampling.arguments(),
            )
            rows.append(getattr(output, "sequences", output)[0].tolist())
        texts = [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return texts, [until_end(row, ends, tokenizer.all_special_ids) for row in rows]

    return generate


@pytest.mark.parametrize("name", CHANGING)
def test_settings_that_change_answers(name, answers, generated, configure) -> None:
    before = answers(GREEDY)
    configure(CHANGING[name](before[1]))
    after = answers(GREEDY)
    assert after == generated(GREEDY)
    assert after[1] != before[1]


@pytest.mark.parametrize("name", UNCHANGING)
def test_settings_that_change_none(name, answers, generated, configure) -> None:
    before = answers(GREEDY)
    assert len({tuple(row) for row in before[1]}) == 3, "they must differ to mean anything"
    configure(UNCHANGING[name])
    assert answers(GREEDY) == generated(GREEDY) == before


@pytest.mark.parametrize("name", OF_BEAMS)
def test_settings_of_beam_search(name, answers, generated, configure) -> None:
    before = answers(BEAMS)
    configure(OF_BEAMS[name](before[1]))
    assert answers(BEAMS) == generated(BEAMS) != before


@pytest.mark.parametrize("sampling", [DRAWN, SEARCHED], ids=["drawn", "searched"])
@pytest.mark.parametrize("name", OF_DRAWS)
def test_settings_of_draws(name, sampling, answers, generated, configure) -> None:
    configure(OF_DRAWS[name])
    assert answers(sampling) == generated(sampling)


UNUSABLE: tuple[tuple[Settings, Sampling], ...] = (
    ({"num_return_sequences": 3, "do_sample": True}, DRAWN),
    ({"num_return_sequences": 2, "num_beams": 2}, BEAMS),
    ({"num_return_sequences": 3, "do_sample": True}, GREEDY),
    ({"prompt_lookup_num_tokens": 3}, GREEDY),
    ({"assistant_early_exit": 1}, GREEDY),
    ({"is_assistant": True}, GREEDY),
    ({"use_mtp": True}, DRAWN),
    ({"penalty_alpha": 0.6, "top_k": 4}, GREEDY),
    ({"dola_layers": "low"}, GREEDY),
    ({"num_beam_groups": 3, "diversity_penalty": 0.5}, BEAMS),
    ({"force_words_ids": [[5]]}, BEAMS),
    ({"constraints": [1]}, GREEDY),
    ({"low_memory": True}, BEAMS),
    ({"guidance_scale": 1.5}, GREEDY),
    ({"token_healing": True}, GREEDY),
    ({"prefill_chunk_size": 64}, GREEDY),
    ({"cache_implementation": "offloaded"}, GREEDY),
    ({"cache_implementation": "quantized"}, GREEDY),
)


@pytest.mark.parametrize(("settings", "sampling"), UNUSABLE)
def test_what_cannot_be_carried_out_is_named(settings, sampling, answers, configure) -> None:
    configure(settings)
    name = next(iter(settings))
    message = rf"^the model's generation_config sets {name} to .*; remove it from generation_con"
    with pytest.raises(UserInputError, match=message):
        answers(sampling)


def test_a_value_that_no_call_takes_is_one_line(answers, configure) -> None:
    configure({"repetition_penalty": -1.0})
    with pytest.raises(
        UserInputError, match=r"^the model's generation_config cannot be used: .*-1"
    ):
        answers(GREEDY)


def test_an_end_that_is_no_special_token_is_shown(answers, generated, configure) -> None:
    """As `generate` shows it; the padding of a row that has ended is not."""
    configure({"eos_token_id": answers(GREEDY)[1][0][2]})
    texts, rows = answers(GREEDY)
    assert (texts, rows) == generated(GREEDY)
    assert len(rows[0]) == 3 < len(rows[1])
    assert until_end([7, 8, 2, 0, 0], {2}, {0, 2}) == [7, 8]
    assert until_end([7, 8, 2, 0, 0], {8}, {0, 2}) == [7, 8]
    assert until_end([7, 8], {2}, {2}) == [7, 8]


@pytest.mark.parametrize("settings", [{}, {"stop_strings": ["zzz"]}])
def test_every_step_is_timed(
    settings: Settings, subject: LoadedModel, make_runner: Callable[..., Runner], configure
) -> None:
    """Together or row by row: prefill and a later step of the whole batch, where there is one."""
    configure({"eos_token_id": None, **settings})
    runner = make_runner()
    with torch.inference_mode():
        inputs = subject.splice(None, runner.prompts(runner.plan.items[:2], [0, 0]))
    for tokens in (1, 4):
        decoded = decode(
            subject,
            inputs,
            sampling=Sampling(temperature=0, max_new_tokens=tokens),
            seeds=[0, 0],
        )
        assert [len(row) for row in decoded.tokens] == [tokens, tokens]
        assert decoded.prefill_ms > 0
        assert (decoded.step_ms is None) == (tokens == 1)
    assert decoded.step_ms > 0
