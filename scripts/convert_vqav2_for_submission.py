"""Turn VQAv2 answers into what the server takes.

Reads DIR/answers/SPLIT/CKPT/merge.jsonl, writes DIR/answers_upload/SPLIT/CKPT.json. Every question
of the whole test split is in it, with an empty answer where there is none.
"""

from pathlib import Path

from llava.command_line import OneLineParser, one_line_errors
from llava.eval.submissions import read_intact_results, vqav2_submission, write_json
from llava.eval.tasks.files import read_jsonl

if __name__ == "__main__":
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("playground/data/eval/vqav2"))
    parser.add_argument("--ckpt", required=True, help="name of the model's folder of answers")
    parser.add_argument("--split", required=True, help="such as llava_vqav2_mscoco_test-dev2015")
    args = parser.parse_args()
    with one_line_errors(parser):
        source = args.dir / "answers" / args.split / args.ckpt / "merge.jsonl"
        results, damaged = read_intact_results(source)
        split_file = args.dir / "llava_vqav2_mscoco_test2015.jsonl"
        split = read_jsonl(split_file, "vqav2", keys=("question_id",))
        print(
            f"total results: {len(results)}, total split: {len(split)}, error_line: {damaged}",
        )
        target = args.dir / "answers_upload" / args.split / f"{args.ckpt}.json"
        write_json(target, vqav2_submission(split, results))
