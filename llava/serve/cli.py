"""Chat about one image in the terminal: `python -m llava.serve.cli --image-file scene.png`.

LLaVA's flags, plus visual token pruning. The image enters the first turn only; an empty line or
end of input leaves. After each answer one line says how many visual tokens the language
model saw and where the time went.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image, UnidentifiedImageError
from transformers import TextStreamer

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation, conv_mode_for, conv_templates
from llava.eval.prompts import image_mark
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.pruning import PruningConfig, VisualTokens, parse_options
from llava.pruning.visualize import overlay_tokens
from llava.utils import UserInputError


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit code 2, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class ClockedStreamer(TextStreamer):
    """Prints text as it is generated and remembers when each token arrived."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.arrivals: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        # The first call carries the prompt; the tensor is on the CPU, so its work is finished.
        self.arrivals.append(time.perf_counter())
        super().put(value)


class PipelineClock:
    """Times the encode and prune steps of a model and keeps the tokens they produced."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = {"encode": 0.0, "prune": 0.0}
        self.tokens: dict[str, VisualTokens] = {}

    @contextmanager
    def watch(self, model: Any) -> Iterator[None]:
        """Stand in for both steps of `model` inside the block."""
        steps = {"encode": "encode_visual_tokens", "prune": "prune_visual_tokens"}
        for name, method in steps.items():
            setattr(model, method, self._timed(name, getattr(model, method)))
        try:
            yield
        finally:
            for method in steps.values():
                delattr(model, method)  # the class's own method shows again

    def _timed(self, name: str, step: Callable[..., VisualTokens]) -> Callable[..., VisualTokens]:
        def run(*args: Any, **kwargs: Any) -> VisualTokens:
            start = self._now()
            self.tokens[name] = step(*args, **kwargs)
            self.seconds[name] += self._now() - start
            return self.tokens[name]

        return run

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat; 0 when the user leaves, 2 with one line on stderr for unusable input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        chat(args)
    except (UserInputError, ValueError, OSError) as error:
        if args.debug:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        parser.error(lines[0])
    return 0


def build_parser() -> argparse.ArgumentParser:
    """LLaVA's flags and the pruning flags."""
    parser = OneLineParser(prog="llava.serve.cli", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-path", default="playground/llava-tiny", help="checkpoint folder or hub name")
    add("--model-base", help="base model of a LoRA or projector-only checkpoint")
    add("--image-file", required=True, help="path of the image")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--conv-mode", help="conversation template, instead of the model's own")
    add("--temperature", type=float, default=0.2, help="0 is greedy")
    add("--max-new-tokens", type=int, default=512)
    add("--load-8bit", action="store_true")
    add("--load-4bit", action="store_true")
    add("--debug", action="store_true", help="show prompts, and tracebacks of errors")
    add("--pruner", help="pruning method, such as zoo")
    add("--keep-tokens", type=int, help="visual tokens kept per image")
    add("--keep-ratio", type=float, help="or the share of them kept, in (0, 1]")
    add("--pruner-option", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    add("--save-overlay", type=Path, metavar="PATH", help="save a picture of the kept tokens")
    return parser


def chat(args: argparse.Namespace) -> None:
    """Load image and model, then answer line after line of stdin."""
    check_conv_mode(args.conv_mode)
    image = load_image(args.image_file)
    pruning = pruning_from(args)
    name = get_model_name_from_path(args.model_path)
    tokenizer, model, processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        name,
        args.load_8bit,
        args.load_4bit,
        device=args.device,
    )
    if processor is None:
        raise UserInputError(f"{args.model_path} is not a LLaVA model: it has no vision tower")
    if pruning is not None:
        model.pruning = pruning
    conversation = start_conversation(args.conv_mode, name, model.config)
    pixels = process_images([image], processor, model.config)
    mark = image_mark(model.config)
    while question := ask(conversation.roles[0]):
        conversation.append_message(conversation.roles[0], mark + question)
        conversation.append_message(conversation.roles[1], None)
        mark = ""  # the image belongs to the first turn
        clock = PipelineClock(model.device)
        print(f"{conversation.roles[1]}: ", end="", flush=True)
        with clock.watch(model):
            answer, status = reply(model, tokenizer, conversation, (pixels, image), args, clock)
        conversation.messages[-1][-1] = answer
        print(status, flush=True)
        if args.save_overlay:
            save_overlay(image, clock.tokens["prune"], args.save_overlay)


def reply(
    model: Any,
    tokenizer: Any,
    conversation: Conversation,
    picture: tuple[Any, Image.Image],
    args: argparse.Namespace,
    clock: PipelineClock,
) -> tuple[str, str]:
    """Stream the answer to the open turn; returns it and the status line."""
    prompt = conversation.get_prompt()
    if args.debug:
        print(f"\n{prompt!r}", file=sys.stderr)
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    ids = ids[None].to(model.device)
    pixels, image = picture
    sampled = args.temperature > 0
    streamer = ClockedStreamer(tokenizer)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            inputs=ids,
            images=pixels,
            image_sizes=[image.size],
            attention_mask=torch.ones_like(ids),
            do_sample=sampled,
            temperature=args.temperature if sampled else None,
            max_new_tokens=args.max_new_tokens,
            use_cache=True,
            streamer=streamer,
        )
    answer = tokenizer.decode(output[0], skip_special_tokens=True).strip()
    return answer, status_line(clock, start, streamer.arrivals[1:])


def status_line(clock: PipelineClock, start: float, arrivals: Sequence[float]) -> str:
    """Tokens before and after, and milliseconds per step.

    prefill is the time from `start` to the first new token without encoding and pruning; ms/token
    is the mean over the tokens after the first. `arrivals` are the times of the new tokens.
    """
    before, after = (clock.tokens[step].embeddings(0).shape[0] for step in ("encode", "prune"))
    trace = clock.tokens["prune"].trace
    score, select = (trace.score_seconds, trace.select_seconds) if trace else (0.0, 0.0)
    encode = clock.seconds["encode"]
    prefill = arrivals[0] - start - encode - clock.seconds["prune"]
    parts = [
        f"{before} -> {after} tokens ({100 * after / before:.1f} %)",
        f"encode {1000 * encode:.0f} ms",
        f"score {1000 * score:.1f}",
        f"select {1000 * select:.1f}",
        f"prefill {1000 * prefill:.0f}",
    ]
    if len(arrivals) > 1:
        parts.append(f"{1000 * (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1):.1f} ms/token")
    return " | ".join(parts)


def load_image(location: str) -> Image.Image:
    """The image at a path, as RGB; UserInputError if there is none."""
    if location.startswith(("http://", "https://")):
        raise UserInputError(f"--image-file takes a path; download {location} first")
    try:
        with Image.open(location) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UserInputError(f"{location} is not an image that can be read") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserInputError(f"cannot read image {location}: {reason}") from error


def device_name(name: str) -> str:
    """`name` if it is `auto` or names a device to torch."""
    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"no such device: {name!r}") from error
    return name


def pruning_from(args: argparse.Namespace) -> PruningConfig | None:
    """The pruning setting of the flags; None leaves the model's own in place."""
    extra = args.keep_tokens is not None or args.keep_ratio is not None or args.pruner_option
    if args.pruner is None:
        if extra:
            raise UserInputError("--keep-tokens, --keep-ratio and --pruner-option need --pruner")
        return None
    options = parse_options(args.pruner_option)
    return PruningConfig(args.pruner, args.keep_tokens, args.keep_ratio, options)


def check_conv_mode(mode: str | None) -> None:
    """Refuse an unknown template before the model is loaded for nothing."""
    if mode is not None and mode not in conv_templates:
        known = ", ".join(sorted(conv_templates))
        raise UserInputError(f"unknown --conv-mode {mode!r}; valid: {known}")


def start_conversation(mode: str | None, model_name: str, config: Any) -> Conversation:
    """The template asked for, else the model's; says on stderr when both exist and differ."""
    own = conv_mode_for(model_name, config)
    if mode is not None and mode != own:
        print(f"note: --conv-mode {mode} replaces {own}, this model's own", file=sys.stderr)
    return conv_templates[mode or own].copy()


def ask(role: str) -> str:
    """One line of stdin; empty at its end."""
    try:
        return input(f"{role}: ").strip()
    except EOFError:
        print()
        return ""


def save_overlay(image: Image.Image, visual: VisualTokens, path: Path) -> None:
    """Save `image` with the removed patches dimmed."""
    if visual.sources is not None:
        raise UserInputError("--save-overlay: this method merges tokens, it keeps none to show")
    overlay_tokens(image, visual).save(path)


if __name__ == "__main__":
    sys.exit(main())
