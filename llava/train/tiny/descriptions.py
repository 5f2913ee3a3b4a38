"""Ask what llava-tiny is asked in training alone: lists of facts, and the side of a thing.

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


def list_facts(rng: np.random.RandomState, scene: Scene) -> dict[str, list[str]]:
    """Return what is known of a scene, by the question that asks for it."""
    asked = dict(existence(rng, scene) for _ in range(5))
    counts = Counter(item.shape for item in scene.items)
    items = unique_items(scene)
    return {
        "What is there?": [
            f"{question.removeprefix('Is there a ').rstrip('?')} {answer}"
            for question, answer in asked.items()
        ],
        "What color?": [f"{item.shape} {item.color}" for item in items],
        "What is beside?": [
            f"{item.partner_side} {item.shape} {scene.items[item.partner].shape}"
            for item in items
            if item.partner is not None
        ],
        "What does it say?": [f"{sign.color} {sign.text}" for sign in scene.signs],
        "How many?": [
            f"{PLURALS[shape]} {_NUMBERS[count]}"
            for shape, count in counts.items()
            if count < len(_NUMBERS)
        ],
        "Where?": [f"{item.shape} {place}" for item, place in places(scene)],
    }


def describe(rng: np.random.RandomState, scene: Scene) -> list[tuple[str, str]]:
    """Return a (question, list) pair for every question that a scene has facts for, shuffled."""
    pairs = []
    for question, facts in list_facts(rng, scene).items():
        if facts:
            order = rng.permutation(len(facts))[:5]
            pairs.append((question, ", ".join(facts[i] for i in order)))
    return [pairs[i] for i in rng.permutation(len(pairs))]


def side(rng: np.random.RandomState, scene: Scene) -> tuple[str, str] | None:
    """Ask on which side a thing is: the second word of its quadrant alone.

    Asked only for the quadrant, a run knew its first word early and had learnt nothing of the
    second after 3,375 steps.
    """
    found = places(scene)
    if not found:
        return None
    item, quadrant = found[rng.randint(len(found))]
    return f"Is the {item.shape} left or right?", quadrant.split()[1]


TRAINING_FAMILIES: Families = {**FAMILIES, "side": side}
