"""`python -m llava.eval paper-table NAME`: run every cell of a table, print it beside the paper.

Rows share one run per task, so they answer the same questions side by side. Whatever was
interrupted goes on where it stopped. `--demo` runs the same code on the model in this repository.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from llava.eval import provenance
from llava.eval.arm_words import parse_arm
from llava.eval.arms import UNPRUNED
from llava.eval.demo.playground import DEFAULT_SAMPLES, write_playground
from llava.eval.paper_tables.collect import Filled, fill, read_run
from llava.eval.paper_tables.launch import Launch, RunJob, run_job
from llava.eval.paper_tables.pictures import draw_kept_tokens
from llava.eval.paper_tables.plan import (
    Budgets,
    Job,
    missing_tasks,
    plan,
    published_budget,
    scaled_budgets,
    setting_of,
    unavailable,
)
from llava.eval.paper_tables.plots import plot
from llava.eval.paper_tables.render import to_csv, to_json, to_latex, to_markdown
from llava.eval.paper_tables.report import to_html
from llava.eval.paper_tables.spec import Table, TableError, list_tables, load_table
from llava.eval.results import Record
from llava.eval.tasks.base import get_benchmark
from llava.pixels import ORIGINAL, PIXELS, PIXELS_HELP
from llava.shipped import LLAVA_TINY
from llava.storage import exclusive, write_atomically
from llava.utils import UserInputError

DEMO_TOKENS = 576
DEMO_BATCH = 16
DEMO_NEW_TOKENS = 8  # what llava-tiny was trained to say is shorter
PLOTS = {"tokens": "accuracy_vs_tokens", "ttft_ms": "accuracy_vs_latency"}


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `paper-table` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser("paper-table", help="run every cell of a paper's table")
    add = parser.add_argument
    add("name", nargs="?", help="a table, or a .toml file of the same form; default: list them")
    add("--demo", action="store_true", help="on llava-tiny and drawn data, to see that it runs")
    add("--demo-samples", type=int, default=DEFAULT_SAMPLES, help="questions per task of a demo")
    add("--model-path", help="checkpoint; default: the table's own, from the hub")
    add("--model-base", help="as in the run command")
    add("--conv-mode", help="conversation template; default: the table's")
    add("--data-root", type=Path, default=Path("playground/data/eval"))
    add("--output", type=Path, help="default: outputs/tables/NAME, or outputs/demo/NAME")
    add("--tasks", nargs="+", metavar="TASK", help="only these tasks of the table")
    add("--methods", nargs="+", metavar="METHOD", help="only rows of these methods")
    add("--processes", type=int, default=1, help="share every run among so many GPUs (torchrun)")
    add("--batch-size", type=int, help="questions per batch; default: the table's, else 8")
    add("--limit", type=int, default=0, help="questions per task, 0 for all")
    add("--seed", type=int, default=0)
    add("--workers", type=int, help="processes that read images; default: 4, in a demo none")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", help="of the model; default: the loader's")
    add("--pixels", choices=PIXELS, default=ORIGINAL, help=f"{PIXELS_HELP}; default: {ORIGINAL}")
    add("--dry-run", action="store_true", help="print the runs that it needs and stop")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Order:
    """What to run: the table, how its rows' budgets become the model's, and with what."""

    table: Table
    launch: Launch
    budgets: Budgets
    demo: bool

    @property
    def no_gap(self) -> str | None:
        """Why nothing measured can be held against published figures, or None."""
        if self.demo:
            return "demo"
        limit = self.launch.limit
        return f"only the first {limit} questions of a task were asked" if limit else None

    def jobs(self) -> list[Job]:
        """The runs, without tasks that no benchmark is registered for."""
        absent = missing_tasks(self.table)
        jobs = plan(self.table, self.budgets, native_only=self.demo)
        return [job for job in jobs if job.task not in absent]


def run(args: argparse.Namespace, run_one: RunJob = run_job) -> int:
    """Run, tabulate, draw; 0 if every cell that can run has run."""
    if args.name is None:
        print("\n".join(f"{name:<28} {load_table(name).title}" for name in list_tables()))
        return 0
    order = read_order(args)
    if args.dry_run:
        return show_plan(order)
    if find_spec("matplotlib") is None:
        raise UserInputError("the plots need matplotlib: pip install 'llava[eval]'")
    with exclusive(order.launch.output):
        if order.demo:
            write_playground(order.launch.data_root, args.demo_samples)
        problems = [f"no benchmark is registered for {task}" for task in missing_tasks(order.table)]
        for job in order.jobs():
            print(f"== {job.folder}: {len(job.settings)} arms", flush=True)
            # A run that ends before it starts must not leave the figures of an earlier order here.
            (order.launch.folder(job) / "metrics.json").unlink(missing_ok=True)
            code = run_one(order.launch, job)
            if code != 0:
                problems.append(f"the run of {job.folder} ended with exit code {code}")
        filled = collect(order, problems)
        write_files(order, filled, args.command_line)
    print(f"\n{to_markdown(filled, order.demo)}")
    print(f"written to {order.launch.output}: {order.table.name}.md .csv .tex .json .html")
    return 1 if problems else 0


def read_order(args: argparse.Namespace) -> Order:
    """Check the flags against the table. Raises UserInputError for what does not fit."""
    table = only(load_table(args.name), args.tasks, args.methods)
    if args.limit < 0 or args.processes < 1 or args.demo_samples < 1:
        raise UserInputError("--limit must be at least 0, --processes and --demo-samples 1")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserInputError("--batch-size must be at least 1")
    if args.seed < 0 or (args.workers or 0) < 0:
        raise UserInputError("--seed and --workers must be at least 0")
    place = "demo" if args.demo else "tables"
    output = args.output or Path("outputs") / place / table.name
    model, data = args.model_path or table.model, args.data_root
    if args.demo:
        model = args.model_path or LLAVA_TINY
        data = output / f"playground-{args.demo_samples}"
    launch = Launch(
        model_path=str(model),
        data_root=data,
        output=output,
        model_base=args.model_base,
        conv_mode=args.conv_mode or table.conv_mode,
        batch_size=args.batch_size or table.batch_size or (DEMO_BATCH if args.demo else 8),
        limit=args.limit,
        seed=args.seed,
        workers=(0 if args.demo else 4) if args.workers is None else args.workers,
        device=args.device,
        dtype=args.dtype,
        pixels=args.pixels,
        processes=args.processes,
        extra=("--max-new-tokens", str(DEMO_NEW_TOKENS)) if args.demo else (),
    )
    budgets = scaled_budgets(table, DEMO_TOKENS) if args.demo else published_budget
    order = Order(table, launch, budgets, args.demo)
    check_rows(order)
    return order


def check_rows(order: Order) -> None:
    """Refuse rows that no method can run, before anything runs. Raises TableError."""
    for row in order.table.rows:
        if unavailable(order.table, row) is None:
            try:
                parse_arm(setting_of(row, order.budgets).word).pruning(order.launch.seed)
            except UserInputError as error:
                raise TableError(
                    f"the row {row.label!r} of {order.table.name} cannot run: {error}"
                ) from error


def only(table: Table, tasks: Sequence[str] | None, methods: Sequence[str] | None) -> Table:
    """The table cut to some tasks and methods; the unpruned rows always stay."""
    for name, wanted, known in (
        ("task", tasks, {column.task for column in table.columns}),
        ("method", methods, {row.method for row in table.rows}),
    ):
        unknown = sorted(set(wanted or ()) - known)
        if unknown:
            valid = ", ".join(sorted(known))
            raise TableError(f"{table.name} has no {name} {', '.join(unknown)}; it has {valid}")
    if tasks:
        columns = tuple(column for column in table.columns if column.task in tasks)
        if len(columns) < len(table.columns):
            table = replace(
                table, columns=columns, average_no_gap="only some of the table's tasks were run"
            )
    if methods:
        kept = {*methods, UNPRUNED}
        table = replace(table, rows=tuple(row for row in table.rows if row.method in kept))
    return table


def show_plan(order: Order) -> int:
    """Print rows that cannot run and the command of every run that is needed."""
    print(order.table.title)
    for row in order.table.rows:
        lacking = unavailable(order.table, row)
        if lacking is not None:
            print(f"not available: {lacking} ({row.label} at {row.budget})")
    for task in missing_tasks(order.table):
        print(f"no benchmark is registered for {task}")
    for job in order.jobs():
        print(shlex.join(["python", "-m", "llava.eval", *order.launch.arguments(job)]))
    return 0


def collect(order: Order, problems: Sequence[str] = ()) -> Filled:
    """Cells from whatever runs of the table are finished."""
    results, found = {}, list(problems)
    for job in order.jobs():
        try:
            results[job.place] = read_run(order.launch.folder(job))
        except TableError as error:
            found.append(str(error))
    return fill(
        order.table,
        results,
        order.budgets,
        native_only=order.demo,
        no_gap=order.no_gap,
        problems=found,
    )


def write_files(order: Order, filled: Filled, command: str) -> None:
    """All forms of the table, its plots and its report."""
    output, name, demo = order.launch.output, order.table.name, order.demo
    conditions = describe_conditions(order, command)
    write_atomically(output / f"{name}.md", to_markdown(filled, demo))
    write_atomically(output / f"{name}.csv", to_csv(filled))
    write_atomically(output / f"{name}.tex", to_latex(filled, demo))
    write_atomically(output / f"{name}.json", to_json(filled, conditions, demo))
    pictures = {}
    for cost, stem in PLOTS.items():
        path = output / f"{stem}.png"
        if plot(filled, cost, path, demo):
            pictures[stem.replace("_", " ")] = path
    kept = output / "kept_tokens.png"
    if draw_overlays(order, filled, kept):
        pictures["kept tokens at the smallest budget"] = kept
    write_atomically(output / f"{name}.html", to_html(filled, conditions, pictures, demo))


def draw_overlays(order: Order, filled: Filled, path: Path) -> bool:
    """Draw what rows keep of the first image that the table asks about; False if nothing ran."""
    first = next((job for job in order.jobs()), None)
    if first is None or not any(
        cell.measured for row in filled.rows for cell in row.cells.values()
    ):
        return False
    benchmark = get_benchmark(first.task)(order.launch.data_root, first.protocol)
    benchmark.pixels = order.launch.pixels
    item = next(item for item in benchmark.items() if item.images)
    return draw_kept_tokens(
        filled,
        order.launch.model_path,
        benchmark.load_image(item.images[0]),
        item.question,
        path,
        model_base=order.launch.model_base,
        device=order.launch.device,
        seed=order.launch.seed,
    )


def describe_conditions(order: Order, command: str) -> Record:
    """What a reader needs to make the table again."""
    return {
        "command": command,
        "model": order.launch.model_path,
        "data_root": str(order.launch.data_root),
        "batch_size": order.launch.batch_size,
        "limit": order.launch.limit,
        "seed": order.launch.seed,
        "pixels": order.launch.pixels,
        "git": provenance.git_state(),
        "versions": provenance.package_versions(),
        "machine": provenance.machine(order.launch.device),
    }
