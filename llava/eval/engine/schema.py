"""What a run writes, key by key, and the readers of its files.

`docs/results_schema.md` says the same for people. Files of schema 1, which `run` and `quickstart`
wrote in two forms, are read as schema 2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from llava.pruning.config import CHOICES
from llava.storage import StorageError, read_json, read_jsonl

SCHEMA_VERSION = 2
READABLE = (1, SCHEMA_VERSION)

Record = dict[str, Any]


class ResultError(StorageError):
    """A result file cannot be used; the message says why."""


class ArmSetting(TypedDict):
    """An arm: in `run.json`, in `metrics.json`, and in a file of `--arms`."""

    pruning: dict[str, Any] | None  # as in `mm_token_pruning`; None: the unpruned model
    image: str  # shown with a question: its "own", an "other" one, or none ("absent")
    label: NotRequired[str]  # what tables print
    control: NotRequired[str]  # an arm that should lose, by its "image" or its "tokens"
    unavailable: NotRequired[str]  # why it was not run
    floor: NotRequired[int]  # lowest mean of tokens a layer, where the budget is below


class Figure(TypedDict):
    """A metric of the benchmark, the official formula."""

    value: float
    se: float | None  # standard error, clustered by image; None: undefined
    n: int  # items
    scale: float  # largest possible value: 100 for per cent


class Difference(TypedDict):
    """Scores of an arm minus those of the unpruned arm on the same items, in [-1, 1]."""

    value: float
    se: float | None
    n: int


class LayerTokens(TypedDict):
    """Visual tokens of a prompt, means over the prompts with images."""

    tokens_in: float | None  # that the first layer read; None without any prompt
    tokens_last: float | None  # that the last one read
    tokens_mean: float | None  # mean over layers
    tokens_per_layer: list[float]  # by layer


class ArmMetrics(ArmSetting):
    """What an arm reached, from its answers alone."""

    metrics: dict[str, Figure]  # by name; empty where a server or a grader has to score
    difference: NotRequired[Difference]  # where items have scores and `none` was run too
    tokens_in: float | None  # visual tokens of a prompt that enter the language model, ...
    tokens_min: int | None  # ... over the prompts with images; None without any
    tokens_max: int | None
    tokens_mean: float | None  # mean over layers; the same as `tokens_in` where all read the same
    between_layers: NotRequired[LayerTokens]  # where tokens are dropped between layers
    answered: int  # items
    failed_images: int  # items left out, because an image of theirs cannot be read


class Metrics(TypedDict):
    """`metrics.json`: the same bytes after any interruption."""

    schema_version: int
    task: str
    protocol: str  # prompt protocol
    headline: str  # the metric that tables print
    items: int  # items asked, those that failed included
    arms: dict[str, ArmMetrics]  # by name, in the order of the run


class RunInfo(TypedDict):
    """`run.json`: what was run, where, and how it ended."""

    run_key: str  # hash of the seven entries that follow
    config: dict[str, Any]  # every setting that can change an answer
    checkpoint_sha256: str
    base_sha256: str | None  # of --model-base
    data_sha256: str
    source_sha256: str  # of the code that makes answers
    versions: dict[str, str]  # of Python and of the packages that decide the numbers
    schema_version: int
    task: str
    protocol: str
    arms: dict[str, ArmSetting]
    command: str
    git: dict[str, Any] | None  # commit, dirty
    machine: dict[str, Any]  # as docs/results_schema.md lists it
    processes: int
    batches: int
    reused_batches: int  # answered by an earlier attempt
    status: str  # running, interrupted, done
    failed_items: NotRequired[int]  # once done
    wall_seconds: NotRequired[float]


class Answer(TypedDict):
    """A line of `answers.jsonl`: by item, then by arm."""

    answer_id: str  # hash of run key, arm, index and question id
    batch: int
    arm: str
    question_id: str | int
    index: int  # place in the benchmark, from 0
    images: list[str]
    shown: list[str]  # images that this arm showed instead
    category: NotRequired[str]  # where the benchmark has categories
    tokens_in: int | None  # visual tokens of the prompt in the language model, its first layer
    tokens_last: NotRequired[int]  # in its last layer, where tokens are dropped between layers, ...
    tokens_mean: NotRequired[float]  # ... the mean over layers, ...
    tokens_per_layer: NotRequired[list[int]]  # ... and by layer; empty without an image
    kept: str | None  # "all", "none", or a hash of the kept indices
    answer: str
    score: float | None  # in [0, 1]; None: no score of its own
    error: NotRequired[str]  # why the item was not asked


class Timing(TypedDict):
    """A line of `timings.jsonl`: one arm in one batch; ms, None where not measured."""

    batch: int
    arm: str
    cold: bool  # first batch of its process
    encode_ms: float  # per image
    prune_ms: float | None  # per image, of which ...
    score_ms: float | None
    select_ms: float | None
    splice_ms: float | None  # per item, as what follows
    prefill_ms: float | None  # up to the first new token
    decode_ms: float | None  # per later token
    between_ms: NotRequired[float]  # of prefill_ms, to drop tokens between layers
    kv_bytes: NotRequired[float]  # measured key cache of a prompt, where they are dropped
    new_tokens: int  # in the batch


class ResultRow(TypedDict):
    """A row of a result file: one arm, accuracies in [0, 1], times as medians over batches.

    An arm that was not run has the first six keys and its times.
    """

    arm: str
    label: str
    method: str
    budget: int | None  # visual tokens of an image; None: no image
    control: str | None
    unavailable: str | None
    floor: NotRequired[int]  # as of an arm
    tokens_min: int
    tokens_max: int
    between_layers: NotRequired[LayerTokens]
    kv_bytes: NotRequired[float | None]  # median over batches
    accuracy: float
    accuracy_se: float | None
    relative: float | None  # accuracy over that of the unpruned arm
    difference: float  # see `Difference`
    difference_se: float | None
    n: int
    families: dict[str, dict[str, Any]]  # accuracy, accuracy_se, n by category
    prune_ms: float | None
    prefill_ms: float | None
    decode_ms: float | None
    prune_ratio: float | None  # prune_ms over the unpruned prefill_ms of the same batch
    prefill_ratio: float | None


class Result(TypedDict):
    """The file of `quickstart --save-result`: what tables, plots and documents are made from."""

    schema_version: int
    questions: int
    images: int
    config: dict[str, Any]  # of `run.json`, with methods, budgets and limit
    run: dict[str, Any]  # the other entries of `run.json`, without its arms
    rows: list[ResultRow]


def read_info(folder: Path) -> Record:
    """Read `run.json` of a run folder, see `RunInfo`.

    Raises:
        ResultError: it is missing or damaged.
    """
    info = read_object(folder / "run.json")
    if info.get("schema_version") == 1:
        if info["config"].get("command") == "quickstart":
            metrics = read_metrics(folder)
            info |= {key: metrics[key] for key in ("task", "protocol", "arms")}
        else:
            info["arms"] = {name: _setting_of_1(arm) for name, arm in info["arms"].items()}
    return info


def read_metrics(folder: Path) -> Record:
    """Read `metrics.json` of a run folder, see `Metrics`.

    Raises:
        ResultError: it is missing or damaged.
    """
    metrics = read_object(folder / "metrics.json")
    if "rows" in metrics:  # of quickstart, schema 1
        rows = {row["arm"]: row for row in metrics["rows"]}
        return {
            "schema_version": 1,
            "task": "llava-tiny",
            "protocol": "llava",
            "headline": "accuracy",
            "items": max(row.get("n", 0) for row in rows.values()),
            "arms": {name: _arm_of_row(row) for name, row in rows.items()},
        }
    if metrics.get("schema_version") == 1:
        metrics["arms"] = {
            name: {key: value for key, value in arm.items() if key not in _OF_1}
            | _setting_of_1(arm)
            for name, arm in metrics["arms"].items()
        }
    for arm in metrics["arms"].values():
        _tell_tokens_apart(arm)
    return metrics


def _tell_tokens_apart(arm: Record) -> None:
    """Give an arm of an older file `tokens_in`, which `tokens_mean` said in every arm."""
    if "tokens_mean" in arm and "tokens_in" not in arm:
        arm["tokens_in"] = arm["tokens_mean"]
        arm["tokens_mean"] = arm.get("between_layers", arm)["tokens_mean"]


def read_lines(path: Path) -> list[Record]:
    """Read the records of a file such as `answers.jsonl`.

    Raises:
        ResultError: it is missing or damaged.
    """
    hint = "; if it is cut short, run the command that wrote it again: it has a log of all answers"
    return [record for _, record in read_jsonl(path, hint=hint, error=ResultError)]


def read_result(path: Path) -> Record:
    """Read a result file, see `Result`.

    Raises:
        ResultError: it is missing or is not one.
    """
    result = read_object(path)
    if result.get("schema_version") not in READABLE:
        known = " or ".join(map(str, READABLE))
        raise ResultError(f"{path} is not a result file of schema version {known}")
    missing = [key for key in Result.__annotations__ if result.get(key) is None]
    if missing:
        raise ResultError(f"{path} lacks {', '.join(missing)}; write it again with --save-result")
    return result


def read_object(path: Path) -> Record:
    """Read a JSON object.

    Raises:
        ResultError: the file is missing or is not one.
    """
    content = read_json(path, error=ResultError)
    if not isinstance(content, dict):
        raise ResultError(f"{path} is not a result file of schema version {SCHEMA_VERSION}")
    return content


_OF_1 = ("method", "budget", "options")


def _setting_of_1(arm: Mapping[str, Any]) -> Record:
    """Convert an arm of schema 1, where an integer budget counts tokens and a float is a share."""
    pruning = None
    if arm["method"] != "none":
        budget, options = arm["budget"], dict(arm.get("options", {}))
        pruning = {"method": arm["method"]}
        if budget is not None:
            pruning["keep_ratio" if isinstance(budget, float) else "keep_tokens"] = budget
        choices = {name: options.pop(name) for name in CHOICES if name in options}
        pruning |= ({"options": options} if options else {}) | choices
    image = {"shuffled-image": "other", "no-image": "absent"}.get(arm.get("arm", ""), "own")
    optional = {key: arm[key] for key in ("label", "control", "unavailable") if arm.get(key)}
    return {"pruning": pruning, "image": image, **optional}


def _arm_of_row(row: Mapping[str, Any]) -> Record:
    """Convert a row of quickstart's `metrics.json` of schema 1."""

    def figure(cell: Mapping[str, Any]) -> Record:
        se = cell["accuracy_se"]
        scaled = {"value": 100 * cell["accuracy"], "se": None if se is None else 100 * se}
        return scaled | {"n": cell["n"], "scale": 100.0}

    arm = _setting_of_1(row)
    if "accuracy" not in row:
        return arm | {"metrics": {}, "answered": 0}
    families = {name: figure(cell) for name, cell in row["families"].items()}
    difference = {"value": row["difference"], "se": row["difference_se"], "n": row["n"]}
    return arm | {
        "metrics": {"accuracy": figure(row), **families},
        "difference": difference,
        "tokens_min": row["tokens_min"],
        "tokens_max": row["tokens_max"],
        "answered": row["n"],
    }
