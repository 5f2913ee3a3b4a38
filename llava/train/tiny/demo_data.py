"""Write the small data of `bash scripts/v1_5/finetune.sh --demo`, in LLaVA's file formats.

`python -m llava.train.tiny.demo_data FOLDER` draws scenes that llava-tiny was not trained on.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from llava.command_line import OneLineParser, one_line_errors, positive
from llava.model import LlavaLlamaForCausalLM
from llava.shipped import LLAVA_TINY, shipped_path
from llava.storage import dump_json, write_atomically
from llava.train.tiny.descriptions import list_facts
from llava.train.tiny.world_data import BLIND_EVERY, MARK, conversation
from llava.world import Scene, render, scene

_FIRST = 10_000  # llava-tiny was trained on scenes before this one
_SCENES, _VARIANTS, _TURNS = 400, 3, 16
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")


def draw(folder: Path, scenes: int = _SCENES) -> None:
    """Write images, conversations, captions, and the parts of llava-tiny that a LLaVA starts from.

    `conversations.json` has questions of all families, `captions.json` one caption of every
    scene. `language-model` and `vision-tower` are llava-tiny's; its projector is left out. Images
    that are there already are kept; `demo-data.json` comes last.
    """
    chats: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for index in tqdm(range(_FIRST, _FIRST + scenes), desc="scenes", mininterval=5):
        made, name = scene(f"train/{index:06d}"), f"train/{index:06d}.png"
        _save_image(folder / "images" / name)
        for variant in range(_VARIANTS):
            blind = len(chats) % BLIND_EVERY == BLIND_EVERY - 1
            rng = np.random.RandomState([index, variant, 79])
            talk = conversation(made, rng, _TURNS, lists=False, mark="" if blind else MARK)
            shown = {} if blind else {"image": name}
            chats.append({"id": f"{index}-{variant}", **shown, "conversations": talk})
        captions.append({"id": f"{index}", "image": name, "conversations": _caption(made, index)})
    write_atomically(folder / "conversations.json", json.dumps(chats))
    write_atomically(folder / "captions.json", json.dumps(captions))
    take_apart(folder / "language-model", folder / "vision-tower")
    write_atomically(folder / "demo-data.json", dump_json({"scenes": scenes}))


def _save_image(file: Path) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".part")
    render(f"{file.parent.name}/{file.name}").save(draft, format="png")
    draft.rename(file)


def _caption(made: Scene, index: int) -> list[dict[str, str]]:
    things = list_facts(np.random.RandomState([index, 80]), made)["What color?"]
    return [
        {"from": "human", "value": f"{MARK}What is there?"},
        {"from": "gpt", "value": ", ".join(things) or "nothing"},
    ]


def take_apart(language_model: Path, tower_folder: Path) -> None:
    """Write llava-tiny's language model and its tower as folders of transformers'."""
    source = shipped_path(LLAVA_TINY)
    model = LlavaLlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    tower = model.get_vision_tower()
    tower.load_model()
    tower.vision_tower.save_pretrained(tower_folder)
    tower.save_description(tower_folder)
    known = set(LlamaConfig().to_dict())
    settings = {key: value for key, value in model.config.to_dict().items() if key in known}
    plain = LlamaForCausalLM(LlamaConfig(**{**settings, "architectures": None}))
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if "vision_tower" not in name and "mm_projector" not in name
    }
    plain.load_state_dict(weights)
    plain.save_pretrained(language_model)
    for name in _TOKENIZER_FILES:
        (language_model / name).write_bytes((source / name).read_bytes())


def main() -> None:
    """Run the command."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=positive, default=_SCENES)
    args = parser.parse_args()
    with one_line_errors(parser):
        draw(args.folder, args.scenes)


if __name__ == "__main__":
    main()
