"""A chat at a terminal: every command, every mistake, and Ctrl-C."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from llava.conversation import conv_templates
from llava.families.dialogue import IMAGE
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.loaded import LoadedModel
from llava.pruning import list_methods
from llava.sampling import Sampling
from llava.serve import cli
from llava.serve.commands import COMMANDS, run_command
from llava.serve.session import Session
from llava.serve.turn import ClockedStreamer
from llava.utils import UserInputError

BUDGETED = ", ".join(name for name in list_methods() if name != "none")


class Terminal(io.StringIO):
    """Typed lines that claim to come from a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    torch.set_num_threads(1)
    tokenizer, model, processor, _ = load_pretrained_model(str(checkpoint), device="cpu")
    return LoadedModel(model, tokenizer, processor, "vicuna_v1")


@pytest.fixture
def session(loaded: LoadedModel, picture: Path) -> Iterator[Session]:
    loaded.model.pruning = None
    yield Session(loaded, Image.open(picture), Sampling(temperature=0, max_new_tokens=6))
    assert "prune_visual_tokens" not in vars(loaded.model), "the clock was left on the model"


@pytest.fixture
def talk(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """`talk(line, ...)`: type lines into a chat; returns what it printed."""

    def run(*lines: str) -> str:
        monkeypatch.setattr("sys.stdin", Terminal("\n".join(lines) + "\n"))
        cli.chat(session)
        return capsys.readouterr().out

    return run


def answer_by_hand(session: Session, prompt: str, **settings: Any) -> str:
    model, processor = session.loaded.model, session.loaded.image_processor
    pixels = process_images([session.image], processor, model.config)
    ids = tokenizer_image_token(prompt, session.loaded.tokenizer, return_tensors="pt")[None]
    settings = {"do_sample": False, "max_new_tokens": 6, **settings}
    new = model.generate(inputs=ids, images=pixels, **settings)
    return session.loaded.tokenizer.decode(new[0], skip_special_tokens=True).strip()


def test_generation_config_decides_beside_the_flags(
    session: Session, talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = session.loaded.model, session.loaded.tokenizer
    chat = conv_templates["vicuna_v1"].copy()
    chat.append_message(chat.roles[0], "<image>\nWhat is it?")
    chat.append_message(chat.roles[1], None)
    before = session.ask("What is it?").answer
    config = GenerationConfig(
        **{"eos_token_id": 2, "suppress_tokens": list(range(3, 259))},  # the bytes
        **{"return_dict_in_generate": True, "stop_strings": ["q"], "do_sample": True},
    )
    monkeypatch.setattr(model, "generation_config", config)
    session.reset()
    out = talk("What is it?")
    settings = {"tokenizer": tokenizer, "return_dict_in_generate": False}
    said = answer_by_hand(session, chat.get_prompt(), **settings)
    assert said != before and said in out
    config.update(num_return_sequences=2, do_sample=True)
    with pytest.raises(UserInputError, match="generation_config sets num_return_sequences to 2"):
        Session(session.loaded, session.image, session.sampling)


def test_method_and_budget_hold_from_the_next_turn(talk: Callable[..., str]) -> None:
    out = talk(
        "/method", "/keep 64", "Hello?",
        "/method zoo directions=8", "Hello?",
        "/keep 0.25", "Hello?",
        "/method random keep_tokens=32 seed=3", "Hello?",
        "/method divprune", "/method none", "Hello?",
    )  # fmt: skip
    said = re.findall(r"\[(.*)\]", out)
    assert said == [
        "unpruned",
        f"noted: 64 tokens for the method that you choose with /method NAME: {BUDGETED}",
        "zoo, 64 tokens, directions=8",
        "zoo, ratio 0.25, directions=8",
        "random, 32 tokens, seed=3",
        "divprune, 32 tokens",
        "unpruned",
    ]
    kept = [int(number) for number in re.findall(r"576 -> (\d+) tokens", out)]
    assert kept == [576, 64, 144, 32, 576]


def test_the_flags_of_the_start_are_a_budget_too(session: Session) -> None:
    session.loaded.model.pruning = {"method": "zoo", "keep_tokens": 48}
    again = Session(session.loaded, session.image, session.sampling)
    assert run_command(again, "/method norm") == "[norm, 48 tokens]"


def test_choices_hold_across_methods_and_budgets(talk: Callable[..., str]) -> None:
    out = talk(
        "/set newline=keep positions=original", "/method zoo keep_tokens=64 directions=8",
        "/keep 32", "/method divprune allocation=global", "/set newline=select", "Hello?",
        "/set newline=drop positions=compact", "/method none", "/method",
    )  # fmt: skip
    kept = "newline=keep, positions=original"
    assert re.findall(r"\[(.*)\]", out) == [
        f"unpruned, {kept}",
        f"zoo, 64 tokens, directions=8, {kept}",
        f"zoo, 32 tokens, directions=8, {kept}",
        f"divprune, 32 tokens, allocation=global, {kept}",
        "divprune, 32 tokens, allocation=global, newline=select, positions=original",
        "divprune, 32 tokens, allocation=global",
        "unpruned, allocation=global",
        "unpruned, allocation=global",
    ]
    assert "576 -> 32 tokens" in out


def test_a_saved_choice_keeps_nobody_from_a_method(session: Session) -> None:
    saved = {"method": "zoo", "keep_tokens": 64, "newline": "keep", "positions": "original"}
    session.loaded.model.pruning = saved
    session = Session(session.loaded, session.image, session.sampling)
    said = run_command(session, "/method pool")
    assert said == (
        "[pool, 64 tokens]\n(no longer newline=keep, positions=original: 'pool' makes new tokens, "
        "so newline can only be 'drop'; for 'keep' use a method that selects)"
    )
    assert session.loaded.model.pruning.to_dict() == {"method": "pool", "keep_tokens": 64}
    session.loaded.model.pruning = saved
    with pytest.raises(UserInputError, match="so newline can only be 'drop'"):
        run_command(session, "/method pool newline=keep")
    with pytest.raises(UserInputError, match="unknown option of 'pool': 'size'"):
        run_command(session, "/method pool size=3")
    assert session.loaded.model.pruning.to_dict() == saved


def test_set_alone_says_what_there_is(session: Session) -> None:
    session.loaded.model.pruning = {"method": "zoo", "keep_tokens": 64, "newline": "keep"}
    lines = run_command(session, "/set").splitlines()
    assert [line.split()[0] for line in lines] == [
        "allocation=per_tile",
        "newline=keep",
        "positions=compact",
        "scope=image",
        "compute=auto",
    ]
    assert "drop | keep | select: " in lines[1]


def test_compare(session: Session) -> None:
    run_command(session, "/method grid keep_tokens=64")
    session.ask("What colour is it?")
    session.ask("And the circle?")
    before = session.loaded.render(session.chat)
    table = run_command(session, "/compare")
    assert session.loaded.render(session.chat) == before, "the chat goes on with the pruned answer"
    assert session.loaded.model.pruning.method == "grid"
    rows = {line[:10].strip(): line[10:].split() for line in table.splitlines() if line[0:1] != " "}
    assert rows["tokens"] == ["64", "576"]
    assert all(float(number) > 0 for number in rows["encode ms"] + rows["prefill ms"])
    assert "warming up" not in table, "the compared turn is the second one"

    chat = conv_templates["vicuna_v1"].copy()
    chat.append_message(chat.roles[0], "<image>\nWhat colour is it?")
    chat.append_message(chat.roles[1], session.chat.turns[1][0])
    chat.append_message(chat.roles[0], "And the circle?")
    chat.append_message(chat.roles[1], None)
    session.loaded.model.pruning = None
    assert session.ask_unpruned().answer == answer_by_hand(session, chat.get_prompt())


def test_both_answers_stand_in_columns(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    run_command(session, "/method grid keep_tokens=64")
    turn = session.ask("What colour is it?")
    table = run_command(session, "/compare")
    assert max(len(line) for line in table.splitlines()[:-1]) <= 72
    head = table.splitlines()[0]
    left, right = head.index("grid, 64 tokens"), head.index("unpruned")
    column = "".join(
        line[left:right].strip() + " "
        for line in table.splitlines()[1:]
        if line.startswith(("answer", " "))
    )
    assert "".join(column.split()) == "".join(turn.answer.split())
    assert "warming up" in table


def test_sampled_comparisons_say_so(session: Session) -> None:
    session.sampling = Sampling(temperature=1.0, max_new_tokens=2)
    run_command(session, "/method grid keep_tokens=64")
    session.ask("What colour is it?")
    assert "by chance" in run_command(session, "/compare")


def test_overlay(session: Session, tmp_path: Path) -> None:
    run_command(session, "/method grid keep_tokens=64")
    session.ask("What colour is it?")
    path = tmp_path / "what was kept.png"
    assert run_command(session, f"/overlay '{path}'") == f"[saved {path}]"
    with Image.open(path) as kept:
        assert kept.size == session.image.size
        assert kept.tobytes() != session.image.convert("RGB").tobytes()


def test_another_image_starts_again(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "plain.png"
    Image.new("RGB", (50, 30), "teal").save(path)
    session.ask("What colour is it?")
    assert "50 x 30" in run_command(session, f"/image {path}")
    assert not session.chat.turns and session.last is None
    turn = session.ask("What colour is it?")
    question, _ = session.chat.turns
    assert question == (IMAGE, "\n", "What colour is it?")
    prompt = session.loaded.render(session.chat).removesuffix(f" {turn.answer}</s>")
    assert turn.answer == answer_by_hand(session, prompt)


def test_reset_forgets_the_turns(session: Session) -> None:
    first = session.ask("What colour is it?")
    session.ask("And the circle?")
    run_command(session, "/reset")
    assert session.ask("What colour is it?").answer == first.answer


def test_lists_are_complete(talk: Callable[..., str]) -> None:
    out = talk("/methods", "/help")
    for name in (*list_methods(), "/decoder fastv", "/decoder pyramiddrop"):
        assert re.search(rf"(?m)^(USER: )?{name} +\S", out)
    for name, command in COMMANDS.items():
        assert command.summary in out and f"{name} {command.argument}".strip() in out


def test_tokens_are_dropped_between_layers(session: Session, talk: Callable[..., str]) -> None:
    out = talk(
        "/decoder", "Hello?", "/reset",
        "/decoder fastv keep_tokens=300", "Hello?", "/reset",
        "/method zoo keep_tokens=192 directions=8", "/decoder fastv keep_tokens=20", "Hello?",
        "/decoder fastv keep_tokens=100 k=1", "/keep 128", "Hello?", "/compare", "/decoder",
        "/set newline=keep", "/decoder none",
    )  # fmt: skip
    assert [said for said in re.findall(r"\[(.*)\]", out) if "again" not in said] == [
        "nothing is dropped between layers",
        "fastv, 300 tokens a layer",
        "zoo, 192 tokens, directions=8; fastv, 300 tokens a layer",
        "zoo, 192 tokens, directions=8; fastv, 20 tokens a layer",
        "zoo, 192 tokens, directions=8; fastv, 100 tokens a layer, k=1",
        "zoo, 128 tokens, directions=8; fastv, 100 tokens a layer, k=1",
        "fastv, 100 tokens a layer, k=1",
        "zoo, 128 tokens, directions=8, newline=keep; fastv, 100 tokens a layer, k=1",
        "zoo, 128 tokens, directions=8, newline=keep",
    ]
    counted = re.findall(r"576 -> (.*?) \| encode.*\| KV cache (\d+) kB", out)
    within = "tokens ({}) -> {} in the last layer (mean over layers {})"
    assert [tokens for tokens, _ in counted] == [
        "576 tokens (100.0 %)",
        "576 " + within.format("100.0 %", 24, "300.0"),
        "128 " + within.format("22.2 %", 72, "100.0"),
    ]
    (error,) = re.findall(r"(?m)error: (.*)$", out)
    assert "keep at least 96" in error, "the layer before the cut reads 192"
    whole, pruned, both = (int(kilobytes) for _, kilobytes in counted)
    token = 2 * 32 * 4 / 1000  # kB of keys and values in a layer
    assert whole - pruned == pytest.approx((576 - 24) * token, abs=1)
    assert whole - both == pytest.approx((576 - 128 + 576 - 72) * token, abs=1)
    assert re.search(r"(?m)^tokens +128 -> 72 \(mean 100\.0\) +576$", out)
    assert re.search(rf"(?m)^KV cache +{both} kB +{whole} kB$", out)


def test_commands_of_the_stage_say_what_they_leave_alone(talk: Callable[..., str]) -> None:
    out = talk("/decoder fastv keep_tokens=300", "/keep 128", "/method zoo", "/method none")
    assert "[noted: 128 tokens for the method that you choose with /method" in out
    assert "(not for fastv: /decoder fastv keep_tokens=N)" in out
    assert "[zoo, 128 tokens; fastv, 300 tokens a layer]" in out
    assert "(fastv still drops tokens between layers; /decoder none ends that)" in out
    alone = talk("/decoder none", "/keep 64", "/method none")
    assert "not for" not in alone and "still drops" not in alone


def test_a_turn_pruned_between_layers_answers_as_generate_does(
    session: Session, talk: Callable[..., str]
) -> None:
    talk("/decoder fastv keep_tokens=290", "What is it?", "And now?")
    chat = conv_templates["vicuna_v1"].copy()
    chat.append_message(chat.roles[0], "<image>\nWhat is it?")
    chat.append_message(chat.roles[1], session.chat.turns[1][0])
    chat.append_message(chat.roles[0], "And now?")
    chat.append_message(chat.roles[1], None)
    assert session.last is not None and session.last.cost is not None
    assert (session.last.cost.after, session.last.cost.last) == (576, 4)
    assert session.last.answer == answer_by_hand(session, chat.get_prompt())


@pytest.mark.parametrize("leave", ["/quit", "", None])
def test_ways_to_leave(talk: Callable[..., str], leave: str | None) -> None:
    lines = ["Hello?"] if leave is None else ["Hello?", leave, "Never read"]
    assert talk(*lines).count("tokens (100.0 %)") == 1


MISTAKES = [
    ("/mehtod zoo", "did you mean '/method'"),
    ("/keeep 3", "did you mean '/keep'"),
    ("/xyzzy", "valid: /compare, /decoder, /help"),
    ("/keep", "/keep N|RATIO"),
    ("/keep 0", "keep_tokens"),
    ("/keep -3", "keep_tokens"),
    ("/keep nan", "keep_ratio"),
    ("/keep 1.5", "keep_ratio"),
    ("/keep many", "'many'"),
    ("/method zoom", "did you mean 'zoo'"),
    ("/method zoo", "/keep 64"),
    ("/method zoo keep_tokens=8 direction=3", "'directions'"),
    ("/method zoo keep_tokens=8 directions=none", "directions"),
    ("/method zoo keep_tokens=8 keep_ratio=0.1", "not both"),
    ("/method zoo 64", "key=value"),
    ("/method fastv", "type /decoder fastv instead"),
    ("/decoder fastw", "did you mean 'fastv'"),
    ("/decoder zoo", "prunes before the language model"),
    ("/decoder fastv keep_tokens=0", "keep_tokens"),
    ("/decoder fastv layer=3", "unknown option of 'fastv'"),
    ("/decoder none k=3", "/decoder none takes no options"),
    ("What is \udcff?", "not a character; write it in UTF-8"),
    ("/set newlines=keep", "did you mean 'newline'"),
    ("/set newline=kept", "did you mean 'keep'"),
    ("/set newline", "key=value"),
    ("/set newline=select", "needs allocation='global'"),
    ("/compare", "ask a question first"),
    ("/overlay kept.png", "ask a question first"),
    ("/image nowhere.png", "nowhere.png"),
    ("/image", "PATH_OR_URL"),
    ("/reset now", "takes no argument"),
    ("What does <image> mean?", "leave <image> out"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES)
def test_a_mistake_costs_one_line(
    talk: Callable[..., str], session: Session, line: str, message: str
) -> None:
    out = talk(line, "/help")
    (error,) = re.findall(r"(?m)^(?:USER: )?error: (.*)$", out)
    assert message in error
    assert "/compare " in out, "the chat goes on"
    assert session.loaded.model.pruning is None and not session.chat.turns and not session.budget


def test_mistakes_after_a_turn(talk: Callable[..., str], tmp_path: Path) -> None:
    out = talk(
        "/method none", "Hello?", "/compare", "/overlay ~nobody-of-this-name/kept.png",
        f"/overlay {tmp_path / 'kept.xyz'}", f"/overlay {tmp_path / 'no' / 'kept.png'}",
        "/method pool keep_tokens=31", "Hello?",
        "/keep 16", "Hello?", f"/overlay {tmp_path / 'kept.png'}",
    )  # fmt: skip
    errors = re.findall(r"(?m)^(?:USER: )?error: (.*)$", out)
    expected = ["not pruned", "give another path", "ends in .png", "ends in .png", "31 tokens"]
    expected += ["merges tokens"]
    assert len(errors) == len(expected)
    assert all(part in error for part, error in zip(expected, errors, strict=True))
    assert re.findall(r"576 -> (\d+)", out) == ["576", "16"], "a refused turn leaves no trace"


def test_a_mistake_in_a_pipe_ends_the_chat(
    checkpoint: Path,
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/mehtod zoo\nHello?\n"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["--model-path", str(checkpoint), "--image-file", str(picture)])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and "did you mean '/method'" in captured.err.splitlines()[-1]
    assert "tokens" not in captured.out


def interrupt_at(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """Ctrl-C when the streamer gets its `token`-th new token."""
    put = ClockedStreamer.put

    def interrupting(self: ClockedStreamer, value: torch.Tensor) -> None:
        put(self, value)
        if len(self.tokens) == token:
            raise KeyboardInterrupt

    monkeypatch.setattr(ClockedStreamer, "put", interrupting)


def test_ctrl_c_keeps_what_was_said(
    session: Session, talk: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = session.ask("What colour is it?")
    session.reset()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        turn = session.ask("What colour is it?")
    assert turn.stopped and turn.cost.per_token is not None and "stopped" in turn.status()
    assert turn.answer and whole.answer.startswith(turn.answer) and turn.answer != whole.answer
    assert session.chat.turns[-1] == (turn.answer,), "the chat goes on from what was read"
    assert "576 -> 576 tokens (100.0 %)" in talk("And the circle?")


def test_ctrl_c_before_the_first_word_forgets_the_turn(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(session.loaded.model), "encode_images", interrupted)
        turn = session.ask("What colour is it?")
        cli.respond(session, "What colour is it?", overlay=tmp_path / "kept.png")
    assert turn.stopped and turn.cost is None and turn.status() == "stopped"
    assert not (tmp_path / "kept.png").exists()
    assert not session.chat.turns and session.last is None
    assert session.ask("What colour is it?").answer


def test_ctrl_c_stops_a_comparison(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run_command(session, "/method grid keep_tokens=64")
    session.ask("What colour is it?")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert run_command(session, "/compare") == "[comparison stopped]"
    assert session.loaded.model.pruning.method == "grid"


def test_ctrl_c_at_the_prompt_asks_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: Iterator[BaseException | str] = iter([KeyboardInterrupt(), "  Hello? "])

    def read(_: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert cli.read_line("USER") == "Hello?"
    assert "/quit" in capsys.readouterr().out


def test_ctrl_c_while_loading_ends_quietly(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llava.families.spec.load_pretrained_model", interrupted)
    assert cli.main(["--image-file", str(picture)]) == 130
    assert capsys.readouterr().err == ""


def test_loading_flags_reach_the_loader(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        calls.append((args, kwargs))
        return None, None, None, 2048

    monkeypatch.setattr("llava.families.spec.load_pretrained_model", load)
    flags = ["--model-path", "a/llava-v1.5-7b-lora", "--model-base", "vicuna", "--load-4bit"]
    with pytest.raises(SystemExit):  # this loader returns no vision model
        cli.main([*flags, "--image-file", str(picture), "--device", "cpu"])
    expected = ("a/llava-v1.5-7b-lora", "vicuna", "llava-v1.5-7b-lora")
    assert calls == [(expected, {"device": "cpu", "load_8bit": False, "load_4bit": True})]


def test_control_tokens_of_a_role_are_not_shown() -> None:
    assert cli.plain_role(conv_templates["chatml_direct"].roles[1]) == "assistant"
    assert cli.plain_role("USER") == "USER"
