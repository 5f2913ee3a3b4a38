"""What `llava bench` writes, key by key; `docs/results_schema.md` says the same for people.

Times are raw: medians, totals and ratios are made from them when a file is read.
"""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from llava.bench.counts import Work
from llava.eval.engine.schema import read_object
from llava.storage import StorageError

SCHEMA_VERSION = 1
THIS = "this"  # this source tree, where arms of another one are beside it


class ArmResult(TypedDict):
    """An arm on batches of one size."""

    source: str  # "this", or the name of the checkout given with --compare-with
    arm: str  # unique within source and batch: `zoo@64`
    method: str  # the arm without its budget; "none" and "free" are the controls
    label: str  # what the trace calls the method, with what it could not read
    pruning: dict[str, Any] | None  # as in `mm_token_pruning`
    free: bool  # indices are given and the arm only gathers
    batch: int
    tokens: int  # visual tokens of an image in the language model
    all_tokens: int  # without pruning
    changes: bool  # False: the budget is no smaller than the image
    prompt: int  # tokens of a row in the language model
    first_ms: float  # the stage in the first call of the arm, with what is computed once
    kv_cache_bytes: int  # after the prefill, with all layers
    work: dict[str, Work]  # encode, stage, prefill, decode: operations and bytes, all layers
    times: dict[str, list[float]]  # ms by phase, one entry a repeat, `peak_bytes` among them
    layer_tokens: NotRequired[list[int]]  # visual tokens that each layer reads, where some drop any


class Conditions(TypedDict):
    """Under what a bench ran."""

    model: str
    weights: str  # "random", or "checkpoint"
    device: str
    dtype: str
    tiles: int  # of an image
    layers: int  # decoder layers that were run
    depth: int  # those of the model; times of the language model are scaled to them
    text: int  # tokens of a prompt beside the image
    batches: list[int]
    answers: list[int]  # lengths of answers in tokens
    end_to_end_answer: int  # length in the calls that were timed as a whole
    decode_steps: int  # a decoding step is the mean of so many
    repeats: int  # asked for; every arm ran once before, not counted
    order: NotRequired[str]  # of the arms; not in older files, where it is that of `arms`


class BenchResult(TypedDict):
    """The file of `llava bench --output`."""

    schema_version: int
    kind: str
    command: str
    commit: dict[str, Any] | None
    versions: dict[str, str]
    machine: dict[str, Any]
    conditions: Conditions
    rates: dict[str, float]  # operations/s of a product by type, bytes/s as `memory`
    loading_seconds: dict[str, float]  # by source; another checkout's with its process and imports
    compared_with: NotRequired[dict[str, dict[str, Any] | None]]  # its `commit`, by its name
    complete: bool  # False: the run was interrupted, or goes on
    arms: list[ArmResult]
    floors: NotRequired[dict[str, int]]  # arms not measured: lowest mean of tokens a layer they can


class Point(TypedDict):
    """One size in `llava bench --scaling`."""

    axis: str  # tokens, keep, width or batch: what was varied
    method: str
    tokens: int
    keep: int
    width: int  # D; features have a quarter
    batch: int
    times: list[float]  # ms of the stage


class ScalingResult(TypedDict):
    """The file of `llava bench --scaling --output`."""

    schema_version: int
    kind: str
    command: str
    commit: dict[str, Any] | None
    versions: dict[str, str]
    machine: dict[str, Any]
    conditions: dict[str, Any]
    complete: bool
    points: list[Point]
    stopped: NotRequired[list[str]]  # axes that ended early, because a call took too long


class PartResult(TypedDict):
    """A part of `scripts/gpu.sh`."""

    name: str
    status: str  # "done", "failed" or "left out"
    seconds: float
    line: str  # what was found, or why there is nothing
    commands: NotRequired[list[str]]
    output: NotRequired[str]  # the end of it
    result: NotRequired[Any]  # such as a `BenchResult`


class GpuResult(TypedDict):
    """The file `gpu.json` of `scripts/gpu.sh`."""

    schema_version: int
    kind: str
    command: str
    commit: dict[str, Any] | None
    versions: dict[str, str]
    machine: dict[str, Any]
    small: bool  # True: a check of the script, not a measurement
    parts: list[PartResult]


_FORMS: dict[str, Any] = {"bench": BenchResult, "scaling": ScalingResult, "gpu": GpuResult}
# Lists of a file, what their entries must have, and what their lack means.
_ENTRIES: dict[str, tuple[str, Any, str]] = {
    "bench": ("arms", ArmResult, "it was interrupted before its first repeat was done"),
    "scaling": ("points", Point, "it was interrupted before its first size was done"),
    "gpu": ("parts", PartResult, "it was interrupted before its first part was done"),
}


def read_bench(path: Path) -> Any:
    """Read a file of `llava bench` or `scripts/gpu.sh`: see `BenchResult` and the types below it.

    Raises:
        StorageError: it cannot be read, is none, or has nothing to show.
    """
    return check_result(read_object(path), str(path))


def check_result(result: Any, name: str) -> Any:
    """Return a result that has all its keys and something to show.

    Raises:
        StorageError: it lacks some; `name` says whose.
    """
    kind = result.get("kind") if isinstance(result, dict) else None
    if kind not in _FORMS or result.get("schema_version") != SCHEMA_VERSION:
        raise StorageError(
            f"{name} is not a file of llava bench (schema {SCHEMA_VERSION}); give one that "
            "`llava bench --output FILE` or scripts/gpu.sh wrote"
        )
    place, form, why = _ENTRIES[kind]
    _check_keys(result, _FORMS[kind], name)
    if kind == "bench":
        _check_keys(result["conditions"], Conditions, f"conditions of {name}")
    if not result[place]:
        raise StorageError(f"{name} has no {place}: {why}; run its command again")
    for number, entry in enumerate(result[place]):
        _check_keys(entry, form, f"{place}[{number}] of {name}")
    return result


def _check_keys(value: Any, form: Any, name: str) -> None:
    missing = sorted(form.__required_keys__ - (value.keys() if isinstance(value, dict) else set()))
    if missing:
        raise StorageError(f"{name} is damaged, it lacks {', '.join(missing)}; run it again")
