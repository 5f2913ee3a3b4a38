"""A chat that outgrows the model's context: refused in numbers, nothing lost, two ways to go on."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.families import dialogue
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.loaded import LoadedModel
from llava.sampling import Sampling
from llava.serve import cli
from llava.serve.commands import run_command
from llava.serve.session import Session
from llava.utils import UserInputError

QUESTION = "What colour is it?"
LIMITS = ("tokenizer_model_max_length", "max_position_embeddings")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    torch.set_num_threads(1)
    tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint), device="cpu")
    return LoadedModel(model, tokenizer, processor, "vicuna_v1")


@pytest.fixture
def session(
    loaded: LoadedModel, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Session]]:
    """`session(limit=N)`: a chat with a model of that limit."""

    def make(**limits: int | None) -> Session:
        for name, value in {LIMITS[0]: None, LIMITS[1]: 4096, **limits}.items():
            monkeypatch.setattr(loaded.model.config, name, value, raising=False)
        sampling = Sampling(temperature=0, max_new_tokens=6)
        return Session(loaded, Image.open(picture), sampling)

    loaded.model.pruning = None
    yield make
    loaded.model.pruning = None


def state(session: Session) -> Any:
    return session.chat, session.last, session.loaded.pruning, session.budget


def text_of(session: Session, question: str) -> int:
    """Tokens of text that the prompt of the next turn has."""
    chat = conv_templates["vicuna_v1"].copy()
    mark = "" if session.chat.turns else "<image>\n"
    said = [dialogue.text_of(turn) for turn in session.chat.turns]
    for number, text in enumerate((*said, mark + question, None)):
        chat.append_message(chat.roles[number % 2], text)
    ids = tokenizer_image_token(chat.get_prompt(), session.loaded.tokenizer)
    return sum(token >= 0 for token in ids)


def fill(session: Session) -> UserInputError:
    """Ask until a turn is refused, which changes nothing."""
    for _ in range(40):
        before = state(session)
        try:
            session.ask(QUESTION)
        except UserInputError as error:
            assert state(session) == before
            return error
    raise AssertionError("never refused")


def watch(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing may be computed."""
    cls = type(session.loaded.model)
    for name in ("encode_images", "generate", "prune_visual_tokens"):
        monkeypatch.setattr(cls, name, lambda *_, **__: pytest.fail("computed"))


@pytest.mark.parametrize("name", LIMITS)
def test_a_turn_that_does_not_fit_is_refused_in_numbers(
    name: str, session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = session(**{name: 800})
    error = str(fill(chat))
    turns = len(chat.chat.turns) // 2
    assert turns >= 2
    text, answer = text_of(chat, QUESTION), int(name == LIMITS[1])
    said = f"{text} tokens of text + 576 visual tokens"
    assert said in error and f"= {text + 576 + answer}, but {name} is 800" in error
    assert f"(/method NAME keep_tokens={800 - text - answer})" in error and "(/reset)" in error
    watch(chat, monkeypatch)
    with pytest.raises(UserInputError, match="does not fit"):
        chat.ask(QUESTION)


@pytest.mark.parametrize("name", LIMITS)
def test_the_last_token_that_fits(name: str, session: Callable[..., Session]) -> None:
    """A prompt of just the limit is answered; one token less is refused."""
    text = text_of(session(), QUESTION)
    prompt = text + 576 + int(name == LIMITS[1])
    assert session(**{name: prompt}).ask(QUESTION).answer is not None
    with pytest.raises(UserInputError, match=f"{name} is {prompt - 1}"):
        session(**{name: prompt - 1}).ask(QUESTION)


def test_the_lower_limit_decides(session: Callable[..., Session]) -> None:
    error = fill(session(tokenizer_model_max_length=780, max_position_embeddings=760))
    assert "max_position_embeddings is 760" in str(error)
    error = fill(session(tokenizer_model_max_length=760, max_position_embeddings=780))
    assert "tokenizer_model_max_length is 760" in str(error)


def test_a_smaller_budget_or_a_new_start_go_on(session: Callable[..., Session]) -> None:
    chat = session(tokenizer_model_max_length=800)
    error = str(fill(chat))
    turns = chat.chat.turns
    (room,) = map(int, re.findall(r"keep_tokens=(\d+)", error))
    run_command(chat, f"/method grid keep_tokens={room + 1}")
    with pytest.raises(UserInputError, match=rf"\(/keep {room}\)"):
        chat.ask(QUESTION)
    run_command(chat, f"/keep {room}")
    turn = chat.ask(QUESTION)
    assert turn.cost.after == room and turn.cost.before == 576
    assert chat.chat.turns[:-2] == turns, "all turns are still there"
    fill(chat)
    run_command(chat, "/reset")
    assert chat.ask(QUESTION).answer


def test_more_tokens_in_mid_chat(
    session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = session(max_position_embeddings=700)
    run_command(chat, "/method grid keep_tokens=16")
    for _ in range(3):
        chat.ask(QUESTION)
    before = chat.chat
    with monkeypatch.context() as patch:
        watch(chat, patch)
        for command in ("/keep 1.0", "/keep 570", "/method none"):
            run_command(chat, command)
            with pytest.raises(UserInputError, match="does not fit"):
                chat.ask(QUESTION)
        run_command(chat, "/method grid keep_tokens=16")
        run_command(chat, "/set positions=original")
        with pytest.raises(UserInputError, match="positions of removed tokens") as caught:
            chat.ask(QUESTION)
    assert "(/set positions=compact)" in str(caught.value)
    assert chat.chat == before
    run_command(chat, "/set positions=compact")
    assert chat.ask(QUESTION).cost.after == 16


def test_pruned_images_do_not_give_way_in_silence(session: Callable[..., Session]) -> None:
    """`generate` drops visual tokens where text needs the room; a chat asks first."""
    chat = session(tokenizer_model_max_length=400)
    run_command(chat, "/method grid keep_tokens=256")
    error = str(fill(chat))
    assert "256 visual tokens" in error and "(/keep " in error


@pytest.mark.parametrize("name", LIMITS)
def test_ways_out_are_enough(session: Callable[..., Session], name: str) -> None:
    """A limit of the prompt does not count removed positions, one of positions ignores budgets."""
    chat = session()
    limit = text_of(chat, QUESTION) + 100
    chat = session(**{name: limit})
    run_command(chat, "/method grid keep_tokens=256")
    run_command(chat, "/set positions=original")
    with pytest.raises(UserInputError, match="does not fit") as caught:
        chat.ask(QUESTION)
    offered = [way for way in ("/set positions=compact", "/keep 100") if way in str(caught.value)]
    assert offered == (["/keep 100"] if name == LIMITS[0] else [])
    for way in offered:
        run_command(chat, way)
        assert chat.ask(QUESTION).cost.after == 100


def test_the_comparison_needs_room_too(
    session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = session(max_position_embeddings=600)
    run_command(chat, "/method grid keep_tokens=16")
    chat.ask(QUESTION)
    before = state(chat)
    watch(chat, monkeypatch)
    with pytest.raises(UserInputError, match=r"without pruning: .* 576 visual tokens .* is 600"):
        run_command(chat, "/compare")
    assert state(chat) == before


def test_a_compared_answer_that_the_context_ends_says_so(session: Callable[..., Session]) -> None:
    text = text_of(session(), QUESTION)
    chat = session(max_position_embeddings=text + 576 + 3)
    run_command(chat, "/method grid keep_tokens=16")
    assert not chat.ask(QUESTION).full
    assert "(an answer ends where the model's context does)" in run_command(chat, "/compare")


def test_a_first_question_that_is_too_long(session: Callable[..., Session]) -> None:
    chat = session(tokenizer_model_max_length=760)
    with pytest.raises(UserInputError, match="ask a shorter question") as caught:
        chat.ask("What? " * 400)
    assert "/reset" not in str(caught.value), "there is nothing to forget"
    assert "keep at most" not in str(caught.value), "no budget would help"
    assert not chat.chat.turns and chat.ask(QUESTION).answer


def test_another_image_starts_with_room(session: Callable[..., Session], picture: Path) -> None:
    chat = session(tokenizer_model_max_length=800)
    fill(chat)
    run_command(chat, f"/image {picture}")
    assert chat.ask(QUESTION).answer


def test_an_answer_ends_with_the_context(session: Callable[..., Session]) -> None:
    """Prompt and answer share the model's positions; the answer that uses them up says so."""
    chat = session()
    whole = chat.ask(QUESTION)
    assert not whole.full and "full" not in whole.status()
    text = text_of(session(), QUESTION)
    short = session(max_position_embeddings=text + 576 + 3)
    turn = short.ask(QUESTION)
    assert turn.full and turn.status().endswith("| the context is full; /reset starts again")
    assert turn.answer and whole.answer.startswith(turn.answer) and turn.answer != whole.answer
    with pytest.raises(UserInputError, match="/reset"):
        short.ask(QUESTION)


def test_a_terminal_loses_nothing(
    session: Callable[..., Session],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat = session(tokenizer_model_max_length=800)
    lines = [QUESTION] * 30 + ["/reset", QUESTION]
    monkeypatch.setattr("sys.stdin", Terminal("\n".join(lines) + "\n"))
    cli.chat(chat)
    out = capsys.readouterr().out
    asked = len(re.findall(r"576 -> 576 tokens", out))
    refused = re.findall(r"(?m)^error: this question does not fit: .*\(/reset\)$", out)
    assert asked + len(refused) == 31 and asked >= 3 and refused
    assert len(chat.chat.turns) == 2


def test_a_pipe_ends_with_its_reason(
    session: Callable[..., Session],
    loaded: LoadedModel,
    checkpoint: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    session(tokenizer_model_max_length=800)
    parts = (loaded.tokenizer, loaded.model, loaded.image_processor, 2048)
    monkeypatch.setattr("llava.families.spec.load_pretrained_model", lambda *_, **__: parts)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n" * 30))
    flags = ["--model-path", str(checkpoint), "--image-file", str(picture)]
    with pytest.raises(SystemExit) as stop:
        cli.main([*flags, "--temperature", "0", "--max-new-tokens", "6"])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    (error,) = captured.err.splitlines()
    assert error.startswith(
        "llava.serve.cli: error: this question does not fit"
    ) and error.endswith("(/reset)")
    assert captured.out.count("576 -> 576 tokens") >= 2, "the answers before are printed"
