"""The procedural world of `llava-tiny`: scenes, questions and disjoint splits (numpy and PIL)."""

from llava.world.questions import FAMILIES, ask
from llava.world.scene import Scene, make_scene
from llava.world.splits import SPLITS, render, scene

__all__ = ["FAMILIES", "SPLITS", "Scene", "ask", "make_scene", "render", "scene"]
