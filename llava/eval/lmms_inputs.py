"""What lmms-eval hands over: requests (words, pictures, decoding settings) and model arguments.

lmms-eval's "simple" interface hands over a text and its pictures; the text may hold image marks.
Its "chat" interface hands over messages made of parts, and there a mark is put where a picture
stands: an `<image>` that somebody wrote is text.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava.command_line import DTYPES, device_name
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.families.dialogue import Dialogue, literal, split_at_marks, turn_of
from llava.sampling import Sampling
from llava.utils import UserInputError, describe_value

NEW_TOKENS = 1024  # where a task sets no limit
_ROLES = ("user", "assistant")
_Part = tuple[str, Any]  # kind, and text or picture


@dataclass(frozen=True)
class Prompt:
    """One request.

    Attributes:
        text: the user's words, with image marks or without any.
        images: the pictures of all turns, as RGB, in their order.
        decoding: the task's generation settings.
        history: what was said before, the user's words and the answer in turn, with marks.
        system: replaces the template's system text.
    """

    text: str
    images: tuple[Image.Image, ...]
    decoding: Mapping[str, Any]
    history: tuple[str, ...] = ()
    system: str | None = None

    @property
    def marked(self) -> str:
        """Return the words with a mark for every picture: one line in front if they had none."""
        if not self.images:
            return literal(self.text)
        if self.history or DEFAULT_IMAGE_TOKEN in self.text:
            return self.text
        return _marks(len(self.images)) + "\n" + self.text

    @property
    def words(self) -> str:
        """Return the words alone, for methods that read the question."""
        pieces = [piece.strip() for piece in split_at_marks(self.text)]
        return " ".join(filter(None, pieces))

    @property
    def sampling(self) -> Sampling:
        """Return the settings that lmms-eval's `llava` reads, with its defaults, also for null.

        It samples where the temperature is above 0 and reads `top_p` only there. `until` and
        `do_sample` have no effect.

        Raises:
            UserInputError: a value cannot be used.
        """
        temperature = self._number("temperature", 0.0)
        sampled = not isinstance(temperature, int | float) or temperature > 0
        top_p = self._number("top_p", None) if sampled else None
        return Sampling(
            temperature=temperature if sampled else 0.0,
            # 0 keeps only the likeliest token, and so does the smallest share above 0.
            top_p=math.ulp(0.0) if top_p == 0 and top_p is not False else top_p,
            num_beams=self._number("num_beams", 1),
            max_new_tokens=self._number("max_new_tokens", NEW_TOKENS),
        )

    @property
    def dialogue(self) -> Dialogue:
        """Return what is said, open for the answer, with marks as lmms-eval's `llava` has them."""
        turns = tuple(turn_of(text) for text in (*self.history, self.marked))
        system = None if self.system is None else "".join(split_at_marks(self.system))
        return Dialogue(turns, system, bare_marks=True)

    def _number(self, name: str, default: Any) -> Any:
        """Return a setting; None is the default, and a whole number may be written as 16.0."""
        value = self.decoding.get(name)
        if name in ("num_beams", "max_new_tokens") and isinstance(value, float):
            value = int(value) if value.is_integer() else value
        return default if value is None else value


def pictures_of(visuals: Any, task: str) -> tuple[Image.Image, ...]:
    """Return the pictures of a document as RGB; None has none, and None in a list is left out.

    Raises:
        UserInputError: other media, or not a list of pictures.
    """
    if visuals is None:
        return ()
    if not isinstance(visuals, list | tuple):
        raise UserInputError(f"task {task} shows {_short(visuals)}, not a list of pictures")
    return tuple(_picture(visual, task) for visual in visuals if visual is not None)


def read_messages(messages: Any, decoding: Mapping[str, Any], task: str) -> Prompt:
    """Read lmms-eval's chat messages.

    They may begin with a system message; then user and assistant take turns, the user last.

    Raises:
        UserInputError: messages are in another order or show other media than pictures.
    """
    try:
        turns = [(message["role"], _parts(message["content"])) for message in messages]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserInputError(
            f"task {task} does not ask with chat messages, which have a role and content: a text "
            "or a list of parts such as {'type': 'text', 'text': ...}"
        ) from error
    system = None
    if turns and turns[0][0] == "system":
        system = join(_shown(*turns.pop(0), task))
    roles = [role for role, _ in turns]
    if roles != [_ROLES[n % 2] for n in range(len(turns))] or len(turns) % 2 == 0:
        raise UserInputError(
            f"task {task} asks in turns of {', '.join(roles) or 'no one'}; user and assistant must "
            "take turns, the user first and last"
        )
    images: list[Image.Image] = []
    texts = []
    for role, parts in turns:
        shown = _shown(role, parts, task)
        images += [part for part in shown if not isinstance(part, str)]
        texts.append(join(shown))
    return Prompt(texts[-1], tuple(images), decoding, tuple(texts[:-1]), system)


def join(parts: Sequence[object]) -> str:
    """Join texts and pictures (whatever is not text) of one message to one text with marks.

    Pictures at the start are one line of marks, as in LLaVA. Elsewhere, a space is put between
    two parts unless there is white space already; texts are left as they are.
    """
    shown = [part for part in parts if part != ""]
    first = next((n for n, part in enumerate(shown) if isinstance(part, str)), len(shown))
    text = _marks(first) + "\n" if first else ""
    for part in shown[first:]:
        piece = literal(part) if isinstance(part, str) else DEFAULT_IMAGE_TOKEN
        apart = not text or text[-1].isspace() or piece[0].isspace()
        text += piece if apart else " " + piece
    return text


def _marks(count: int) -> str:
    return " ".join([DEFAULT_IMAGE_TOKEN] * count)


def _parts(content: Any) -> list[_Part]:
    """Return kind and value of a message's parts; its content may be one text."""
    if isinstance(content, str):
        return [("text", content)]
    return [
        (part["type"], part.get("text" if part["type"] == "text" else "url")) for part in content
    ]


def _shown(role: str, parts: Sequence[_Part], task: str) -> list[str | Image.Image]:
    shown = [_known(part, task) for part in parts]
    if role != "user" and not all(isinstance(part, str) for part in shown):
        raise UserInputError(f"task {task} shows a picture in the {role}'s turn; only users show")
    return shown


def _known(part: _Part, task: str) -> str | Image.Image:
    """Return a part's text, or its picture."""
    kind, value = part
    if kind == "image":
        return _picture(value, task)
    if kind != "text" or not isinstance(value, str):
        raise UserInputError(
            f"task {task} asks with a part of type {kind!r} that holds {_short(value)}; "
            "llava_pruned takes text and images"
        )
    return value


def _picture(visual: Any, task: str) -> Image.Image:
    if not isinstance(visual, Image.Image):
        raise UserInputError(
            f"task {task} shows {_short(visual)}; llava_pruned takes pictures (PIL images), one "
            "after the other: no video, no sound, no list in a list"
        )
    return visual.convert("RGB")


def _short(value: Any) -> str:
    """Return a text cut to 60 characters; of other values the type."""
    return repr(value[:60]) if isinstance(value, str) else describe_value(value)


def batch_size_of(value: Any) -> int:
    """Read a whole number of at least 1, perhaps written as text.

    Raises:
        UserInputError: any other value.
    """
    try:
        size = int(value)
        right = size >= 1 and size == float(value)
    except (TypeError, ValueError, OverflowError):  # auto, None, inf
        right = False
    if not right:
        raise UserInputError(
            f"batch_size must be a whole number of at least 1, got {value!r}; llava_pruned does "
            "not choose one by itself"
        )
    return size


def dtype_of(value: Any) -> str | None:
    """Read the name of a precision; None, also for `auto`, leaves it to the loader.

    Raises:
        UserInputError: any other value.
    """
    if value is None or value == "auto":
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UserInputError(f"unknown dtype {value!r}; use auto, {', '.join(DTYPES)}")
    return name


def device_of(value: Any) -> str:
    """Read the name of a device that torch can use here; None is `auto`.

    Raises:
        UserInputError: torch cannot use it.
    """
    try:
        return device_name("auto" if value is None else str(value))
    except argparse.ArgumentTypeError as error:
        raise UserInputError(str(error)) from error
