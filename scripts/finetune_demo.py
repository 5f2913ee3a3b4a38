"""What `--demo` of the training scripts came to: `python scripts/finetune_demo.py COMMAND`.

`score --after FOLDER` asks llava-tiny's benchmark before and after a training, `losses FOLDER` says
how far a run without a benchmark came, and `table --update docs/training.md` writes the tracked
result there.
"""

import argparse
import contextlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

from llava.command_line import OneLineParser, natural, one_line_errors
from llava.eval import __main__ as evaluation
from llava.eval.commands.compare import read_arm
from llava.eval.engine import provenance
from llava.eval.stats import paired_bootstrap, paired_difference
from llava.markdown import fill_sections
from llava.shipped import LLAVA_TINY
from llava.storage import dump_json, write_atomically
from llava.utils import UserInputError

ARMS = ("none", "zoo@64")
RESULT = Path("playground/results/finetune-demo.json")
SECTION = "finetune-demo"  # of docs/training.md


def ask(model: str, base: str | None, folder: Path, limit: int) -> None:
    """Answer the first questions of llava-tiny's benchmark, unpruned and pruned.

    Raises:
        UserInputError: the evaluation failed; it has said why.
    """
    words = ["run", "--model-path", model, "--task", LLAVA_TINY, "--limit", str(limit)]
    words += [word for arm in ARMS for word in ("--arm", arm)] + ["--output", str(folder)]
    words += ["--model-base", base] if base else []
    with contextlib.redirect_stdout(io.StringIO()):
        if evaluation.main(words):
            raise UserInputError(f"{model} could not be evaluated")


def score(
    before: str | None, after: str, base: str | None, folder: Path, limit: int
) -> dict[str, Any]:
    """Compare a model with what it was before its training, on the same questions.

    Args:
        before: checkpoint; None where there was none to ask.
        after: checkpoint.
        base: of a LoRA.
        folder: for the answers.
        limit: questions; 0 for all.

    Returns:
        For every arm accuracy before and after, in per cent, and the paired difference with its
        95 % interval (bootstrap over images).
    """
    ask(after, base, folder / "after", limit)
    if before is not None:
        ask(before, None, folder / "before", limit)
    arms = {}
    for arm in ARMS:
        new = read_arm(f"{folder / 'after'}:{arm}").records
        order = sorted(new)
        scores = [float(new[index]["score"] or 0) for index in order]
        arms[arm] = {"n": len(order), "after": 100 * math.fsum(scores) / len(order)}
        if before is None:
            continue
        old = read_arm(f"{folder / 'before'}:{arm}").records
        base_scores = [float(old[index]["score"] or 0) for index in order]
        images = [new[index]["images"][0] for index in order]
        low, high, _ = paired_bootstrap(scores, base_scores, images)
        arms[arm] |= {
            "before": 100 * math.fsum(base_scores) / len(order),
            "difference": 100 * paired_difference(scores, base_scores, images).value,
            "low": 100 * low,
            "high": 100 * high,
        }
    return arms


def losses(output: Path) -> tuple[list[float], dict[str, Any]]:
    """Read the logged losses of a run, and the state that the trainer saved.

    Raises:
        UserInputError: the run has not finished.
    """
    try:
        state = json.loads((output / "trainer_state.json").read_text())
    except OSError as error:
        raise UserInputError(f"{output} holds no finished run; run the script again") from error
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry], state


def table(result: dict[str, Any]) -> str:
    """Make the table of a result, one row an arm."""
    lines = [
        "| visual tokens | before | after | difference (95 % interval) | questions |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for arm, row in result["arms"].items():
        name = "all 576" if arm == "none" else f"64 (`{arm}`)"
        before, change = "-", "-"
        if "before" in row:
            before = f"{row['before']:.1f}"
            change = f"{row['difference']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})"
        lines.append(f"| {name} | {before} | {row['after']:.1f} | {change} | {row['n']} |")
    return "\n".join(lines)


def _score(args: argparse.Namespace) -> None:
    values, state = losses(args.after)
    seconds = sum(entry.get("train_runtime", 0) for entry in state["log_history"])
    result = {
        "command": args.run,
        "git": provenance.git_state(),
        "versions": provenance.package_versions(),
        "machine": provenance.machine("cpu"),
        "steps": state["global_step"],
        "training_seconds": round(seconds, 1),
        "losses": values,
        "arms": score(args.before, str(args.after), args.model_base, args.folder, args.limit),
    }
    write_atomically(args.folder / "demo.json", dump_json(result))
    print(table(result))
    print(f"written to {args.folder / 'demo.json'}")


def _losses(args: argparse.Namespace) -> None:
    values, state = losses(args.output)
    print(f"{state['global_step']} steps: loss {values[0]:.3f} at first, {values[-1]:.3f} at last")


def _document(args: argparse.Namespace) -> None:
    result = json.loads(args.result.read_text())
    args.update.write_text(fill_sections(args.update, {SECTION: table(result)}))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands of this script."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    scoring = commands.add_parser("score", help="compare a model before and after its training")
    scoring.add_argument("--before", help="checkpoint, where there was one")
    scoring.add_argument("--after", type=Path, required=True, help="output folder of the training")
    scoring.add_argument("--model-base", help="of a LoRA")
    scoring.add_argument("--folder", type=Path, required=True, help="for answers and demo.json")
    scoring.add_argument("--limit", type=natural, default=720, help="questions, 0 for all")
    scoring.add_argument("--run", default="", help="the command that trained it, for the record")
    scoring.set_defaults(work=_score)
    told = commands.add_parser("losses", help="say how the loss of a run moved")
    told.add_argument("output", type=Path)
    told.set_defaults(work=_losses)
    document = commands.add_parser("table", help="write the tracked result into a document")
    document.add_argument("--result", type=Path, default=RESULT)
    document.add_argument("--update", type=Path, required=True, metavar="FILE")
    document.set_defaults(work=_document)
    return parser


def main() -> None:
    """Run one command."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:])
    with one_line_errors(parser):
        args.work(args)


if __name__ == "__main__":
    main()
