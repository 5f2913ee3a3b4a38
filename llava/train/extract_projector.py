"""`llava extract-projector`: the projector of a LLaVA alone, for `--pretrain_mm_mlp_adapter`.

llava extract-projector --model-path liuhaotian/llava-v1.5-7b --output mm_projector.bin
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llava.command_line import OneLineParser, one_line_errors
from llava.model.adapters import CONFIG_FILE, read_rest
from llava.model.checkpoint import (
    local_checkpoint,
    name_in_memory,
    opened_weights,
    read_weights,
    weight_file,
    weights_by_file,
)
from llava.train.saving import is_projector
from llava.utils import UserInputError, user_path
from llava.value_rules import one_line

_SUFFIXES = (".bin", ".safetensors")


def extract_projector(model: str | Path, output: str | Path) -> Path:
    """Write the projector of a checkpoint, and LLaVA-1.6's newline, under LLaVA's names.

    Only the files that hold it are opened, and only its weights are read.

    Args:
        model: folder or hub name of a LLaVA in LLaVA's own form or Hugging Face's, of a LoRA, or of
            a projector alone.
        output: the file to write: `.bin` as LLaVA has it, or `.safetensors`.

    Returns:
        The file.

    Raises:
        UserInputError: no projector there, another kind of file, no room.
    """
    file = user_path(output)
    if file.suffix not in _SUFFIXES:
        raise UserInputError(
            f"--output {output} must end in {' or '.join(_SUFFIXES)}, such as mm_projector.bin"
        )
    folder = local_checkpoint(model)
    weights = _read(folder)
    if not any("mm_projector." in name for name in weights):
        raise UserInputError(f"{str(folder)!r} holds no projector; give the folder of a LLaVA")
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".bin":
            torch.save(weights, partial)
        else:
            save_file(weights, partial, metadata={"format": "pt"})
        partial.replace(file)
    except (OSError, SafetensorError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise UserInputError(f"cannot write {file}: {one_line(error)}") from error
    return file


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Read the projector's weights by their names in memory, which are LLaVA's own."""
    if weight_file(folder) is None:
        found = (
            read_rest(folder)
            if (folder / CONFIG_FILE).is_file()
            else read_weights(folder, "mm_projector") or {}
        )
        return {name: value for name, value in found.items() if is_projector(name)}
    weights: dict[str, torch.Tensor] = {}
    for file, held in weights_by_file(folder).items():
        keys = [key for key in held if is_projector(name_in_memory(key))]
        if keys:
            with opened_weights(file) as read:
                weights |= {name_in_memory(key): read(key) for key in keys}
    return weights


def main(argv: Sequence[str] | None = None, prog: str = "llava extract-projector") -> int:
    """Run the command; 0 if it did its work, 2 with one line on stderr for unusable input."""
    parser = build_parser(prog)
    args = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    with one_line_errors(parser):
        print(extract_projector(args.model_path, args.output))
    return 0


def build_parser(prog: str = "llava extract-projector") -> OneLineParser:
    """Make the parser, with the names of LLaVA's script."""
    parser = OneLineParser(
        prog=prog,
        description="Write the projector of a LLaVA checkpoint, in either form, to a file of its "
        "own, which --pretrain_mm_mlp_adapter reads.",
    )
    parser.add_argument(
        "--model-path",
        "--model_name_or_path",
        dest="model_path",
        required=True,
        help="checkpoint folder or hub name",
    )
    parser.add_argument("--output", type=Path, required=True, help="file: .bin or .safetensors")
    return parser


if __name__ == "__main__":
    sys.exit(main())
