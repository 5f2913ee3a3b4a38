"""Turn answers into GQA's predictions: `python scripts/convert_gqa_for_eval.py --src --dst`."""

from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.submissions import gqa_predictions, read_results, write_json

if __name__ == "__main__":
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--src", type=Path, required=True, help="answers, JSON lines")
    parser.add_argument("--dst", type=Path, required=True, help="predictions to write")
    args = parser.parse_args()
    with one_line_errors(parser):
        write_json(args.dst, gqa_predictions(read_results(args.src)))
