"""What a run is asked to do: a benchmark, a model, and the arms that answer it.

An arm as text is `zoo:directions=32@64`: method, options, budget. A whole number is a budget of
tokens, a number with a point a share of them: `zoo@1` keeps one token, `zoo@1.0` all. Text is read
once, by `parse_arm`, where a user writes it; inside, an arm holds its `PruningConfig`.

What is dropped between layers of the language model follows a `+`: `zoo@192+fastv@64`, where 64 is
a mean over layers; alone it is `fastv@64`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from llava.eval.engine.batches import Plan, chunk_of
from llava.eval.engine.schema import read_object
from llava.eval.tasks.base import Benchmark, Item
from llava.families.spec import ModelSpec
from llava.model.checkpoint import local_checkpoint, read_config
from llava.pruning import PruningConfig, PruningError, parse_options
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.method import DecoderMethod
from llava.pruning.method import PruningMethod
from llava.sampling import Sampling
from llava.utils import UserInputError

UNPRUNED = "none"
JOIN = "+"  # between what is pruned before the language model and between its layers
_JOINT = r"\+(?=[^\W\d_])"  # a letter follows: `1e+3` is a number


@dataclass(frozen=True)
class Arm:
    """A setting with a name in a run.

    Attributes:
        name: unique in a run; in every record.
        pruning: None for the unpruned model.
        label: what tables and plans print.
        image: which image the model is shown: the question's own, another question's, or none.
        control: for an arm that should lose: by its image or by its tokens.
        unavailable: why the arm cannot run, or None.
        floor: the lowest mean of tokens a layer, where the budget is below what a schedule between
            layers can reach.
    """

    name: str
    pruning: PruningConfig | None = None
    label: str = ""
    image: Literal["own", "other", "absent"] = "own"
    control: Literal["image", "tokens"] | None = None
    unavailable: str | None = None
    floor: int | None = None

    @property
    def decoder(self) -> DecoderConfig | None:
        """What is dropped between layers."""
        return None if self.pruning is None else self.pruning.decoder

    @property
    def method(self) -> str:
        """Name of the pruning method; of two, as in `zoo+fastv`."""
        return UNPRUNED if self.pruning is None else method_of(self.pruning)

    @property
    def budget(self) -> int | float | None:
        """Tokens of an image as an integer, or a share of them as a float.

        Where tokens are dropped between layers too, that is the mean over layers.
        """
        own = None if self.decoder is None else budget_of(self.decoder)
        if own is not None or self.pruning is None:
            return own
        return budget_of(self.pruning)

    def seeded(self, seed: int) -> PruningConfig | None:
        """Return the setting, with `seed` where a method draws at random and names no own one."""
        config = self.pruning
        if config is not None and config.decoder is not None and _draws(config.decoder.pruner):
            own = {"seed": seed, **config.decoder.options}
            config = replace(config, decoder=replace(config.decoder, options=own))
        if config is None or not _draws(config.pruner):
            return config
        return replace(config, options={"seed": seed, **config.options})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the name: see `schema.ArmSetting`."""
        names = ("label", "control", "unavailable", "floor")
        optional = {name: getattr(self, name) for name in names}
        pruning = None if self.pruning is None else self.pruning.to_dict()
        given = {name: value for name, value in optional.items() if value}
        return {"pruning": pruning, "image": self.image, **given}


def read_arms(path: Path) -> list[Arm]:
    """Read a JSON file of arms: an object of names to what `Arm.to_dict` returns.

    Raises:
        UserInputError: the file cannot be read, is not of this form, or has a setting that does
            not exist.
    """
    arms = []
    for name, setting in read_object(path).items():
        try:
            arms.append(Arm(name, **{**setting, "pruning": PruningConfig.read(setting["pruning"])}))
        except UserInputError as error:
            raise UserInputError(f"{path}, arm {name!r}: {error}") from error
        except (TypeError, KeyError) as error:
            raise UserInputError(
                f"{path}, arm {name!r}: write an object with the key `pruning`, as in run.json"
            ) from error
    return arms


def arm_of(config: PruningConfig | None) -> Arm:
    """Name a setting, such as the one that a checkpoint was saved with, as `--arm` would."""
    if config is None or method_of(config) == UNPRUNED:
        return Arm(UNPRUNED, label="the unpruned model")
    before, decoder = _before(config), config.decoder
    if decoder is None:
        return Arm(before, config, label_of(config))
    after = arm_word(decoder.method, budget_of(decoder), decoder.options)
    return Arm(join_words(before, after), config, label_of(config))


def _before(config: PruningConfig) -> str:
    """Write what is pruned before the language model, `none` if nothing is."""
    budget = None if config.method == UNPRUNED else budget_of(config)
    return arm_word(config.method, budget, {**config.options, **config.choices})


def join_words(before: str, after: str) -> str:
    """Join an arm's text for before the language model with that for between its layers."""
    return after if before == UNPRUNED else f"{before}{JOIN}{after}"


def saved_pruning(path: str | Path) -> PruningConfig | None:
    """Return the setting that a checkpoint, in a folder or on the hub, was saved with."""
    saved = read_config(local_checkpoint(path)).get("mm_token_pruning")
    return None if saved is None else PruningConfig.from_dict(saved)


def parse_arm(word: str) -> Arm:
    """Read `none`, `zoo@64`, `zoo@0.1`, `zoo:directions=32,fusion=sum@64` or `zoo@192+fastv@64`.

    Raises:
        PruningError: a setting that is not written so, or does not exist.
    """
    before, *after = _split(word, _JOINT)
    if before == UNPRUNED and len(after) == 1:
        word = after[0]  # one setting has one name
    if len(after) > 1:
        raise PruningError(
            f"arm {word!r} has {len(after)} parts behind a {JOIN}; write one method before the "
            f"language model and one between its layers, such as zoo@192{JOIN}fastv@64"
        )
    method, budget, options = split_word(before)
    decoder = make_decoder(*split_word(after[0])) if after else None
    return make_arm(word, method, budget, options, decoder)


def make_decoder(
    method: str, budget: int | float | None, options: Mapping[str, Any]
) -> DecoderConfig:
    """Make what is dropped between layers, of the same parts as an arm.

    Raises:
        PruningError: a setting that does not exist.
    """
    kind: dict[str, Any] = {_kind(budget): budget}
    return DecoderConfig(method, **kind, options=options)


def make_arm(
    name: str,
    method: str,
    budget: int | float | None,
    options: Mapping[str, Any],
    decoder: DecoderConfig | None = None,
) -> Arm:
    """Make an arm of a method's name, its budget (a float is a share) and options with CHOICES.

    Args:
        name: of the arm.
        method, budget, options: of what is pruned before the language model; the method may be one
            that prunes between its layers, where `decoder` is None.
        decoder: what is dropped between layers.

    Raises:
        PruningError: a setting that does not exist.
    """
    if method == UNPRUNED and (budget is not None or (options and decoder is None)):
        raise PruningError(f"{name}: the unpruned model takes no options and no budget")
    if method == UNPRUNED and decoder is None:
        return arm_of(None)
    config = PruningConfig.of(method, **{_kind(budget): budget}, decoder=decoder, **options)
    return Arm(name, config, label_of(config))


def split_word(word: str) -> tuple[str, int | float | None, dict[str, Any]]:
    """Split an arm's text into method, budget and options.

    Values of options may be JSON, with commas and `@` in quotes or brackets:
    `cen-prune:host=zoo,host_options={"directions": 32, "step": 0.1}@64`.

    Raises:
        PruningError: it is not written so.
    """
    *head, budget = _split(word, "@")
    if not head:
        head, budget = [word], ""
    method, _, options = "@".join(head).partition(":")
    pairs = _split(options, ",") if options else []
    try:
        number = None if not budget else int(budget) if budget.isdecimal() else float(budget)
        if isinstance(number, float) and number > 1:
            raise ValueError("neither a whole number nor a share")
    except ValueError as error:
        raise PruningError(
            f"arm {word!r}: {budget!r} is not a budget; give a number of tokens such as 64, or a "
            "share such as 0.1"
        ) from error
    return method, number, parse_options(pairs)


def arm_word(method: str, budget: int | float | None, options: Mapping[str, Any]) -> str:
    """Write an arm's name, which `split_word` reads as just these three: `zoo:fusion=sum@64`."""
    words = spell_options(options)
    word = f"{method}:{words}" if words else method
    return word if budget is None else f"{word}@{budget}"


def spell_options(options: Mapping[str, Any]) -> str:
    """Write `directions=32,fusion=sum`; values that would be read as others become JSON."""
    return ",".join(_spelled(options))


def budget_of(config: PruningConfig | DecoderConfig) -> int | float | None:
    """Return `keep_tokens`, an integer, or `keep_ratio`, a float."""
    return config.keep_tokens if config.keep_ratio is None else config.keep_ratio


def method_of(config: PruningConfig) -> str:
    """Name the methods of a setting: `none`, `zoo`, `fastv` or `zoo+fastv`."""
    if config.decoder is None:
        return config.method
    return join_words(config.method, config.decoder.method)


def label_of(config: PruningConfig) -> str:
    """Describe a setting: `zoo, directions=32, 64 tokens`.

    What is dropped between layers follows: `zoo, 192 tokens; fastv, 64 tokens a layer`.
    """
    words = [config.method, *_spelled({**config.options, **config.choices})]
    if config.keep_ratio is not None:
        words.append(f"{100 * config.keep_ratio:g} % of the tokens")
    elif config.keep_tokens is not None:
        words.append(f"{config.keep_tokens} tokens")
    decoder, parts = config.decoder, [", ".join(words)]
    if decoder is not None:
        words = [decoder.method, *_spelled(decoder.options)]
        if decoder.keep_ratio is not None:
            words.append(f"{100 * decoder.keep_ratio:g} % of the tokens a layer")
        elif decoder.keep_tokens is not None:
            words.append(f"{decoder.keep_tokens} tokens a layer")
        parts.append(", ".join(words))
    return "; ".join(part for part in parts if part != UNPRUNED)


def _spelled(options: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_spell(value)}" for key, value in options.items()]


def _kind(budget: int | float | None) -> str:
    return "keep_ratio" if isinstance(budget, float) else "keep_tokens"


def _draws(method: PruningMethod | DecoderMethod) -> bool:
    return any(option.name == "seed" for option in fields(method))


def _spell(value: Any) -> str:
    text, as_json = str(value), json.dumps(value)
    if not set(text) & set('"[]{},@') and not re.search(_JOINT, text):
        (read,) = parse_options([f"value={text}"]).values()
        if json.dumps(read) == as_json:
            return text
    return as_json


def _split(text: str, separator: str) -> list[str]:
    """Split `text` at every separator outside quotes and brackets, as JSON has them.

    Text that leaves one open is split at every separator.

    Args:
        text: an arm's text, or a part of it.
        separator: a pattern that matches one letter.
    """
    places = {match.start() for match in re.finditer(separator, text)}
    parts, depth, quoted, escaped = [""], 0, False, False
    for place, letter in enumerate(text):
        if place in places and not depth and not quoted:
            parts.append("")
            continue
        parts[-1] += letter
        if quoted:
            quoted = escaped or letter != '"'
            escaped = letter == "\\" and not escaped
        elif letter == '"':
            quoted = True
        else:
            depth += (letter in "[{") - (letter in "]}")
    return re.split(separator, text) if quoted or depth else parts


@dataclass(frozen=True)
class RunRequest:
    """One run: every arm answers the same items of a benchmark.

    Attributes:
        benchmark: with its root, prompt protocol and reading of pictures.
        model: the checkpoint.
        arms: in the order of tables; those that the model cannot run are found out later.
        sampling: how answers are drawn.
        output: folder of the run's files.
        batch_size: items per batch.
        limit: ask the first items only; 0 asks all.
        num_chunks, chunk_idx: ask one of so many consecutive parts of them.
        seed: of methods and decoding that draw at random.
        workers: processes that read images ahead; 0 for none.
        command: how the user called the program, for `run.json`.
    """

    benchmark: Benchmark
    model: ModelSpec
    arms: tuple[Arm, ...]
    sampling: Sampling
    output: Path
    batch_size: int = 8
    limit: int = 0
    num_chunks: int = 1
    chunk_idx: int = 0
    seed: int = 0
    workers: int = 4
    command: str = ""

    @property
    def template(self) -> str:
        """The template: that of the flags, of LLaVA's evaluation, or the checkpoint's own."""
        return self.model.evaluation_template

    @property
    def prompted_model(self) -> ModelSpec:
        """The checkpoint, asked with `template`."""
        return self.model.asked_in(self.template)

    def items(self) -> list[Item]:
        """Return the items to ask, in published order.

        Raises:
            UserInputError: the chunk does not exist.
        """
        items = self.benchmark.items()[: self.limit or None]
        return chunk_of(items, self.num_chunks, self.chunk_idx)

    def plan(self) -> Plan:
        """Put the items into batches.

        Raises:
            UserInputError: there is nothing to ask.
        """
        items = self.items()
        if not items and self.num_chunks > 1:
            raise UserInputError(
                f"chunk {self.chunk_idx} of {self.num_chunks} is empty: the chunks before it have "
                "all items; use fewer chunks"
            )
        return Plan.of(items, self.batch_size)

    def settings(self) -> dict[str, Any]:
        """Return every setting that can change an answer, without the items."""
        return {
            "task": self.benchmark.name,
            "protocol": self.benchmark.protocol,
            "arms": {
                arm.name: {"pruning": arm.pruning and arm.pruning.to_dict(), "image": arm.image}
                for arm in self.arms
            },
            "batch_size": self.batch_size,
            "seed": self.seed,
            "template": self.template,
            "pixels": self.benchmark.pixels,
            "loading": self.model.loading,
            "sampling": asdict(self.sampling),
        }
