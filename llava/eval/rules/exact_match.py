"""Exact match after a small normalisation, for short free-form answers."""


def normalise(text: str) -> str:
    """Lower-case `text` without surrounding white space and without one trailing period.

    Nothing else is forgiven: "a cat", "cat!" and "the answer is cat" all differ from "cat".
    """
    return text.strip().lower().removesuffix(".").rstrip()


def is_correct(generated: str, expected: str) -> bool:
    """Tell whether both texts are the same after `normalise`."""
    return normalise(generated) == normalise(expected)
