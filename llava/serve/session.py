"""A chat about one image: model, template, pruning setting, and the turns so far."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.families.contract import VisionLanguageModel
from llava.families.dialogue import IMAGE, Dialogue
from llava.families.lengths import (
    Limit,
    PromptLength,
    answer_room,
    describe_overflow,
    exceeded_limits,
    visual_room,
)
from llava.model.call_context import steps_run_by
from llava.pixels import VIEWER
from llava.pruning import PruningConfig, PruningError, get_method, prune
from llava.pruning.config import BUDGETS, CHOICES
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.registry import DECODER_METHODS
from llava.pruning.visualize import overlay_tokens
from llava.registry import unknown
from llava.sampling import Sampling
from llava.serve.turn import ClockedStreamer, PipelineClock, Turn, new_cache
from llava.utils import UserInputError

NO_DECODER = "none"  # what `/decoder` takes for a method that drops nothing


class Session:
    """The state of a chat. Every method leaves it as it was if it raises.

    Args:
        loaded: the model and what belongs to it; `loaded.pruning` is the active setting.
        image: what the chat is about.
        sampling: how answers are drawn.
        debug: print every prompt on stderr.
        reading: how `/image` reads pictures, see `llava.pixels`.

    Raises:
        UserInputError: the model's generation_config cannot be carried out.
    """

    def __init__(
        self,
        loaded: VisionLanguageModel,
        image: Image.Image,
        sampling: Sampling,
        debug: bool = False,
        reading: str = VIEWER,
    ) -> None:
        sampling.check_model(loaded.model)
        self.loaded = loaded
        self.sampling = sampling
        self.debug = debug
        self.reading = reading
        self.budget = budget_of(loaded.pruning)
        self._warm = False
        self.show(image)

    def show(self, image: Image.Image) -> None:
        """Change the image; the chat starts again, because the image is part of its first turn."""
        self.picture = self.loaded.prepare(image)
        self.image = image
        self.reset()

    def reset(self) -> None:
        """Forget all turns; image and settings stay."""
        self.chat = Dialogue()
        self.last: Turn | None = None
        self._last_prompt, self._last_question = self.chat, ""

    def use_method(self, name: str, options: dict[str, Any]) -> str | None:
        """Prune with another method; budget and choices among `options` replace those in use.

        Choices in use that do not go with the method must not keep anyone from it: they are the
        defaults again. Returns what was changed so, and why, or None.

        Raises:
            UserInputError: unknown names, or no budget at all.
        """
        if name in DECODER_METHODS.entries():
            raise UserInputError(
                f"{name} prunes inside the language model; type /decoder {name} instead"
            )
        options = dict(options)
        budget = {key: options.pop(key) for key in BUDGETS if key in options} or self.budget
        chosen = {key: options.pop(key) for key in CHOICES if key in options}
        if not get_method(name).budgeted:
            budget = {}
        elif not budget:
            raise UserInputError(f"{name} needs a budget; set one first: /keep 64, or /keep 0.1")
        before = self.loaded.pruning.choices if self.loaded.pruning is not None else {}
        note = None
        decoder = None if self.loaded.pruning is None else self.loaded.pruning.decoder
        own: dict[str, Any] = {**budget, "options": options, "decoder": decoder}
        try:
            config = PruningConfig(name, **own, **(before | chosen))
        except PruningError as error:  # of what is in use, or of what was typed
            config = PruningConfig(name, **own, **chosen)
            note = f"no longer {join_settings(before)}: {error}"
        self.loaded.pruning = config
        self.budget = budget_of(config) or self.budget
        return note

    def use_decoder(self, name: str, options: dict[str, Any]) -> None:
        """Drop tokens between layers with another method, or with `none` no longer.

        Its budget, the mean over layers, is among the options; without one its published schedule
        counts.

        Raises:
            UserInputError: unknown names, or values that they cannot have.
        """
        decoder = None
        if name != NO_DECODER:
            own = dict(options)
            budget = {key: own.pop(key) for key in BUDGETS if key in own}
            decoder = DecoderConfig(name, **budget, options=own)
        elif options:
            raise UserInputError(f"/decoder {NO_DECODER} takes no options")
        self.loaded.pruning = replace(self.loaded.pruning or PruningConfig(), decoder=decoder)

    def use_choices(self, choices: dict[str, Any]) -> None:
        """Change settings named in CHOICES.

        Raises:
            UserInputError: other names, or values that they cannot have.
        """
        for name in choices:
            if name not in CHOICES:
                raise PruningError(unknown("setting", name, CHOICES))
        self.loaded.pruning = replace(self.loaded.pruning or PruningConfig(), **choices)

    def use_budget(self, budget: dict[str, Any]) -> None:
        """Keep as many tokens from now on; without a method the budget waits for the next one."""
        budgets: dict[str, Any] = {name: budget.get(name) for name in BUDGETS}
        # Built also where nothing uses it yet: it checks numbers.
        config = replace(self.loaded.pruning or PruningConfig(), **budgets)
        if config.pruner.budgeted:
            self.loaded.pruning = config
        self.budget = budget

    def ask(self, question: str) -> Turn:
        """Stream the answer to a question. Ctrl-C ends the answer, which then stays as it is.

        The answer also ends where the model has no more positions (`Turn.full`).

        Raises:
            UserInputError: an image mark in the question, an impossible budget, or, before anything
                is computed, a question that does not fit the model's context together with the
                image and the turns so far.
        """
        if DEFAULT_IMAGE_TOKEN in question:
            raise UserInputError(
                f"the image is shown by itself; leave {DEFAULT_IMAGE_TOKEN} out of the question"
            )
        first = not self.chat.turns
        mark = (IMAGE, "\n") if first else ()
        prompt = self.chat.say(*mark, question)
        row = self._row(prompt)
        length, exceeded = self._measure(row)
        if exceeded:
            why = describe_overflow(length, exceeded[0])
            raise UserInputError(
                f"this question does not fit: {why}; the chat is as it was before. You can "
                f"{self._ways_out(length, exceeded, first)}"
            )
        turn = self._answer(row, question, length)
        if turn.answer or not turn.stopped:  # a turn stopped before its first word never was
            self.chat, self.last = prompt.say(turn.answer), turn
            self._last_prompt, self._last_question = prompt, question
        return turn

    def ask_unpruned(self) -> Turn:
        """Answer the last turn again with all visual tokens, silently; the chat is not changed.

        Raises:
            UserInputError: they do not fit the model's context.
        """
        with prune(self.loaded.model):
            row = self._row(self._last_prompt)
            length, exceeded = self._measure(row)
            if exceeded:
                raise UserInputError(
                    "the last turn does not fit without pruning: "
                    f"{describe_overflow(length, exceeded[0])}; compare a shorter chat (/reset)"
                )
            return self._answer(row, self._last_question, length, silent=True)

    def save_overlay(self, path: Path) -> None:
        """Save the image with the patches dimmed that the last turn removed.

        Raises:
            UserInputError: there is no turn, tokens were merged, or it cannot be written.
        """
        last = self.last
        if last is None or last.visual is None:
            raise UserInputError("there is no turn to draw yet; ask a question first")
        if last.visual.sources is not None:
            raise UserInputError(
                f"{last.setting}: this method merges tokens, it keeps none to show; choose "
                "one that selects"
            )
        picture = overlay_tokens(self.image, last.visual)
        try:
            picture.save(path)
        except (OSError, ValueError) as error:  # ValueError: an unknown ending
            raise UserInputError(
                f"cannot save {path}: {error}; give another path, one that ends in .png"
            ) from error

    def _row(self, prompt: Dialogue) -> torch.Tensor:
        """Tokenise the prompt: int64 [L]."""
        if self.debug:
            print(f"\n{self.loaded.render(prompt)!r}", file=sys.stderr)
        return self.loaded.row(prompt)

    def _measure(self, row: torch.Tensor) -> tuple[PromptLength, list[Limit]]:
        """Measure a prompt [L]: its length and the limits that it exceeds, the lowest first."""
        length = self.loaded.measure(row, [self.picture])
        return length, exceeded_limits(self.loaded.limits, length)

    def _ways_out(self, length: PromptLength, exceeded: list[Limit], first: bool) -> str:
        """Return what the user can do about a question that does not fit; each alone is enough."""
        ways = ["ask a shorter question"]
        config, room = self.loaded.pruning, visual_room(self.loaded.limits, length.text)
        compact = length._replace(positions=length.total)
        if not any(limit.exceeded_by(compact) for limit in exceeded):
            ways.append("count positions without the removed tokens (/set positions=compact)")
        # Fewer tokens leave the positions of removed ones as they are.
        fixed = length.positions > length.total and any(limit.answer for limit in exceeded)
        if room is not None and 0 < room < length.visual and not fixed:
            pruned = config is not None and config.pruner.budgeted
            command = f"/keep {room}" if pruned else f"/method NAME keep_tokens={room}"
            ways.append(f"keep at most {room} visual tokens ({command})")
        if not first:
            ways.append("start again without the turns so far (/reset)")
        return ", or ".join(ways)

    def _answer(
        self, row: torch.Tensor, question: str, length: PromptLength, silent: bool = False
    ) -> Turn:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        sampling, room = self.sampling, answer_room(self.loaded.limits, length)
        if room is not None:
            sampling = replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))
        clock, cache = PipelineClock(model.device), new_cache(model)
        streamer = ClockedStreamer(tokenizer, model.device, silent, cache)
        setting = describe(self.loaded.pruning)
        stopped = False
        with prune(model, self.loaded.pruning) as run:
            try:
                with steps_run_by(clock.run), torch.inference_mode():
                    settings = sampling.arguments_for(model, tokenizer)
                    settings |= {} if cache is None else {"past_key_values": cache}
                    self.loaded.answer(
                        [row], [self.picture], [question], streamer=streamer, **settings
                    )
            except KeyboardInterrupt:
                stopped = True
                streamer.end()  # print what is held back, and the end of the line
        answer = tokenizer.decode(streamer.tokens, skip_special_tokens=True).strip()
        cost = clock.cost(streamer.laps, run.decoder_trace, streamer.cache_bytes)
        visual = clock.tokens.get("prune")
        full = room is not None and len(streamer.tokens) >= room
        turn = Turn(setting, answer, stopped, not self._warm, cost, visual, full)
        self._warm = True
        return turn


def budget_of(config: PruningConfig | DecoderConfig | None) -> dict[str, Any]:
    """Return the budget of a setting as keyword arguments; empty if it has none."""
    return {
        name: getattr(config, name) for name in BUDGETS if getattr(config, name, None) is not None
    }


def describe(config: PruningConfig | None) -> str:
    """Describe a setting in a few words, such as `zoo, 64 tokens, directions=8, newline=keep`.

    What is dropped between layers follows: `zoo, 192 tokens; fastv, 64 tokens a layer`.
    """
    if config is None:
        return "unpruned"
    parts = [config.method, describe_budget(budget_of(config)), join_settings(config.options)]
    if config.method == "none":
        parts = ["unpruned"]
    before = ", ".join(part for part in [*parts, join_settings(config.choices)] if part)
    if config.decoder is None:
        return before
    after = describe_decoder(config.decoder)
    return after if before == "unpruned" else f"{before}; {after}"


def describe_decoder(config: DecoderConfig | None) -> str:
    """Describe what is dropped between layers, such as `fastv, 64 tokens a layer, k=3`."""
    if config is None:
        return "nothing is dropped between layers"
    budget = describe_budget(budget_of(config))
    parts = [config.method, budget and f"{budget} a layer", join_settings(config.options)]
    return ", ".join(part for part in parts if part)


def describe_budget(budget: Mapping[str, Any]) -> str:
    """Return `64 tokens` or `ratio 0.1`; empty without a budget."""
    words = {"keep_tokens": "{} tokens", "keep_ratio": "ratio {:g}"}
    return "".join(words[name].format(value) for name, value in budget.items())


def join_settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
