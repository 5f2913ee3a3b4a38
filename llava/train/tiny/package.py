"""Pack a trained llava-tiny as a native LLaVA checkpoint that carries its own vision tower.

`python -m llava.train.tiny.package --checkpoint DIR --output playground/llava-tiny`: float16
weights, the SentencePiece tokenizer, and `vision_tower/` with the description of the tower.
"""

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig

from llava.command_line import OneLineParser, one_line_errors
from llava.model import LlavaLlamaForCausalLM

TOWER_NAME = "vision_tower"
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")


def package(checkpoint: Path, tokenizer: Path, output: Path) -> None:
    """Write the folder that `load_pretrained_model(output)` reads without any network."""
    model = LlavaLlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tower = model.get_vision_tower()
    tower.load_model()
    # the tower travels inside the checkpoint, so its name is a folder next to the weights
    tower.vision_tower_name = model.config.mm_vision_tower = TOWER_NAME
    model.config.unfreeze_mm_vision_tower = True
    model.config.mm_conv_mode = "vicuna_v1"
    # the vocabulary is complete: LLaVA adds a token of its own where the config is silent
    model.config.mm_use_im_patch_token = model.config.mm_use_im_start_end = False
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    output.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(output)
    tower.save_description(output / TOWER_NAME)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, output / name)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with its two files")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with one_line_errors(parser):
        package(args.checkpoint, args.tokenizer, args.output)


if __name__ == "__main__":
    main()
