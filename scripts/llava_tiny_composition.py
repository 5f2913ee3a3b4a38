"""What llava-tiny is left with at 64 tokens: `python scripts/llava_tiny_composition.py RUN`.

RUN is the output folder of `python -m llava.eval quickstart --limit 0`. Writes
playground/results/llava-tiny-composition.json: for every method the share of background, items and
signs among the kept tokens (first 100 test images), and the share of answers that are at least of
the kind that was asked for (families whose answers come from a closed list).
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from llava.command_line import OneLineParser
from llava.eval.engine import provenance
from llava.model.builder import load_pretrained_model
from llava.pruning import select
from llava.storage import dump_json, write_atomically
from llava.train.tiny.patch_labels import SIGN, patch_labels
from llava.world import render, scene
from llava.world.shapes import COLORS

MODEL = Path("playground/llava-tiny")
RESULT = Path("playground/results/llava-tiny-composition.json")
METHODS = ("random", "grid", "norm", "divprune", "zoo", "zoo-exact", "least-sensitive")
TOKENS, IMAGES = 64, 100
ANSWERS = {
    "existence": {"Yes", "No"},
    "color": set(COLORS),
    "count": {"one", "two", "three", "four"},
}


@torch.inference_mode()
def composition() -> dict[str, list[float]]:
    """Mean shares (background, items, signs) of what each method keeps, and of all tokens."""
    _, model, processor, _ = load_pretrained_model(str(MODEL), device="cpu")
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    shares = defaultdict(list)
    for index in range(IMAGES):
        name = f"test/{index:06d}"
        labels = torch.from_numpy(patch_labels(scene(name))["shape"]).flatten()
        parts = torch.stack([labels == 0, (labels > 0) & (labels < SIGN), labels == SIGN]).float()
        shares["none"].append(parts.mean(1))
        pixels = processor.preprocess(render(name), return_tensors="pt")["pixel_values"]
        features = tower(pixels)[0]
        projected = projector(features)
        for method in METHODS:
            kept = select(
                method,
                features=features,
                projected=projected,
                projector=projector,
                keep_tokens=TOKENS,
            )
            shares[method].append(parts[:, kept].mean(1))
    return {name: torch.stack(rows).mean(0).tolist() for name, rows in shares.items()}


def right_kind(run: Path) -> dict[str, float]:
    """Share of answers, per arm of the run, that belong to the list of their family."""
    fits = defaultdict(list)
    for line in (run / "answers.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["category"] in ANSWERS:
            fits[record["arm"]].append(record["answer"] in ANSWERS[record["category"]])
    return {arm: float(np.mean(values)) for arm, values in fits.items()}


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    kinds = right_kind(run)
    rows = [
        {
            "method": method,
            "tokens": 576 if method == "none" else TOKENS,
            **dict(zip(("background", "items", "signs"), shares, strict=True)),
            "right_kind": kinds.get("none" if method == "none" else f"{method}@{TOKENS}"),
        }
        for method, shares in composition().items()
    ]
    write_atomically(
        RESULT,
        dump_json(
            {
                "command": f"python {' '.join(sys.argv)}",
                "answers_of_run": json.loads((run / "run.json").read_text())["run_key"],
                "images": IMAGES,
                "checkpoint_sha256": provenance.hash_checkpoint(MODEL),
                "git": provenance.git_state(),
                "versions": provenance.package_versions(),
                "machine": provenance.machine("cpu"),
                "rows": rows,
            }
        ),
    )
    print(f"written: {RESULT}")


if __name__ == "__main__":
    main()
