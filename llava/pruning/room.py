"""Prompts of limited length: their pruned images keep fewer tokens rather than lose any text."""

from __future__ import annotations

from llava.pruning.tokens import VisualTokens

# Images that a message lists one by one.
_LISTED = 3


def fit_prompts(
    visual: VisualTokens, asked: list[int | None]
) -> tuple[list[int | None], str | None]:
    """What every image keeps of the `asked` budgets, so that its prompt is not too long.

    The images of a prompt share its room equally, see `level`, and keep at least one token each.
    A prompt without any pruned image (None) is left alone: it is the unpruned model's.

    Returns the budgets, and in words what was lowered, or None if nothing was.
    """
    budgets, lowered = list(asked), []
    for prompt in visual.prompts:
        if all(asked[image] is None for image in prompt.images):
            continue
        most = [
            visual.sequence(image).total if budget is None else budget
            for image, budget in ((image, asked[image]) for image in prompt.images)
        ]
        shares = level(prompt.room, most)
        for image, share, wanted in zip(prompt.images, shares, most, strict=True):
            if share < wanted:
                budgets[image] = share
                lowered.append(
                    f"image {image} room for {share} of {wanted} tokens beside "
                    f"{prompt.text} of text"
                )
    if not lowered:
        return budgets, None
    if len(lowered) > _LISTED:
        lowered[_LISTED:] = [f"{len(lowered) - _LISTED} more images less than was asked"]
    limit = visual.prompts[0].limit
    return budgets, f"tokenizer_model_max_length is {limit} and leaves " + ", ".join(lowered)


def level(room: int, most: list[int]) -> list[int]:
    """What each of several may have of `room`: all it wants, or as much as any other that does not.

    The result sums to min(room, sum(most)); what does not divide evenly goes to the later ones of
    those that get least of what they want.
    """
    shares = list(most)
    for rank, index in enumerate(sorted(range(len(most)), key=most.__getitem__)):
        shares[index] = min(most[index], room // (len(most) - rank))
        room -= shares[index]
    return shares
