"""Prompt templates of LLaVA.

Checkpoints were trained on exactly these strings, so every template renders byte for byte what
LLaVA renders (checked against recorded prompts in `tests/goldens/llava/conversation`).
"""

import base64
import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.utils import UserInputError

# Background of padded images: the CLIP channel means times 255, cut to integers.
CLIP_MEAN_RGB = (122, 116, 104)
MAX_IMAGE_SIDE = 1344


class SeparatorStyle(Enum):
    """How turns are joined; see `Conversation.get_prompt`."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


class Piece(NamedTuple):
    """A stretch of a prompt, and whose words it is.

    Attributes:
        text: as it is in the prompt.
        message: index of the message whose words these are, with the mark that ends them (the
            exchange that a template may put before an image message counts); None for what the
            template says by itself: system text and speakers' names.
    """

    text: str
    message: int | None = None


@dataclasses.dataclass
class Conversation:
    """A prompt template together with the messages said so far.

    `messages` holds `[role, message]` pairs. A message is a string, `None` for the turn that
    the model is to write, or a tuple `(text, PIL image, mode)` with mode `Pad`, `Default`,
    `Crop` or `Resize`. Messages before `offset` are the template's own example dialogue.
    """

    system: str
    roles: tuple[str, str]
    messages: Any
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def append_message(self, role: str, message: Any) -> None:
        """Add one turn; `None` opens the turn the model is to write."""
        self.messages = [*self.messages, [role, message]]

    def copy(self) -> "Conversation":
        """Return a copy whose messages can be changed without touching this template."""
        return dataclasses.replace(self, messages=[list(pair) for pair in self.messages])

    def get_prompt(self) -> str:
        """Render the conversation.

        Raises:
            TypeError: an answered turn under a `PLAIN` or `TWO` template without a second separator
                (as LLaVA does).
            UserInputError: a `LLAMA_2` conversation that does not open with a user message.
        """
        return "".join(piece.text for piece in self.pieces())

    def pieces(self) -> Iterator[Piece]:
        """Render the prompt piece by piece, each with the message it belongs to.

        What a model is to write in an answered turn is the one piece of that message: it starts
        where the prompt of the open turn would end. A message without text has no piece.

        Raises:
            TypeError, UserInputError: as `get_prompt`.
        """
        turns = [(role, _text(message)) for role, message in self._with_image_first()]
        if self.sep_style is SeparatorStyle.LLAMA_2:
            yield from self._render_llama_2(turns)
            return
        plain = self.sep_style is SeparatorStyle.PLAIN  # no names, no end of the system text
        colon = self.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.TWO)
        same_end = self.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT)
        ends = (self.sep, self.sep if same_end else self.sep2)
        yield Piece(self.system if plain else self.system + self.sep)
        for i, (role, text) in enumerate(turns):
            if not plain:
                # An open turn ends at the colon: the model writes the space itself.
                yield Piece(f"{role}:" if colon else role)
            if not text:
                continue
            end = ends[i % 2]
            if end is None:
                raise TypeError("this template has no separator (sep2) to close an answer")
            yield Piece(f" {text}{end}" if colon else f"{text}{end}", i)

    def _with_image_first(self) -> list[tuple[str, Any]]:
        """Return the messages, the image mark of a leading image message moved to the front."""
        messages = [(role, message) for role, message in self.messages]
        if not messages or not isinstance(messages[0][1], tuple):
            return messages
        role, first = messages[0]
        text = first[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" in self.version:
            shown = (self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>")
            return [shown, (self.roles[1], "Received."), (role, text), *messages[1:]]
        return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *messages[1:]]

    def _render_llama_2(self, turns: list[tuple[str, str]]) -> Iterator[Piece]:
        for i, (role, text) in enumerate(turns):
            if i == 0 and (not text or role != self.roles[0]):
                raise UserInputError(
                    f"a {self.version} conversation must open with a message of "
                    f"{self.roles[0]!r}; append one before rendering the prompt"
                )
            if not text:
                continue
            if i == 0 and self.system:
                text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{text}"
            if i % 2 == 1:
                yield Piece(f" {text} {self.sep2}", i)
                continue
            said = f"{self.sep}[INST] {text} [/INST]"
            # The tokenizer adds <s> itself. LLaVA strips a set of characters here, not a prefix.
            yield Piece(said.lstrip(self.sep) if i == 0 else said, i)

    def get_images(self, return_pil: bool = False) -> list[Any]:
        """Images of the user's turns: PIL images, or PNG files as base64 text.

        The longer side is brought down to at most 1344 pixels.
        """
        images = []
        for _, message in self.messages[self.offset :: 2]:
            if isinstance(message, tuple):
                image = _prepare_image(message[1], message[2])
                images.append(image if return_pil else _png_base64(image))
        return images

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """`[user, assistant]` pairs for a chat widget, images embedded as data URLs."""
        pairs: list[list[str | None]] = []
        for i, (_, message) in enumerate(self.messages[self.offset :]):
            if isinstance(message, tuple):
                data = _png_base64(_prepare_image(message[1], "Default"))
                tag = f'<img src="data:image/png;base64,{data}" alt="user upload image" />'
                message = tag + message[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
            if i % 2 == 0:
                pairs.append([message, None])
            else:
                pairs[-1][1] = message
        return pairs

    def dict(self) -> dict[str, Any]:
        """Plain data for logs; images are left out."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [
                [role, message[0] if isinstance(message, tuple) else message]
                for role, message in self.messages
            ],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


def _text(message: Any) -> str:
    if isinstance(message, tuple):
        message = message[0]
    return message or ""


def _prepare_image(image: Image.Image, mode: str) -> Image.Image:
    if mode == "Pad":
        from llava.mm_utils import expand2square

        image = expand2square(image.convert("RGB"), CLIP_MEAN_RGB)
    elif mode == "Resize":
        image = image.resize((336, 336))
    elif mode not in ("Default", "Crop"):
        raise UserInputError(
            f"unknown image mode {mode!r}; use 'Pad', 'Default', 'Crop' or 'Resize'"
        )
    scale = MAX_IMAGE_SIDE / max(image.size)
    if scale < 1:
        width, height = image.size
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    return image


def _png_base64(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_VISUAL_CONTENT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able "
    "to understand the visual content that the user provides, and assist the user with a variety "
    "of tasks using natural language.The visual content will be provided with the following "
    "format: <Image>visual content</Image>."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_EXAMPLE_QUESTION = (
    "What are the key differences between renewable and non-renewable energy sources?"
)
_EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short "
    "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
    "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, "
    "and natural gas. Here are some key differences between renewable and non-renewable energy "
    "sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n"
)

_HUMAN = ("Human", "Assistant")
_USER = ("USER", "ASSISTANT")
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
_EXAMPLE = (("Human", _EXAMPLE_QUESTION), ("Assistant", _EXAMPLE_ANSWER))
_S = SeparatorStyle

conv_vicuna_v0 = Conversation(_CURIOUS_HUMAN, _HUMAN, _EXAMPLE, len(_EXAMPLE), _S.SINGLE, "###")
conv_vicuna_v1 = Conversation(_CURIOUS_USER, _USER, (), 0, _S.TWO, " ", "</s>", "v1")
conv_llama_2 = Conversation(_LLAMA_2_SYSTEM, _USER, (), 0, _S.LLAMA_2, "<s>", "</s>", "llama_v2")
conv_mistral_instruct = Conversation("", _USER, (), 0, _S.LLAMA_2, "", "</s>", "llama_v2")
conv_chatml_direct = Conversation(
    "<|im_start|>system\nAnswer the questions.", _CHATML, (), 0, _S.MPT, "<|im_end|>", version="mpt"
)
conv_mpt = Conversation(
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers.",
    _CHATML,
    (),
    0,
    _S.MPT,
    "<|im_end|>",
    version="mpt",
)
conv_llava_plain = Conversation("", ("", ""), (), 0, _S.PLAIN, "\n")
conv_llava_v0 = Conversation(_CURIOUS_HUMAN, _HUMAN, (), 0, _S.SINGLE, "###")
conv_llava_v0_mmtag = Conversation(
    _VISUAL_CONTENT, _HUMAN, (), 0, _S.SINGLE, "###", version="v0_mmtag"
)
conv_llava_v1 = Conversation(_CURIOUS_HUMAN, _USER, (), 0, _S.TWO, " ", "</s>", "v1")
conv_llava_v1_mmtag = Conversation(_VISUAL_CONTENT, _USER, (), 0, _S.TWO, " ", "</s>", "v1_mmtag")
conv_llava_llama_2 = Conversation(
    _LLAVA_LLAMA_2_SYSTEM, _USER, (), 0, _S.LLAMA_2, "<s>", "</s>", "llama_v2"
)

conv_templates: dict[str, Conversation] = {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
}

# Trainers replace this global to choose the template of a run; read it through the module.
default_conversation = conv_vicuna_v1


def conv_mode_for(model_name: str, config: Any = None) -> str:
    """Choose the template key for a model.

    `mm_conv_mode` of the config wins; otherwise the name decides by LLaVA's rules.

    Args:
        model_name: the name as `get_model_name_from_path` gives it.
        config: the model's config, as an object or a dict; may be None.

    Raises:
        UserInputError: `mm_conv_mode` names no template.
    """
    if isinstance(config, Mapping):
        chosen = config.get("mm_conv_mode")
    else:
        chosen = getattr(config, "mm_conv_mode", None)
    if chosen is not None:
        if not isinstance(chosen, str) or chosen not in conv_templates:
            raise UserInputError(
                f"mm_conv_mode {chosen!r} in config.json is not a known template; "
                f"use one of {', '.join(conv_templates)}"
            )
        return chosen
    name = model_name.lower()
    rules = {
        "llama-2": "llava_llama_2",
        "mistral": "mistral_instruct",
        "v1.6-34b": "chatml_direct",
        "v1": "llava_v1",
        "mpt": "mpt",
    }
    return next((mode for part, mode in rules.items() if part in name), "llava_v0")
