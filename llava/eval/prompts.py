"""What a benchmark's items ask, as turns of a dialogue, and how prompts are counted."""

from collections.abc import Sequence

from torch import Tensor

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.families.dialogue import IMAGE, Dialogue, turn_of


def bare_question(text: str) -> str:
    """Remove the image marks that some question files carry; other text stays as it is."""
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


def has_inner_marks(text: str, images: int) -> bool:
    """Return whether the text marks all of its images, and not only at its start."""
    rest = text
    while rest.lstrip().startswith(DEFAULT_IMAGE_TOKEN):
        rest = rest.lstrip().removeprefix(DEFAULT_IMAGE_TOKEN)
    return DEFAULT_IMAGE_TOKEN in rest and text.count(DEFAULT_IMAGE_TOKEN) == images


def question(text: str, images: int = 1) -> Dialogue:
    """Ask `text` about `images` images.

    The marks of the images come first, each on a line; a mark that the text begins with is not
    doubled. Where the text marks all images and not only at its start, they stay where they are.
    """
    if has_inner_marks(text, images):
        return Dialogue((turn_of(text),))
    return Dialogue(((IMAGE, "\n") * images + (bare_question(text),),))


def image_ranges(counts: Sequence[int]) -> list[range]:
    """Number the images of prompts through the whole batch, from how many each prompt has."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def count_visual_tokens(ids: Tensor, images: Sequence[int], length: int) -> int:
    """Count the tokens of a merged row of `length` that are not text.

    The prompt is `ids` [L], its images have so many tokens each. Only where the row was cut to
    the model's limit do they matter: some of what was cut may have been text.
    """
    text = int((ids != IMAGE_TOKEN_INDEX).sum())
    if not images or length == text + sum(images):
        return length - text if images else 0
    left, place, visual = list(images), 0, 0
    for token in ids.tolist():
        size = left.pop(0) if token == IMAGE_TOKEN_INDEX else 1
        if token == IMAGE_TOKEN_INDEX:
            visual += max(0, min(size, length - place))
        place += size
    return visual
