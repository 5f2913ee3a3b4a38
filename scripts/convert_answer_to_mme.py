"""Turn MME answers into the text files that MME's calculation reads.

Reads DIR/answers/EXPERIMENT.jsonl and DIR/MME_Benchmark_release_version, writes
DIR/eval_tool/answers/EXPERIMENT/CATEGORY.txt; score them with `python -m llava.eval.eval_mme`.
"""

from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.submissions import mme_lines
from llava.eval.tasks.files import read_jsonl
from llava.eval.tasks.mme import read_truth, write_categories

if __name__ == "__main__":
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", required=True, help="name of the answer file")
    parser.add_argument("--dir", type=Path, default=Path(), help="folder of MME (default: this)")
    args = parser.parse_args()
    with one_line_errors(parser):
        source = args.dir / "answers" / f"{args.experiment}.jsonl"
        rows = read_jsonl(source, keys=("question_id", "prompt", "text"))
        lines = mme_lines(rows, read_truth(args.dir / "MME_Benchmark_release_version", "mme"))
        write_categories(args.dir / "eval_tool" / "answers" / args.experiment, lines)
