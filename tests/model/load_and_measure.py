"""Load a checkpoint in a fresh process and print what it took: run by test_loading_memory.py.

`python load_and_measure.py FOLDER [--base FOLDER] [--dtype NAME] [--twice]` prints one line of
JSON, sizes in MiB. Every page of the weights is read once after loading, so that weights which are
still only mapped from the file count. `--twice` loads the naive way, which holds two copies.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import name_in_memory

MIB = 2**20


def resident(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (highest so far) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def load_twice(folder: Path) -> LlavaLlamaForCausalLM:
    """All files into a dictionary of its own, copied into a model that was built before."""
    config = json.loads((folder / "config.json").read_text())
    model = LlavaLlamaForCausalLM(LlavaConfig.from_dict(config))
    state = {}
    for file in folder.glob("*.safetensors"):
        state.update({name_in_memory(k): v.clone() for k, v in load_file(file).items()})
    model.load_state_dict(state)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--twice", action="store_true")
    args = parser.parse_args()
    before = resident("VmRSS")
    if args.twice:
        model = load_twice(args.folder)
    else:
        dtype = getattr(torch, args.dtype)
        _, model, _, _ = load_pretrained_model(
            str(args.folder), args.base, device="cpu", dtype=dtype
        )
    # at least one number of every page of memory
    read = [parameter.detach().flatten()[::512].float().sum() for parameter in model.parameters()]
    assert torch.stack(read).isfinite().all()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = resident("VmHWM") - before
    print(json.dumps({"model": held / MIB, "peak": peak}))


if __name__ == "__main__":
    main()
