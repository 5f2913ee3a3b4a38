"""Ask one question about one or more images: `python -m llava.eval.run_llava --query ...`.

LLaVA's flags and its `eval_model(args)`, plus visual token pruning. Several files are one
argument, separated by `--sep`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.command_line import OneLineParser, add_model_flags, one_line_errors
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.families.contract import Picture, VisionLanguageModel
from llava.families.dialogue import IMAGE, Dialogue, turn_of
from llava.families.lengths import describe_overflow, exceeded_limits
from llava.families.spec import load_from_flags
from llava.images import load_image
from llava.pixels import VIEWER
from llava.sampling import Sampling
from llava.utils import UserInputError

__all__ = ["eval_model", "image_parser", "load_image", "load_images"]


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; 0 when it is printed, 2 with one line on stderr for unusable input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        eval_model(args)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Define LLaVA's flags (some with underscores, as there) and the pruning flags."""
    parser = OneLineParser(prog="llava.eval.run_llava", description=__doc__.splitlines()[0])
    add_model_flags(parser, pixels=VIEWER)
    add = parser.add_argument
    add("--image-file", required=True, help="paths or http(s) URLs, separated by --sep")
    add("--query", required=True, help=f"the question; {IMAGE_PLACEHOLDER} marks an image in it")
    add("--sep", default=",", help="what separates several image files")
    add("--temperature", type=float, default=0.2, help="0 is greedy")
    add("--top_p", type=float, help="sample from the likeliest tokens of this total probability")
    add("--num_beams", type=int, default=1)
    add("--max_new_tokens", type=int, default=512)
    return parser


def eval_model(args: Any) -> str:
    """Load a model, ask it one question, print its answer and return it.

    Args:
        args: any object with LLaVA's attributes `model_path`, `query` and `image_file`, and
            perhaps `model_base`, `model_name`, `conv_mode`, `sep`, `temperature`, `top_p`,
            `num_beams`, `max_new_tokens` or another flag of this command; what is missing has
            the flag's default. The model is loaded at every call.

    Raises:
        UserInputError: names what cannot be used and what to do; also a query that is too long for
            the model.
    """
    args = _complete(args)
    sampling = Sampling(args.temperature, args.top_p, args.num_beams, args.max_new_tokens)
    images = load_images(image_parser(args), args.pixels)
    count_marks(args.query, len(images))
    words = _words(args.query)
    if not words:
        raise UserInputError(
            f"the query {args.query!r} asks nothing; write the question, such as 'What is this?'"
        )
    loaded = load_from_flags(args, args.model_name)
    row = loaded.row(ask(args.query, len(images)))
    pictures = [loaded.prepare(image) for image in images]
    check_length(loaded, row, pictures)
    settings = sampling.arguments_for(loaded.model, loaded.tokenizer)
    with torch.inference_mode():
        output = loaded.answer([row], pictures, [words], **settings)
    answer = loaded.tokenizer.decode(output[0], skip_special_tokens=True).strip()
    print(answer)
    return answer


def check_length(
    loaded: VisionLanguageModel, row: torch.Tensor, pictures: Sequence[Picture]
) -> None:
    """Refuse a prompt whose end, where the question stands, would be cut off.

    Pruned images may still give way to the text, as in `generate`.

    Args:
        loaded: the model that is asked.
        row: int64 [L], the prompt.
        pictures: its images.

    Raises:
        UserInputError: the prompt is longer than `tokenizer_model_max_length`.
    """
    length = loaded.measure(row, pictures, give_way=True)
    for limit in exceeded_limits(loaded.limits, length):
        if not limit.answer:  # otherwise the model goes on beyond its positions, as LLaVA does
            raise UserInputError(
                f"the query does not fit: {describe_overflow(length, limit)}; shorten it, show "
                "fewer images, or keep fewer visual tokens (--pruner, --keep-tokens)"
            )


def image_parser(args: Any) -> list[str]:
    """Return the single locations in `args.image_file`, split at `args.sep`."""
    if not args.sep:
        raise UserInputError("--sep is empty; give the text that separates image files, such as ,")
    return args.image_file.split(args.sep)


def load_images(image_files: Sequence[str], pixels: str = VIEWER) -> list[Image.Image]:
    """Open all pictures, see `llava.images.open_image`."""
    return [load_image(file, pixels) for file in image_files]


def ask(query: str, images: int) -> Dialogue:
    """Make one user turn of a query.

    Placeholders become image marks where they stand. A query without any gets one mark and a
    newline for each image in front.

    Args:
        query: the question; `<image-placeholder>` or `<image>` marks an image in it.
        images: how many images are shown.

    Raises:
        UserInputError: the query marks another number of images.
    """
    if count_marks(query, images):
        return Dialogue((turn_of(query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)),))
    return Dialogue(((IMAGE, "\n") * images + (query,),))


def count_marks(query: str, images: int) -> int:
    """Count the images that a query marks: all of them or none.

    Raises:
        UserInputError: it marks another number.
    """
    marked = query.count(IMAGE_PLACEHOLDER) + query.count(DEFAULT_IMAGE_TOKEN)
    if marked not in (0, images):
        raise UserInputError(
            f"the query marks {marked} images but the number of images is {images}; mark each "
            f"image once with {IMAGE_PLACEHOLDER}, or none at all"
        )
    return marked


def _words(query: str) -> str:
    """Return the query without marks of images."""
    for mark in (DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER):
        query = query.replace(mark, " ")
    return query.strip()


def _complete(args: Any) -> argparse.Namespace:
    """Fill in a flag's default for every attribute that is missing."""
    required = []
    for name in ("model_path", "image_file", "query"):
        value = getattr(args, name, None)
        if not isinstance(value, str | Path):
            raise UserInputError(f"eval_model needs args.{name}, a text; got {value!r}")
        required.append(f"--{name.replace('_', '-')}={value}")
    defaults = vars(build_parser().parse_args(required))
    own = {name: getattr(args, name, default) for name, default in defaults.items()}
    texts = {name: defaults[name] for name in ("model_path", "image_file", "query")}
    return argparse.Namespace(model_name=getattr(args, "model_name", None), **{**own, **texts})


if __name__ == "__main__":
    sys.exit(main())
