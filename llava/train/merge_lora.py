"""`llava merge-lora`: a LoRA or projector-only folder and its base as one LLaVA checkpoint.

llava merge-lora --model-path llava-lora --model-base lmsys/vicuna-7b-v1.5 --save-model-path llava
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llava.command_line import OneLineParser, one_line_errors
from llava.model.adapters import CONFIG_FILE, read_adapter_config
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import local_checkpoint, weight_file
from llava.model.convert.output import check_output, new_folder
from llava.train.saving import copy_tokenizer
from llava.utils import UserInputError
from llava.value_rules import one_line


def merge_lora(adapter: str | Path, base: str | Path, output: str | Path) -> Path:
    """Write a whole checkpoint in LLaVA's own form: what a folder adds, brought into its base.

    The weights get the type that those of the base have; a base that a QLoRA run had packed is read
    unpacked. The new folder appears when it is complete.

    Args:
        adapter: LoRA or projector-only folder, or hub name.
        base: the model it was trained on.
        output: folder to make.

    Returns:
        The new folder, absolute.

    Raises:
        UserInputError: no adapter, another base, an output that exists, no room.
    """
    target = check_output(output)
    folder = local_checkpoint(adapter)
    if not (folder / CONFIG_FILE).is_file() and weight_file(folder) is not None:
        raise UserInputError(
            f"{str(folder)!r} is a whole checkpoint, so there is nothing to merge; give the folder "
            f"of a LoRA (with {CONFIG_FILE}), or of a projector alone"
        )
    try:
        _, model, _, _ = load_pretrained_model(str(folder), str(base), device="cpu", dtype="auto")
    except UserInputError as error:
        if not (folder / CONFIG_FILE).is_file():
            raise
        own = read_adapter_config(folder).get("base_model_name_or_path")
        raise UserInputError(
            f"{error}; the LoRA says that it was trained on {str(own)!r}: give that as --model-base"
        ) from error
    with new_folder(target, {"adapter": str(folder), "base": str(base)}) as partial:
        try:
            model.save_pretrained(partial)
        except (OSError, SafetensorError) as error:
            raise UserInputError(
                f"cannot write {target}: {one_line(error)}; make room and run the same command "
                "again"
            ) from error
        if not copy_tokenizer(local_checkpoint(base), partial):
            copy_tokenizer(folder, partial)
    return target


def main(argv: Sequence[str] | None = None, prog: str = "llava merge-lora") -> int:
    """Run the command; 0 if it did its work, 2 with one line on stderr for unusable input."""
    parser = build_parser(prog)
    args = parser.parse_args(sys.argv[1:] if argv is None else list(argv))
    with one_line_errors(parser):
        print(merge_lora(args.model_path, args.model_base, args.save_model_path))
    return 0


def build_parser(prog: str = "llava merge-lora") -> OneLineParser:
    """Make the parser, with the names of LLaVA's script."""
    parser = OneLineParser(
        prog=prog,
        description="Merge a LoRA folder into the model it was trained on, and write a whole "
        "checkpoint in LLaVA's own form. A folder with a projector alone works too.",
    )
    add: Any = parser.add_argument
    add("--model-path", required=True, help="LoRA or projector-only folder, or hub name")
    add("--model-base", required=True, help="folder or hub name of the model it was trained on")
    add("--save-model-path", type=Path, required=True, help="folder to make")
    return parser


if __name__ == "__main__":
    sys.exit(main())
