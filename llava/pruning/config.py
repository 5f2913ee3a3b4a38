"""PruningConfig: which method, how many tokens, which options. Plain JSON in and out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llava.pruning.budgets import BUDGETS, check_count, check_share
from llava.pruning.decoder.config import DecoderConfig
from llava.pruning.decoder.registry import DECODER_METHODS
from llava.pruning.errors import PruningError
from llava.pruning.method import PruningMethod
from llava.pruning.precision import COMPUTE
from llava.pruning.proportions import share_in_proportion
from llava.pruning.registry import get_method, make_method
from llava.registry import unknown


class Choice(NamedTuple):
    """The values that a setting takes, the default first, and what they mean."""

    values: tuple[str, ...]
    summary: str


# Settings of the stage, for every method: flags, chat and saved settings know them from here.
CHOICES = {
    "allocation": Choice(("per_tile", "global"), "choose in every tile, or in the whole image"),
    "newline": Choice(
        ("drop", "keep", "select"),
        "newline tokens of LLaVA-1.6: leave out, keep with their rows, or choose like patches",
    ),
    "positions": Choice(("compact", "original"), "number kept tokens 0, 1, ..., or as unpruned"),
    "scope": Choice(
        ("image", "prompt"), "the budget is of every image, or of all images of a prompt together"
    ),
    "compute": Choice(COMPUTE, "precision of the largest products behind scores"),
}
# Those that mean the same for tokens that are merged.
_OF_MERGING = ("compute", "scope")
# Words of other tools. The first two say what is removed, we say what is kept.
ALIASES = ("pruning_ratio", "reduction_ratio", "visual_token_num")


@dataclass(frozen=True)
class PruningConfig:
    """One pruning setting, checked when it is made.

    Attributes:
        method: a registered name, see `list_methods()`.
        keep_tokens: visual tokens of one image that reach the language model, >= 1.
        keep_ratio: alternatively, a share in (0, 1] of the image's own tokens: an image of N
            tokens keeps round(keep_ratio * N), at least 1.
        options: options of the method, by field name of its class.
        allocation: for images of several tiles (LLaVA-1.6). "per_tile" shares the budget out
            among the tiles; "global" selects among all tokens of the image at once.
        newline: what to do with the newline tokens of LLaVA-1.6 in a pruned image. "drop" removes
            them; "keep" keeps those of rows that still have a patch, within the budget; "select"
            lets them compete with the patches, as DivPrune's released code does (with "global",
            and for methods that do not score tokens).
        positions: "compact" numbers the kept sequence 0, 1, ...; "original" leaves every token at
            its position in the unpruned sequence.
        scope: what the budget is of. "image": every image. "prompt": all images of one prompt
            together, in proportion to their tokens and at least 1 each.
        compute: precision of the largest products behind scores; "auto" goes by the model's type
            and by what the device multiplies fast, see `llava.pruning.precision`.
        decoder: what is dropped later, between layers of the language model; None for nothing.

    Exactly one budget is required (`none` needs no budget).

    Raises:
        PruningError: no budget or two, an unknown method or option, or settings that do not go
            together.
    """

    method: str = "none"
    keep_tokens: int | None = None
    keep_ratio: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    allocation: str = "per_tile"
    newline: str = "drop"
    positions: str = "compact"
    scope: str = "image"
    compute: str = "auto"
    decoder: DecoderConfig | None = None
    pruner: PruningMethod = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        cls = get_method(self.method)
        object.__setattr__(self, "decoder", DecoderConfig.read(self.decoder))
        object.__setattr__(self, "options", _mapping("options", self.options))
        object.__setattr__(self, "pruner", make_method(self.method, self.options))
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) == 2:
            raise PruningError("give keep_tokens or keep_ratio, not both")
        if not given and cls.budgeted:
            raise PruningError(f"{self.method!r} needs keep_tokens= or keep_ratio=")
        if self.keep_tokens is not None:
            object.__setattr__(self, "keep_tokens", check_count(self.keep_tokens))
        if self.keep_ratio is not None:
            object.__setattr__(self, "keep_ratio", check_share("keep_ratio", self.keep_ratio))
        self._check_choices()

    def _check_choices(self) -> None:
        for name, (values, _) in CHOICES.items():
            value = getattr(self, name)
            if value not in values:
                raise PruningError(unknown(name, value, values))
            if self.pruner.merges and name not in _OF_MERGING and value != values[0]:
                raise PruningError(
                    f"{self.method!r} makes new tokens, so {name} can only be {values[0]!r}; for "
                    f"{value!r} use a method that selects"
                )
        if self.pruner.needs_grid and self.allocation == "global":
            raise PruningError(
                f"{self.method!r} with these options goes by the rows and columns of a tile, so "
                "allocation can only be 'per_tile'"
            )
        if self.newline == "select" and self.allocation != "global":
            raise PruningError("newline='select' needs allocation='global': no tile owns newlines")

    @property
    def choices(self) -> dict[str, str]:
        """The settings of CHOICES that differ from their defaults."""
        values = {name: getattr(self, name) for name in CHOICES}
        return {name: v for name, v in values.items() if v != CHOICES[name].values[0]}

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def num_kept(self, n: int, patches: int | None = None) -> int:
        """Count the tokens that an image of `n` tokens keeps: a pure function, no features needed.

        Args:
            n: tokens of the unpruned image.
            patches: how many of them are patches, the others being newlines; all by default.
        """
        kept = self.pruner.num_kept(n, self._budget(n))
        if patches is None or kept >= n or self.newline != "drop":
            return kept
        return min(kept, patches)

    def num_kept_of_prompt(
        self, lengths: Sequence[int], patches: Sequence[int] | None = None
    ) -> list[int]:
        """Count the tokens that every image of one prompt keeps, as `num_kept` does of an image.

        Args:
            lengths: tokens of every unpruned image.
            patches: how many of each are patches; all by default.

        Raises:
            PruningError: fewer tokens than images are to be shared (`scope="prompt"`).
        """
        patches = lengths if patches is None else patches
        if self.scope == "image" or not self.pruner.budgeted:
            return [self.num_kept(n, own) for n, own in zip(lengths, patches, strict=True)]
        every, images = sum(lengths), [i for i, n in enumerate(lengths) if n > 0]
        total = self._budget(every)
        if total >= every:
            return [*lengths]
        if self.keep_ratio is not None:
            total = max(total, len(images))
        if total < len(images):
            raise PruningError(
                f"keep_tokens={total} is too small for the {len(images)} images of a prompt, which "
                f"share it with scope='prompt'; keep at least {len(images)}, one for each"
            )
        most = patches if self.newline == "drop" else lengths
        shares = share_in_proportion(total, [lengths[i] for i in images], [most[i] for i in images])
        kept = [0] * len(lengths)
        for image, share in zip(images, shares, strict=True):
            kept[image] = self.pruner.num_kept(lengths[image], share)
        return kept

    def _budget(self, n: int) -> int:
        """Return the budget of `n` tokens, which may be more than they are."""
        if self.keep_tokens is not None:
            return self.keep_tokens
        return n if self.keep_ratio is None else max(1, round(self.keep_ratio * n))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON, such that `from_dict(config.to_dict()) == config`."""
        data: dict[str, Any] = {"method": self.method}
        for name in BUDGETS:
            if getattr(self, name) is not None:
                data[name] = getattr(self, name)
        if self.options:
            data["options"] = dict(self.options)
        if self.decoder is not None:
            data["decoder"] = self.decoder.to_dict()
        return data | self.choices

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningConfig:
        """Read `to_dict()` output, or the same with another tool's budget word (one warning)."""
        allowed = ("method", *BUDGETS, "options", *CHOICES, "decoder", *ALIASES)
        for key in _mapping("a pruning setting", data):
            if key not in allowed:
                raise PruningError(unknown("pruning setting", key, allowed))
        options: Any = {} if data.get("options") is None else data["options"]
        choices = {name: data[name] for name in (*CHOICES, "decoder") if name in data}
        return cls(data.get("method", "none"), **_budget(data), options=options, **choices)

    @classmethod
    def read(cls, value: Any) -> PruningConfig | None:
        """Read a setting as users write it: a PruningConfig, its dict form, or None for no pruning.

        Raises:
            PruningError: it is anything else.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise PruningError(
            "pruning must be a PruningConfig, its dict form such as {'method': 'zoo', "
            f"'keep_tokens': 64}}, or None; got {value!r}"
        )

    @classmethod
    def of(cls, method: str, **settings: Any) -> PruningConfig:
        """Make a setting from keywords: `PruningConfig.of("zoo", keep_tokens=64, seed=1)`.

        A decoder method may be named too: `PruningConfig.of("fastv", keep_tokens=64)` prunes inside
        the language model alone.
        """
        words = (*BUDGETS, *CHOICES, "decoder", *ALIASES)
        own = {key: settings.pop(key) for key in words if key in settings}
        if not isinstance(method, str) or method not in DECODER_METHODS.entries():
            return cls.from_dict({"method": method, "options": settings, **own})
        if own.get("decoder") is not None:
            raise PruningError(f"{method!r} is a decoder method itself; leave decoder= out")
        choices = {key: own[key] for key in CHOICES if key in own}
        inner = {"method": method, "options": settings, **_budget(own)}
        return cls(decoder=DecoderConfig.read(inner), **choices)


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Read options: `["directions=32", "fusion=sum"]` -> `{"directions": 32, "fusion": "sum"}`.

    A value is read as JSON where it is JSON (numbers, true, false, null), as `None`/`True`/`False`
    in Python's spelling, otherwise as text.

    Raises:
        PruningError: an item without `=`, or a key given twice.
    """
    python_words = {"None": None, "True": True, "False": False}
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise PruningError(f"an option is written key=value, got {pair!r}")
        if key in options:
            raise PruningError(f"option {key!r} is given twice")
        if text in python_words:
            options[key] = python_words[text]
            continue
        try:
            options[key] = json.loads(text)
        except (ValueError, RecursionError):  # not JSON, or too deeply nested to be read
            options[key] = text
    return options


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise PruningError(f"{name} must be a mapping of names to values, got {value!r}")
    return dict(value)


def _budget(data: Mapping[str, Any]) -> dict[str, Any]:
    """Read the budget in `data`, in our own words or converted from other tools' words."""
    words = [key for key in (*BUDGETS, *ALIASES) if data.get(key) is not None]
    if len(words) > 1:
        raise PruningError(f"give one budget, got {' and '.join(words)}")
    if not words or words[0] in BUDGETS:
        return {key: data[key] for key in words}
    (word,) = words
    value = data[word]
    if word == "visual_token_num":
        budget: dict[str, Any] = {"keep_tokens": check_count(value, word)}
    else:
        # The share removed is in [0, 1), so the share kept is in (0, 1].
        budget = {"keep_ratio": 1.0 - check_share(word, value, removed=True)}
    ((ours, kept),) = budget.items()
    warnings.warn(f"{word}={value} read as {ours}={kept:g}", stacklevel=4)
    return budget
