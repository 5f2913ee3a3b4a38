"""What llava-tiny is asked in training alone: lists of facts, and on which side a thing is.

The real LLaVA first learns from captions. Here a list names a thing and at once what is known of
it, so that looking a thing up is one step of attention; a question puts words in between. Every
pair is an ordinary turn of a conversation.
"""

from collections import Counter

import numpy as np

from llava.world import Scene
from llava.world.questions import FAMILIES, Families, existence, places, unique_items
from llava.world.shapes import PLURALS

_NUMBERS = ("zero", "one", "two", "three", "four")


def _existence(rng: np.random.RandomState, scene: Scene) -> list[str]:
    asked = dict(existence(rng, scene) for _ in range(5))
    return [f"{q.removeprefix('Is there a ').rstrip('?')} {a}" for q, a in asked.items()]


def _color(rng: np.random.RandomState, scene: Scene) -> list[str]:
    return [f"{item.shape} {item.color}" for item in unique_items(scene)]


def _relation(rng: np.random.RandomState, scene: Scene) -> list[str]:
    return [
        f"{item.partner_side} {item.shape} {scene.items[item.partner].shape}"
        for item in unique_items(scene)
        if item.partner is not None
    ]


def _text(rng: np.random.RandomState, scene: Scene) -> list[str]:
    return [f"{sign.color} {sign.text}" for sign in scene.signs]


def _count(rng: np.random.RandomState, scene: Scene) -> list[str]:
    counts = Counter(item.shape for item in scene.items)
    return [f"{PLURALS[s]} {_NUMBERS[n]}" for s, n in counts.items() if n < len(_NUMBERS)]


def _position(rng: np.random.RandomState, scene: Scene) -> list[str]:
    return [f"{item.shape} {place}" for item, place in places(scene)]


_LISTS = {
    "What is there?": _existence,
    "What color?": _color,
    "What is beside?": _relation,
    "What does it say?": _text,
    "How many?": _count,
    "Where?": _position,
}


def describe(rng: np.random.RandomState, scene: Scene) -> list[tuple[str, str]]:
    """One (question, list) pair for every family that the scene has facts for, in random order."""
    pairs = []
    for question, listed in _LISTS.items():
        facts = listed(rng, scene)
        if facts:
            order = rng.permutation(len(facts))[:5]
            pairs.append((question, ", ".join(facts[i] for i in order)))
    return [pairs[i] for i in rng.permutation(len(pairs))]


def side(rng: np.random.RandomState, scene: Scene) -> tuple[str, str] | None:
    """GQA position: the second word of a quadrant alone.

    Asked only for the quadrant, a run knew its first word early and had learnt nothing of the
    second after 3,375 steps.
    """
    found = places(scene)
    if not found:
        return None
    item, quadrant = found[rng.randint(len(found))]
    return f"Is the {item.shape} left or right?", quadrant.split()[1]


TRAINING_FAMILIES: Families = {**FAMILIES, "side": side}
