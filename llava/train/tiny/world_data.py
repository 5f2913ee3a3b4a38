"""Write training data of llava-tiny.

`python -m llava.train.tiny.world_data --tower T --output DIR` does it.

`pretrain.json` holds LLaVA conversations of 16 turns, lists and questions; `finetune.json`
holds conversations of questions alone. `features.npy` holds the frozen tower's features of every
image, which spares the trainer from running the tower each epoch. A killed run continues where its
features end.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava.command_line import OneLineParser, one_line_errors
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.train.tiny.descriptions import TRAINING_FAMILIES, describe
from llava.world import Scene, ask, render, scene

MARK = "<image>\n"
BLIND_EVERY = 25


def conversation(
    made: Scene, rng: np.random.RandomState, turns: int, lists: bool, mark: str
) -> list[dict[str, str]]:
    """Make `turns` turns about one scene: with `lists` one list of each kind, then questions.

    They are shuffled, and `mark` opens the first.

    No question is asked twice: a repeated one teaches to copy the answer, not to look.
    """
    pairs = dict(describe(rng, made)) if lists else {}
    families = list(TRAINING_FAMILIES)
    for attempt in range(4 * turns):
        if len(pairs) == turns:
            break
        question, answer = ask(rng, made, families[attempt % len(families)], TRAINING_FAMILIES)
        pairs.setdefault(question, answer)
    messages: list[dict[str, str]] = []
    for index in rng.permutation(len(pairs)):
        question, answer = list(pairs.items())[index]
        messages += [
            {"from": "human", "value": question if messages else mark + question},
            {"from": "gpt", "value": answer},
        ]
    return messages


def write_conversations(
    path: Path, split: str, scenes: int, variants: int, turns: int, lists: bool
) -> None:
    """Write `variants` conversations for each scene in LLaVA's sample format.

    Without `lists` one conversation in 25 shows no image. LLaVA learns from text alone too; here
    the model learns to guess blindly, which is the floor that pruning is held against.
    """
    samples: list[dict[str, Any]] = []
    for index in tqdm(range(scenes), desc="questions", mininterval=10):
        made = scene(f"{split}/{index:06d}")
        for variant in range(variants):
            rng = np.random.RandomState([index, variant, 77 if lists else 78])
            sample: dict[str, Any] = {"id": f"{split}-{index:06d}-{variant}"}
            blind = not lists and len(samples) % BLIND_EVERY == BLIND_EVERY - 1
            if not blind:
                sample["image"] = f"{split}/{index:06d}.png"
            mark = "" if blind else MARK
            sample["conversations"] = conversation(made, rng, turns, lists, mark)
            samples.append(sample)
    path.write_text(json.dumps(samples))


def draw_pixels(processor: Any, names: list[str]) -> torch.Tensor:
    """Draw scenes and return what the tower reads of them: float32 `[B, 3, H, W]`."""
    return processor.preprocess([render(name) for name in names], return_tensors="pt").pixel_values


@torch.no_grad()
def write_features(output: Path, tower_folder: Path, split: str, scenes: int, workers: int) -> None:
    """Write `features.npy`: float16 `[scenes, N, Dv]`, row i for scene i."""
    settings = argparse.Namespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    tower = CLIPVisionTower(str(tower_folder), settings)
    done_file, path = output / "features.done", output / "features.npy"
    done = int(done_file.read_text()) if done_file.exists() and path.exists() else 0
    shape = (scenes, tower.num_patches, tower.hidden_size)
    store = np.lib.format.open_memmap(
        path, mode="r+" if done else "w+", dtype=np.float16, shape=None if done else shape
    )
    names: Any = [f"{split}/{index:06d}" for index in range(done, scenes)]
    loader: DataLoader[torch.Tensor] = DataLoader(
        names,
        batch_size=16,
        num_workers=workers,
        collate_fn=partial(draw_pixels, tower.image_processor),
    )
    for pixels in tqdm(loader, desc="features", mininterval=10):
        store[done : done + len(pixels)] = tower(pixels).half().numpy()
        done += len(pixels)
        if done % 512 == 0 or done == scenes:
            store.flush()
            done_file.write_text(str(done))


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--tower", type=Path, required=True, help="folder written by llava.train.tiny.tower"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split", choices=["train", "val"], default="train")
    parser.add_argument("--scenes", type=int, default=10_000)
    parser.add_argument("--variants", type=int, default=4, help="conversations a scene")
    parser.add_argument("--turns", type=int, default=16, help="lists and questions a conversation")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    with one_line_errors(parser):
        args.output.mkdir(parents=True, exist_ok=True)
        for name, lists in (("pretrain.json", True), ("finetune.json", False)):
            path = args.output / name
            if not path.exists():
                write_conversations(path, args.split, args.scenes, args.variants, args.turns, lists)
        write_features(args.output, args.tower, args.split, args.scenes, args.workers)


if __name__ == "__main__":
    main()
