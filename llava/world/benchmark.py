"""Write or check the benchmark of llava-tiny: `python -m llava.world.benchmark [--check] DIR`.

`questions.jsonl` is a LLaVA question file, `answers.jsonl` its key, `manifest.json` the
SHA-256 of every image's raw RGB bytes. Families take turns, so any first part is a fair sample.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llava.world.questions import FAMILIES
from llava.world.splits import scene

QUESTIONS_PER_IMAGE = 3


def build(images: int) -> dict[str, str]:
    """Make the benchmark over `images` test scenes: {file name: content}."""
    families = list(FAMILIES)
    questions: list[dict] = []
    answers: list[dict] = []
    hashes: dict[str, str] = {}
    for index in tqdm(range(images), desc="scenes", mininterval=5):
        name = f"test/{index:06d}"
        made = scene(name)
        rng = np.random.RandomState([index, 2025])
        for turn in range(QUESTIONS_PER_IMAGE):
            family = families[(index * QUESTIONS_PER_IMAGE + turn) % len(families)]
            pair = FAMILIES[family](rng, made)
            if pair is None:  # the scene has no question of this family
                continue
            identity = len(questions)
            line = {"question_id": identity, "image": f"{name}.png", "text": pair[0]}
            questions.append(line | {"category": family})
            answers.append({"question_id": identity, "answer": pair[1]})
        hashes[f"{name}.png"] = hashlib.sha256(made.pixels.tobytes()).hexdigest()
    return {
        "questions.jsonl": "".join(json.dumps(line) + "\n" for line in questions),
        "answers.jsonl": "".join(json.dumps(line) + "\n" for line in answers),
        "manifest.json": json.dumps(hashes, indent=0) + "\n",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=lambda text: Path(text).expanduser())
    parser.add_argument("--images", type=int, default=720)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, content in build(args.images).items():
        path = args.folder / name
        if not args.check:
            path.write_text(content)
        elif not path.exists() or path.read_text() != content:
            print(f"error: {path} is not what this machine makes", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
