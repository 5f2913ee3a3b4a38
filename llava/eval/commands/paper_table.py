"""`llava paper-table NAME`: run every cell of a table and print it next to the paper's figures.

Rows share one run per task, so they answer the same questions side by side. An interrupted table
resumes where it stopped. `--demo` runs the same code on the model in this repository.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from llava.command_line import natural, positive
from llava.eval.demo import DEFAULT_SAMPLES, write_playground
from llava.eval.engine import provenance
from llava.eval.engine.batches import Plan
from llava.eval.engine.request import UNPRUNED
from llava.eval.engine.runner import Runner
from llava.eval.engine.schema import Record
from llava.eval.report import paper_table as report
from llava.eval.report.pictures import draw_kept_tokens
from llava.eval.report.plots import plot_table
from llava.eval.tables.fill import Filled, FilledRow, fill, read_run
from llava.eval.tables.launch import Launch, RunJob, run_job
from llava.eval.tables.plan import (
    DEFAULT_PROTOCOL,
    Budgets,
    Job,
    arm_for,
    missing_tasks,
    plan,
    printed_budget,
    published_budget,
    scaled_budgets,
    unavailable,
)
from llava.eval.tables.spec import Table, TableError, list_tables, load_table
from llava.eval.tasks.base import Benchmark
from llava.families.spec import ModelSpec
from llava.pixels import ORIGINAL, PIXELS, PIXELS_HELP
from llava.registry import unknown
from llava.shipped import LLAVA_TINY
from llava.storage import exclusive, write_atomically
from llava.utils import UserInputError

DEMO_TOKENS = 576
DEMO_BATCH = 16
DEMO_NEW_TOKENS = 8  # what llava-tiny was trained to say is shorter
PLOTS = {"tokens": "accuracy_vs_tokens", "ttft_ms": "accuracy_vs_latency"}
FEWER_TASKS = "only some of the table's tasks were run"


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add the `paper-table` command to the parser of `python -m llava.eval`."""
    parser = commands.add_parser("paper-table", help="run every cell of a paper's table")
    add = parser.add_argument
    add("name", nargs="?", help="a table, or a .toml file of the same form; default: list them")
    add("--demo", action="store_true", help="on llava-tiny and drawn data, to see that it runs")
    add(
        "--demo-samples",
        type=positive,
        default=DEFAULT_SAMPLES,
        help="questions per task of a demo",
    )
    add("--model-path", help="checkpoint; default: the table's own, from the hub")
    add("--model-base", help="as in the run command")
    add("--conv-mode", help="conversation template; default: the table's")
    add("--data-root", type=Path, help=f"default: {Benchmark.default_root}")
    add("--output", type=Path, help="default: outputs/tables/NAME, or outputs/demo/NAME")
    add("--tasks", nargs="+", metavar="TASK", help="only these tasks of the table")
    add("--methods", nargs="+", metavar="METHOD", help="only rows of these methods")
    add(
        "--processes",
        type=positive,
        default=1,
        help="share every run among so many GPUs (torchrun)",
    )
    add("--batch-size", type=positive, help="questions per batch; default: the table's, else 8")
    add("--limit", type=natural, default=0, help="questions per task, 0 for all")
    add("--seed", type=natural, default=0)
    add("--workers", type=natural, help="processes that read images; default: 4, in a demo none")
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

    def jobs(self) -> list[Job]:
        """Return the runs, without tasks that no benchmark is registered for."""
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
        if order.demo and order.launch.data_root is not None:
            write_playground(order.launch.data_root, args.demo_samples)
        problems = [f"no benchmark is registered for {task}" for task in missing_tasks(order.table)]
        for job in order.jobs():
            print(f"== {job.folder}: {len(job.arms)} arms", flush=True)
            # A run that ends before it starts must not leave the figures of an earlier order here.
            (order.launch.folder(job) / "metrics.json").unlink(missing_ok=True)
            code = run_one(order.launch, job)
            if code != 0:
                problems.append(f"the run of {job.folder} ended with exit code {code}")
        filled = collect(order, problems)
        write_files(order, filled, args.command_line)
    print(f"\n{report.to_markdown(filled)}")
    print(f"written to {order.launch.output}: {order.table.name}.md .csv .tex .json .html")
    return 1 if problems else 0


def read_order(args: argparse.Namespace) -> Order:
    """Check the flags against the table.

    Raises:
        UserInputError: a flag that does not fit, or a row that cannot run.
    """
    table = cut_table(load_table(args.name), args.tasks, args.methods)
    demo = args.demo
    output = args.output or Path("outputs") / ("demo" if demo else "tables") / table.name
    launch = Launch(
        model=ModelSpec(
            args.model_path or (LLAVA_TINY if demo else table.model),
            args.model_base,
            args.device,
            args.conv_mode or table.conv_mode,
            args.dtype,
        ),
        data_root=output / f"playground-{args.demo_samples}" if demo else args.data_root,
        output=output,
        batch_size=args.batch_size or table.batch_size or (DEMO_BATCH if demo else 8),
        limit=args.limit,
        seed=args.seed,
        workers=(0 if demo else 4) if args.workers is None else args.workers,
        pixels=args.pixels,
        processes=args.processes,
        max_new_tokens=DEMO_NEW_TOKENS if demo else None,
    )
    budgets = scaled_budgets(table, DEMO_TOKENS) if demo else published_budget
    order = Order(table, launch, budgets, demo)
    for row in table.rows:
        try:
            if unavailable(table, row) is None:
                arm_for(row, budgets).seeded(args.seed)
        except UserInputError as error:
            raise TableError(
                f"the row {row.label!r} of {table.name} cannot run: {error}"
            ) from error
    return order


def cut_table(table: Table, tasks: Sequence[str] | None, methods: Sequence[str] | None) -> Table:
    """Return only some tasks and methods of a table; the unpruned rows always stay.

    Raises:
        TableError: the table has no such task or method.
    """
    for kind, wanted, known in (
        ("task", tasks, {column.task for column in table.columns}),
        ("method", methods, {row.methods for row in table.rows}),
    ):
        for word in wanted or ():
            if word not in known:
                raise TableError(unknown(f"{kind} of {table.name}", word, known))
    columns = tuple(column for column in table.columns if not tasks or column.task in tasks)
    if len(columns) < len(table.columns):
        table = replace(table, columns=columns, average_no_gap=FEWER_TASKS)
    kept = {*(methods or ()), UNPRUNED}
    rows = tuple(row for row in table.rows if not methods or row.methods in kept)
    return replace(table, rows=rows)


def show_plan(order: Order) -> int:
    """Print rows that cannot run and the command of every run that is needed."""
    print(order.table.title)
    for row in order.table.rows:
        lacking = unavailable(order.table, row)
        if lacking is not None:
            print(f"not available: {lacking} ({row.label} at {printed_budget(row)})")
    for task in missing_tasks(order.table):
        print(f"no benchmark is registered for {task}")
    for job in order.jobs():
        print(order.launch.request(job).command)
    return 0


def collect(order: Order, problems: Sequence[str]) -> Filled:
    """Fill the table from those of its runs that are finished."""
    results, found = {}, list(problems)
    for job in order.jobs():
        try:
            results[job.place] = read_run(order.launch.folder(job))
        except TableError as error:
            found.append(str(error))
    limit = order.launch.limit
    no_gap = f"only the first {limit} questions of a task were asked" if limit else None
    return fill(order.table, results, order.budgets, demo=order.demo, no_gap=no_gap, problems=found)


def write_files(order: Order, filled: Filled, command: str) -> None:
    """Write the table in every form, its plots, and the page with all of it."""
    output, name = order.launch.output, order.table.name
    conditions = describe_conditions(order, command)
    texts = {
        "md": report.to_markdown(filled),
        "csv": report.to_csv(filled),
        "tex": report.to_latex(filled),
        "json": report.to_json(filled, conditions),
    }
    for suffix, text in texts.items():
        write_atomically(output / f"{name}.{suffix}", text)
    pictures = {}
    for cost, stem in PLOTS.items():
        path = output / f"{stem}.png"
        if plot_table(filled, cost, path):
            pictures[stem.replace("_", " ")] = path
    kept = output / "kept_tokens.png"
    if draw_overlays(order, filled, kept):
        pictures["kept tokens at the smallest budget"] = kept
    write_atomically(output / f"{name}.html", report.to_html(filled, conditions, pictures))


def draw_overlays(order: Order, filled: Filled, path: Path) -> bool:
    """Draw what rows keep of the first image that the table asks about; False if nothing ran."""
    rows = rows_to_draw(filled)
    measured = any(cell.measured for row in filled.rows for cell in row.cells.values())
    if not measured or not rows:
        return False
    first = next(job for job in order.jobs() if job.next_protocol == DEFAULT_PROTOCOL)
    request = order.launch.request(first)
    located = replace(request, model=request.model.located())
    subject = order.launch.shared.load(located.prompted_model)
    questions = Plan.of(request.benchmark.items(), request.batch_size)
    runner = Runner.of(request, subject, questions)
    arms = {
        f"{row.row.label} {report.budget_text(row.budget)}": arm_for(row.row, order.budgets)
        for row in rows
    }
    return draw_kept_tokens(runner, arms, path)


def rows_to_draw(filled: Filled) -> list[FilledRow]:
    """Return the available rows at the smallest budget, as the model was trained to read images.

    Numbers of tokens and shares of them each have a smallest one.
    """
    rows = [
        row
        for row in filled.rows
        if row.unavailable is None
        and row.row.methods != UNPRUNED
        and row.next_protocol == DEFAULT_PROTOCOL
    ]
    smallest = {
        (kind, min(budgets))
        for kind in (int, float)
        if (budgets := [row.budget for row in rows if isinstance(row.budget, kind)])
    }
    return [row for row in rows if (type(row.budget), row.budget) in smallest]


def describe_conditions(order: Order, command: str) -> Record:
    """Return what a reader needs to make the table again."""
    launch = order.launch
    flags = ("batch_size", "limit", "seed", "pixels")
    return {
        "command": command,
        "model": launch.model.path,
        "data_root": str(launch.data_root or Benchmark.default_root),
        **{flag: getattr(launch, flag) for flag in flags},
        "git": provenance.git_state(),
        "versions": provenance.package_versions(),
        "machine": provenance.machine(launch.model.device),
    }
