"""Turn VizWiz answers into what the server takes."""

from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.submissions import read_intact_results, vizwiz_submission, write_json
from llava.eval.tasks.files import read_jsonl

if __name__ == "__main__":
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--annotation-file", type=Path, required=True, help="llava_test.jsonl")
    parser.add_argument("--result-file", type=Path, required=True, help="answers, JSON lines")
    parser.add_argument("--result-upload-file", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    with one_line_errors(parser):
        results, damaged = read_intact_results(args.result_file)
        split = read_jsonl(args.annotation_file, keys=("question_id", "image"))
        print(f"total results: {len(results)}, total split: {len(split)}, error_line: {damaged}")
        write_json(args.result_upload_file, vizwiz_submission(split, results))
