"""Run everything that needs a GPU in one go: `bash scripts/gpu.sh`.

Every part runs in a process of its own and has a limit, so one that fails or hangs stops no other.
OUT/gpu.json holds all that was found and is written after every part. `--device cpu` runs every
line small, as a check before a GPU is there.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from llava.bench.command import describe_run
from llava.bench.gpu_report import STAGE, render_gpu
from llava.bench.scaling import exponents
from llava.bench.schema import read_bench
from llava.bench.stage import CAPTURED, stage_calls, time_call, time_graph
from llava.bench.summary import figures_of
from llava.command_line import OneLineParser, device_name, one_line_errors
from llava.shipped import LLAVA_TINY
from llava.storage import dump_json, read_json, read_jsonl, write_atomically
from llava.utils import UserInputError

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("none", "divprune@64", "zoo-exact@64", "zoo@64")
# Characters of a part's output that are kept, and of one that failed.
TAIL, FAILED_TAIL = 2000, 30_000
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
# Equal answers of an arm below which bfloat16 counts as broken, as in tests/gpu.
LEAST_EQUAL = 0.8


class Found(NamedTuple):
    """What a part found, a line about it, and whether it is as it should be."""

    result: Any
    line: str
    good: bool = True


@dataclass(frozen=True)
class Part:
    """One step of the run.

    Attributes:
        name: in the file and the table.
        commands: arguments of the interpreter, run one after another.
        read: returns what the part found, from its files and its output.
        limit: seconds after which it is stopped.
        missing: why it cannot run; None if it can.
        folder: where its commands run, so that files of results name no folder of this machine.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    read: Callable[[str], Found]
    limit: float
    missing: str | None = None
    folder: Path = ROOT


def parts(out: Path, small: bool, commit: str | None) -> Iterator[Part]:
    """Yield all parts, what matters most first.

    Limits are a fifth above what a part took on an H200 or more, where six of them took 351 s;
    those of the benches between layers and of the sizes, which had no time there, are estimates.

    Args:
        out: folder for their files.
        small: run every line at a small size on the CPU, and only collect the tests.
        commit: of the source, where git cannot tell.
    """
    source = ("--commit", commit) if commit else ()
    device = "cpu" if small else "cuda"
    tests = (*PYTEST, "--gpu", *_count("gpu", small), "tests/gpu")
    yield Part("tests on CUDA", (tests,), _last_line, 85)
    stage = ("-m", "llava.bench.gpu", "--stage", device, "stage.json")
    yield Part(STAGE, (stage,), lambda _: _read_stage(out / "stage.json"), 60, folder=out)
    yield _bench(out, "llava-1.5-7b", ("--batch", "1,8"), 120, small, source)
    yield _between_layers(out, small, source)
    few = ("--pruner", "divprune", "--seconds", "0.001") if small else ("--seconds", "0.2")
    scaling = ("-m", "llava.bench", "--scaling", "--device", device, *few, *source)
    scaling += ("--output", "scaling.json")
    yield Part("scaling", (scaling,), lambda _: _read_scaling(out / "scaling.json"), 60, folder=out)
    yield _bench(out, "llava-next-7b", (), 80, small, source)
    # Compilation is tested with a triton of its own, without a GPU.
    tests = (*PYTEST, "--triton", *_count("kernels", small), "tests/kernel_parity")
    yield Part(
        "kernels equal their references",
        ((*tests, "--ignore", "tests/kernel_parity/test_compile.py"),),
        _last_line,
        50,
        None if find_spec("triton") else "triton is not installed",
    )
    asked: tuple[str, ...] = ("--limit", "240", "--batch-size", "16")
    asked = ("--limit", "2") if small else asked
    runs = (("cpu", "float32"), (device, "bfloat16"))
    names = [f"tiny-{kind}-{dtype}" for kind, dtype in runs]
    asked = ("--model-path", LLAVA_TINY, "--task", LLAVA_TINY, *asked)
    asked += tuple(word for arm in ARMS for word in ("--arm", arm))
    commands = tuple(
        ("-m", "llava.eval", "run", *asked, "--device", kind, "--dtype", dtype, "--output", name)
        for (kind, dtype), name in zip(runs, names, strict=True)
    )
    answers = [out / name for name in names]
    yield Part("llava-tiny in bfloat16", commands, lambda _: _read_answers(answers), 65, folder=out)


def _bench(
    out: Path,
    config: str,
    more: Sequence[str],
    limit: float,
    small: bool,
    source: Sequence[str],
) -> Part:
    file = f"bench-{config}.json"
    sized = ("--config", config, "--repeats", "3", "--device", "cuda", *more)
    if small:
        sized = ("--config", LLAVA_TINY, "--layers", "1", "--repeats", "1", "--device", "cpu")
    command = ("-m", "llava.bench", *sized, *source, "--output", file)
    return Part(f"bench {config}", (command,), lambda _: _read_bench(out / file), limit, folder=out)


def _between_layers(out: Path, small: bool, source: Sequence[str]) -> Part:
    """Return the part that times arms between layers, with all the layers of a 7B."""
    file = "bench-between.json"
    sized: tuple[str, ...] = ("--config", "llava-1.5-7b", "--pruner")
    sized += ("zoo,fastv,pyramiddrop:recipe=early",)
    sized += ("--keep-tokens", "64,192", "--repeats", "3", "--device", "cuda")
    sized += ("--decoder-pruner", "fastv", "--decoder-keep-tokens", "64")
    if small:
        sized = ("--config", LLAVA_TINY, "--pruner", "fastv,norm", "--keep-tokens", "288")
        sized += ("--decoder-pruner", "fastv", "--decoder-keep-tokens", "160")
        sized += ("--repeats", "1", "--device", "cpu")
    command = ("-m", "llava.bench", *sized, *source, "--output", file)
    return Part(
        "bench between layers", (command,), lambda _: _read_between(out / file), 90, folder=out
    )


def _count(group: str, small: bool) -> tuple[str, ...]:
    """Return the flag that fails a group of which fewer tests pass than on a GPU should."""
    if small:
        return ("--collect-only",)
    lines = (ROOT / "tests" / "recorded_counts").read_text(encoding="utf-8").splitlines()
    counts = dict(line.split() for line in lines)
    return ("--at-least", counts[group])


def _last_line(output: str) -> Found:
    lines = [line.strip("= ") for line in output.splitlines() if line.strip()]
    return Found(None, lines[-1] if lines else "no output")


def _read_stage(file: Path) -> Found:
    rows = read_json(file)["rows"]
    said = [
        f"{row['method']} {row['tokens']} -> {row['keep']}: {row['median_ms']} ms, "
        f"{row['waits']} waits"
        for row in rows
        if row["method"] == "zoo-exact"
    ]
    return Found(rows, "; ".join(said))


def _read_bench(file: Path) -> Found:
    result = read_bench(file)
    answer = min(result["conditions"]["answers"])
    said = [
        f"{f.arm['arm']} {f.prefill_speed_up.median:.2f} x prefill, "
        f"{f.speed_up[answer].median:.2f} x total, "
        f"{100 * f.of_free_prefill.median:.1f} % of free"
        for f in figures_of(result)
        if f.arm["method"] == "zoo-exact" and f.arm["batch"] == 1 and f.of_free_prefill
    ]
    return Found(result, "; ".join(said))


def _read_between(file: Path) -> Found:
    result = read_bench(file)
    said = [
        f"{f.arm['arm']} {f.prefill_speed_up.median:.2f} x prefill, "
        f"{f.rows['between'].median:.2f} ms between layers"
        for f in figures_of(result)
        if "between" in f.rows
    ]
    return Found(result, "; ".join(said), good=bool(said))


def _read_answers(folders: Sequence[Path]) -> Found:
    """Count the answers of the second run that are those of the first, by arm."""
    runs = []
    for folder in folders:
        records = [record for _, record in read_jsonl(folder / "answers.jsonl")]
        runs.append({(r["arm"], r["question_id"]): r["answer"] for r in records})
    equal = {
        arm: [runs[1].get(key) == answer for key, answer in runs[0].items() if key[0] == arm]
        for arm in ARMS
    }
    counts = {arm: {"equal": sum(own), "of": len(own)} for arm, own in equal.items()}
    line = "; ".join(f"{arm} {c['equal']} of {c['of']} equal" for arm, c in counts.items())
    good = all(c["equal"] >= LEAST_EQUAL * c["of"] > 0 for c in counts.values())
    return Found(counts, line if good else f"{line}: below {LEAST_EQUAL:.0%}", good)


def _read_scaling(file: Path) -> Found:
    result = read_bench(file)
    fitted = exponents(result["points"])
    said = [f"{method} over {axis} {value:.2f}" for (axis, method), value in fitted.items()]
    return Found(
        result, "exponents: " + ("; ".join(said) or "none, too few sizes take long enough")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; 0 if all did their work, 1 if one failed, 2 for unusable input."""
    parser = OneLineParser(prog="llava.bench.gpu", description="Run everything that needs a GPU.")
    add = parser.add_argument
    add("out", type=Path, help="folder for gpu.json, which holds all that the parts found")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: every line, small")
    add("--minutes", type=float, default=8.0, help="after which no part goes on; default 8")
    add("--commit", help="of this source, where git cannot tell")
    add(
        "--stage", type=device_name, metavar="DEVICE", help="time the stage alone into the file OUT"
    )
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        if args.stage:
            return _time_stage(args.stage, args.out)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserInputError(
                "torch finds no CUDA GPU; set PYTHON to an interpreter that does, or DEVICE=cpu "
                "for a small run without one"
            )
        return run_parts(args.out, args.device == "cpu", 60 * args.minutes, args.commit)


def _time_stage(name: str, file: Path) -> int:
    """Time the stage alone and write the rows; on CUDA then add the times of CUDA graphs."""
    device = torch.device(name)
    width, seconds = (128, 0.0) if device.type == "cpu" else (4096, 0.3)
    calls = stage_calls(device, torch.bfloat16, width)
    rows = [{**named, **time_call(call, device, seconds)} for named, call in calls]
    write_atomically(file, dump_json({"rows": rows}))
    if device.type == "cuda":
        turns = [(row, call) for row, (_, call) in zip(rows, calls, strict=True)]
        for method in CAPTURED:
            for row, call in turns:
                if row["method"] == method:
                    row |= time_graph(call, device, seconds / 4)
                    write_atomically(file, dump_json({"rows": rows}))
    return 0


def run_parts(out: Path, small: bool, seconds: float, commit: str | None) -> int:
    """Run the parts within a time, write OUT/gpu.json after each, and print the table."""
    command = f"bash scripts/gpu.sh{' (DEVICE=cpu)' if small else ''}"
    result: dict[str, Any] = {
        "schema_version": 1,
        "kind": "gpu",
        **describe_run(command, "cpu" if small else "cuda", commit),
        "small": small,
        "parts": [],
    }
    file, end = out.resolve() / "gpu.json", time.monotonic() + seconds
    write_atomically(file, dump_json(result))
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for part in parts(Path(folder), small, commit):
            print(f"== {part.name}", flush=True)
            result["parts"].append(run_part(part, end - time.monotonic()))
            write_atomically(file, dump_json(result))
    print(render_gpu(result))  # type: ignore[arg-type]
    return int(any(part["status"] == "failed" for part in result["parts"]))


def run_part(part: Part, seconds: float) -> dict[str, Any]:
    """Run one part for at most its limit and `seconds`, and return what it found.

    The status is `done`, `failed`, or `left out` with its reason as the line.
    """
    record: dict[str, Any] = {"name": part.name, "status": "left out", "seconds": 0.0}
    if part.missing or seconds <= 0:
        return {**record, "line": part.missing or "no time was left"}
    codes: list[int] = []
    seconds = min(seconds, part.limit)
    start, output = time.monotonic(), ""
    for words in part.commands:
        code, said = _run(words, part.folder, seconds - (time.monotonic() - start))
        codes.append(code)
        output += said
    record |= {
        "seconds": round(time.monotonic() - start, 1),
        "commands": [shlex.join(words) for words in part.commands],
    }
    try:
        found = part.read(output)
    except (UserInputError, KeyError) as error:  # it stopped before it wrote what is read
        found = Found(None, f"no result: {error}", good=False)
    good = found.good and not any(codes)
    line = f"{found.line} (stopped after {seconds:.0f} s)" if 124 in codes else found.line
    folder = f"{part.folder}{os.sep}"  # names of files need none
    output, line = output.replace(folder, ""), line.replace(folder, "")
    return {
        **record,
        "status": "done" if good else "failed",
        "output": output[-(TAIL if good else FAILED_TAIL) :],
        "line": line,
        "result": found.result,
    }


def _run(words: Sequence[str], folder: Path, seconds: float) -> tuple[int, str]:
    """Run the interpreter in a folder; return its exit code (124: stopped) and what it printed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it started can be ended with it
    )
    try:
        said, code = process.communicate(timeout=max(1.0, seconds))[0], process.returncode
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        said, code = process.communicate()[0] + b"\nstopped: its time was over\n", 124
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    text = said.decode(errors="replace")
    print(text[-TAIL:], flush=True)
    return code, text


if __name__ == "__main__":
    sys.exit(main())
