"""Carry out a bench: build the model, run the arms of a repeat one after another, keep times."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llava.bench.arms import BenchArm
from llava.bench.beside import Beside
from llava.bench.configs import DEEP, build_random, shape_of
from llava.bench.measure import Bench, Times
from llava.bench.rates import measure_rates
from llava.bench.schema import SCHEMA_VERSION, THIS, ArmResult, BenchResult, Conditions
from llava.bench.subject import DECODE_STEPS, Subject
from llava.pruning import PruningError
from llava.storage import dump_json, write_atomically
from llava.utils import UserInputError

RANDOM = "random"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        config: name of a shape, built with random weights; None for a checkpoint.
        model_path: the checkpoint; None for a shape.
        device: as torch names it.
        dtype: of the weights: `bfloat16`.
        layers: decoder layers to run; None for all.
        text: tokens of a prompt beside the image.
        arms: see `BenchArm.to_dict`.
        batches, answers: sizes and lengths in tokens.
        repeats: how often every arm is run.
    """

    config: str | None
    model_path: str | None
    device: str
    dtype: str
    layers: int | None
    text: int
    arms: tuple[dict[str, Any], ...]
    batches: tuple[int, ...]
    answers: tuple[int, ...]
    repeats: int

    @property
    def steps(self) -> int:
        """Decoding steps that are timed; 0 if no answer has a second token."""
        return min(DECODE_STEPS, max(self.answers) - 1)


class Source(Protocol):
    """A source tree that runs arms: this one, or another in a process of its own."""

    def begin_repeat(self) -> None: ...
    def describe(self, number: int, size: int) -> dict[str, Any]: ...
    def measure(self, number: int, size: int) -> Times: ...


Run = tuple[str, Source, int, int]  # a source with its name, number of an arm, batch size


def _model_spec() -> Any:
    """Find `ModelSpec`, which older checkouts have in another place."""
    try:
        from llava.families.spec import ModelSpec
    except ImportError:
        from llava.model.loaded import ModelSpec  # type: ignore[attr-defined,no-redef]
    return ModelSpec


def open_subject(plan: Plan) -> Subject:
    """Build or load the model.

    Raises:
        UserInputError: a name or checkpoint that does not exist or is no LLaVA, or more layers than
            it has.
    """
    device, steps = torch.device(plan.device), plan.steps
    dtype = getattr(torch, plan.dtype)
    if plan.config is None:
        spec = _model_spec()(str(plan.model_path), device=plan.device, dtype=plan.dtype).located()
        if spec.family is not None:
            raise UserInputError(
                f"{spec.path} is a {spec.family.name}, and only LLaVA's own stages are timed here; "
                "llava run writes the times of every stage of this one to timings.jsonl"
            )
        loaded = spec.load()
        model: Any = loaded.model
        tiled = str(getattr(model.config, "image_aspect_ratio", "")).startswith("anyres")
        depth, tiles = model.config.num_hidden_layers, 5 if tiled else 1
    else:
        shape = shape_of(plan.config)
        depth, tiles = shape.language["num_hidden_layers"], shape.tiles
        if plan.layers is not None and plan.layers > depth:
            raise UserInputError(
                f"--layers {plan.layers}: {plan.config} has {depth} decoder layers"
            )
        if plan.layers not in (None, depth) and any(
            (arm["pruning"] or {}).get("decoder") for arm in plan.arms
        ):
            raise UserInputError(
                f"--layers {plan.layers}: a schedule between layers needs all {depth} of them; "
                f"leave --layers out, or take --config {DEEP} for a narrow model as deep as a 7B"
            )
        model = build_random(shape, device=device, dtype=dtype, layers=plan.layers)
    return Subject(model, tiles, plan.text, depth, min(plan.answers), steps)


def run_bench(
    plan: Plan,
    facts: Mapping[str, Any],
    output: Path | None,
    compare_with: Path | None = None,
    say: Callable[[str], None] = print,
) -> BenchResult:
    """Measure and write `output` after every repeat, so that an interruption loses one at most.

    Args:
        plan: what is measured.
        facts: command, commit, versions, machine.
        output: file; None writes nothing.
        compare_with: another checkout of this package, which runs the same arms beside this one.
        say: takes lines about progress.

    Raises:
        UserInputError: a model or setting that cannot be used, or a checkout that cannot.
    """
    with ExitStack() as stack:
        others, opened = _open_other(plan, compare_with, stack)
        start = time.perf_counter()
        subject = open_subject(plan)
        opened["loading_seconds"][THIS] = time.perf_counter() - start
        arms = [BenchArm.from_dict(arm) for arm in plan.arms]
        own = Bench(subject, arms, list(plan.batches))
        sources: dict[str, Source] = {THIS: own, **others}
        dtypes = {subject.model.dtype, torch.float32}
        result: BenchResult = {
            "schema_version": SCHEMA_VERSION,
            "kind": "bench",
            **facts,  # type: ignore[typeddict-item]
            "conditions": _conditions(plan, subject),
            "rates": measure_rates(own.device, dtypes),
            **opened,
            "complete": False,
            "arms": [],
        }
        save = _saver(result, output)
        runs = [
            (name, source, number, size)
            for size in plan.batches
            for number in range(len(arms))
            for name, source in sources.items()
        ]
        say(f"warming up {len(runs)} arms")
        runs = _warm_up(runs, arms, result, say)
        for repeat in range(plan.repeats):
            say(f"repeat {repeat + 1} of {plan.repeats}")
            measure_once(runs, result["arms"], sources, backwards=repeat % 2 == 1)
            save()
        again = measure_rates(own.device, dtypes)
        result["rates"] = {name: max(rate, again[name]) for name, rate in result["rates"].items()}
        result["complete"] = True
        save()
    return result


def _warm_up(
    runs: Sequence[Run], arms: Sequence[BenchArm], result: BenchResult, say: Callable[[str], None]
) -> list[Run]:
    """Run every arm once and describe it in `result`.

    Returns:
        The runs without those of arms that cannot reach their budget between layers, which are in
        `floors` of the result.
    """
    floors: dict[str, int] = {}
    measured = []
    for name, source, number, size in runs:
        arm = arms[number].name
        if arm in floors:
            continue
        try:
            described: Any = {"source": name, **source.describe(number, size), "times": {}}
        except PruningError as error:
            floor = getattr(error, "floor", None)  # of an error that older checkouts do not know
            if floor is None:
                raise
            floors[arm] = floor
            say(f"{arm}: floor {floor}; {error}")
            continue
        source.measure(number, size)
        result["arms"].append(described)
        measured.append((name, source, number, size))
    if floors:
        result["floors"] = floors
    return measured


def _open_other(
    plan: Plan, root: Path | None, stack: ExitStack
) -> tuple[dict[str, Source], dict[str, Any]]:
    """Open another checkout, if there is one; return it by its name, and what the file says of it.

    The time until it is ready includes that of its process and imports.
    """
    if root is None:
        return {}, {"loading_seconds": {}}
    start = time.perf_counter()
    other = stack.enter_context(Beside(root, asdict(plan)))
    ready = {other.name: time.perf_counter() - start}
    return {other.name: other}, {
        "loading_seconds": ready,
        "compared_with": {other.name: other.commit},
    }


def measure_once(
    runs: list[Run],
    records: list[ArmResult],
    sources: Mapping[str, Source],
    backwards: bool = False,
) -> None:
    """Run every arm once, one after another, and add its times to its record.

    `backwards` runs the last one first, so that over two repeats no arm and no source always comes
    before another.
    """
    for source in sources.values():
        source.begin_repeat()
    turns = list(zip(runs, records, strict=True))
    measured = [
        (record, source.measure(number, size))
        for (_, source, number, size), record in (turns[::-1] if backwards else turns)
    ]
    for record, times in measured:
        for name, value in times.items():
            record["times"].setdefault(name, []).append(round(value, 5))


def _saver(result: BenchResult, output: Path | None) -> Callable[[], None]:
    def save() -> None:
        if output is not None:
            write_atomically(output, dump_json(result))

    save()
    return save


def _conditions(plan: Plan, subject: Subject) -> Conditions:
    return {
        "model": plan.config or Path(str(plan.model_path)).name,
        "weights": RANDOM if plan.config is not None else "checkpoint",
        "device": plan.device,
        "dtype": plan.dtype,
        "tiles": subject.tiles,
        "layers": subject.layers,
        "depth": subject.depth,
        "text": plan.text,
        "batches": list(plan.batches),
        "answers": list(plan.answers),
        "end_to_end_answer": subject.answer,
        "decode_steps": subject.steps,
        "repeats": plan.repeats,
        "order": "as listed, backwards in every second repeat",
    }
