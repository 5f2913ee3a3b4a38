"""One process of several: make the runs of a file one after the other, and report on each.

    torchrun --standalone --nproc_per_node 2 run_together.py RUNS.json FOLDER

RUNS.json holds the trainer's words by the name of the run. Of each run, FOLDER gets NAME.RANK.json:
digests of all weights as this process has them, whether each of its batches had images, which
files it wrote, and the names of the samples of its batches.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from llava.train import train
from llava.train.trainer import LlavaTrainer
from llava.train.zero import gathered

_WRITES = os.O_WRONLY | os.O_RDWR
written: list[str] = []


def note_writes(event: str, arguments: tuple[Any, ...]) -> None:
    """Note files that are opened to be written; an audit hook."""
    if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & _WRITES:
        written.append(arguments[0])


def note_tensors(write: Any) -> Any:
    """Note files that safetensors writes, which Python does not see."""

    def save_file(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
        written.append(str(filename))
        write(tensors, filename, *args, **kwargs)

    return save_file


class Watched(LlavaTrainer):
    """The trainer, which reports on itself."""

    last: "Watched"

    def __init__(self, **kwargs: Any) -> None:
        Watched.last, self.batches = self, []
        super().__init__(**kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.batches.append((inputs.get("images") is not None, inputs.get("names")))
        return super().training_step(model, inputs, *args, **kwargs)


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Return a digest of every weight, whole."""
    found = {}
    for name, weight in model.named_parameters():
        with gathered([weight]):
            values = weight.detach().float().contiguous().view(torch.uint8).numpy()
            found[name] = hashlib.sha256(values.tobytes()).hexdigest()
    return found


def main() -> None:
    # DeepSpeed's launcher puts this first; the trainer gets it as it would from a script.
    ranks = [word for word in sys.argv[1:] if word.startswith("--local_rank")]
    file, folder = (Path(word) for word in sys.argv[1:] if word not in ranks)
    runs = json.loads(file.read_text())
    sys.addaudithook(note_writes)
    safetensors.torch.save_file = note_tensors(safetensors.torch.save_file)
    train.LlavaTrainer = Watched  # type: ignore[misc]
    for name, words in runs.items():
        written.clear()
        sys.argv = ["train", *ranks, *words]
        train.main()
        trainer = Watched.last
        report = {
            "digests": digests(trainer.model),
            "images": [images for images, _ in trainer.batches],
            "names": [names for _, names in trainer.batches],
            "written": [file for file in written if file.startswith(f"{trainer.args.output_dir}/")],
            "processes": trainer.args.world_size,
            "engine": type(trainer.model_wrapped).__name__,
        }
        (folder / f"{name}.{trainer.args.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
