"""What `generate` takes: settings of files and arguments, by the same rules; rows one by one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from llava.model.checkpoint import read_config, read_json_object
from llava.model.checks import check_questions, check_sizes
from llava.model.config_values import TOKENS, known_tokens
from llava.model.hugging_face import native_form
from llava.model.splice import share_images, unpadded
from llava.model.types import GenerativeModel, Images, VisualModel
from llava.pruning.active import holding
from llava.utils import UserInputError
from llava.value_rules import (
    FLAG,
    TEXT,
    Rule,
    either,
    library_errors,
    list_of,
    number,
    one_of,
    read_values,
    unfit,
    whole,
)

GENERATION_FILE = "generation_config.json"
_OR_REMOVE = ", or remove it for the default"
_TOKENS = (*TOKENS, "forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id")
_OUTPUTS = (
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
)
# What a program asks for; a checkpoint that asks for it would surprise the next program.
_OF_A_CALL = (*_OUTPUTS, "compile_config", "cache_implementation")
# Arguments of `generate` that hold all rows, or are told which row they are asked about.
_OF_A_BATCH = (
    "streamer",
    "position_ids",
    "return_dict_in_generate",
    "past_key_values",
    "prefix_allowed_tokens_fn",
)
_SHARE = number(0, 1)
_IDS = list_of(whole(0), empty=True)
RULES: dict[str, Rule] = {
    "max_length": whole(1),
    "max_new_tokens": whole(1),
    "min_length": whole(0),
    "min_new_tokens": whole(0),
    "max_time": number(0, above=True),
    "stop_strings": either(TEXT, list_of(TEXT)),
    **dict.fromkeys(
        ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), FLAG
    ),
    **dict.fromkeys(_OUTPUTS, FLAG),
    "num_beams": whole(1, 1024),
    "num_return_sequences": whole(1, 1024),
    "early_stopping": either(FLAG, one_of(("never",))),
    "temperature": number(0),
    "top_k": whole(0),
    **dict.fromkeys(("top_p", "min_p", "top_h", "typical_p"), _SHARE),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), _SHARE),
    "repetition_penalty": number(0, above=True),
    "length_penalty": number(-1000, 1000),
    "no_repeat_ngram_size": whole(0),
    "bad_words_ids": list_of(list_of(whole(0))),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _IDS),
    "exponential_decay_length_penalty": list_of(number(-1000, 1000), length=2),
    "guidance_scale": number(0),
}
# Settings for which None means "not given"; filters of draws are switched off by it.
_UNSET = set(RULES) - {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"}

_ASSISTED = "assisted decoding is not supported"
_GONE = "transformers no longer decodes in this way"
_READS_IDS = "it reads the ids of a prompt, and a prompt with images is made of embeddings"
_NEEDS_PACKAGE = "this cache needs a package that is not installed, optimum-quanto or hqq"


def _that(wanted: str, fits: Callable[[Any], bool]) -> Rule:
    """Make a rule for an object that `fits`, taken as it is."""

    def read(value: Any) -> Any:
        if not fits(value):
            raise TypeError
        return value

    return Rule(wanted, read)


def _are_functions(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(callable, value))


def _is_streamer(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("put", "end"))


# Arguments of `generate` that no file can hold.
_OBJECTS = {
    "generation_config": _that("a GenerationConfig", lambda v: isinstance(v, GenerationConfig)),
    "past_key_values": _that("a cache such as DynamicCache()", lambda v: isinstance(v, Cache)),
    "prefix_allowed_tokens_fn": _that("a function", callable),
    "streamer": _that("a streamer such as transformers' TextStreamer", _is_streamer),
    **dict.fromkeys(
        ("stopping_criteria", "logits_processor"),
        _that("a list of objects that can be called", _are_functions),
    ),
}


class PublishedGenerationConfig(GenerationConfig):
    """Settings of a checkpoint, which are saved again as they were read.

    Vicuna's has a temperature without do_sample, which transformers would not save.
    """

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        super().validate(strict=False, user_set_attributes=user_set_attributes)


def read_generation_config(folder: Path, config: Any) -> GenerationConfig:
    """Read how a checkpoint answers: from generation_config.json, else from config.json.

    Args:
        folder: of the checkpoint.
        config: of the model; its tokens are the defaults of those that no file names.

    Raises:
        UserInputError: the file is damaged, or a value cannot be used.
    """
    file = folder / GENERATION_FILE
    if file.is_file():
        values, place = read_json_object(file), f"in {str(file)!r}"
    else:
        place = f"in {str(folder / 'config.json')!r}"
        older = native_form(read_config(folder), str(folder))  # where older checkpoints kept them
        values = {name: older[name] for name in RULES if name in older}
        values["_from_model_config"] = True
    values = {**{name: getattr(config, name, None) for name in TOKENS}, **values}
    values = {name: value for name, value in values.items() if name not in _OF_A_CALL}
    values = read_values(values, RULES, place, _OR_REMOVE)
    for name in _TOKENS:
        values[name] = known_tokens(name, values.get(name), config.vocab_size, place)
    what = f"the settings {place} cannot be used"
    remedy = "correct them, or remove the file for the defaults"
    with library_errors(what, remedy, (ValueError, TypeError, AttributeError)):
        return PublishedGenerationConfig(**values)


def check_settings(model: VisualModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `generate` with the values they mean.

    Args:
        model: its generation config says what the arguments do not.
        arguments: of `generate`; those that are not settings are kept as they are.

    Raises:
        UserInputError: a value, or two that exclude each other.
    """
    given = {k: v for k, v in arguments.items() if v is not None or k not in _UNSET}
    read = read_values(given, {**RULES, **_OBJECTS}, "of generate")
    vocabulary = model.get_model().embed_tokens.num_embeddings
    for name in _TOKENS:
        if read.get(name) is not None:
            read[name] = known_tokens(name, read[name], vocabulary, "of generate")
    chosen = {name: effective(model, read, name) for name in RULES}
    read_values(chosen, RULES, "of generate")
    beams, answers = chosen["num_beams"] or 1, chosen["num_return_sequences"] or 1
    if chosen["do_sample"]:
        if chosen["temperature"] == 0:
            raise unfit("temperature", 0, "of generate", "set do_sample=False for greedy answers")
    elif answers > beams:
        remedy = f"without do_sample there is one for each beam, so give num_beams={answers}"
        raise unfit("num_return_sequences", answers, "of generate", remedy)
    setting = partial(effective, model, read)
    for name, reason in unusable_settings(setting, model.device.type):
        raise unfit(name, setting(name), "of generate", f"leave it out: {reason}")
    return read


def unusable_settings(setting: Callable[[str], Any], device: str) -> Iterator[tuple[str, str]]:
    """Find the settings that cannot be carried out for prompts with images, and say why.

    transformers would refuse some later, with the model left changed.

    Args:
        setting: returns what a call of `generate` is told under a name; None for nothing.
        device: kind of device that the model is on.
    """
    beams = setting("num_beams") not in (None, 1)
    contrastive = not (beams or setting("do_sample") or setting("top_k") == 1)
    cache = setting("cache_implementation")
    offloaded = str(cache).startswith("offloaded") and device != "cuda"
    quantized = cache == "quantized" and not (is_optimum_quanto_available() or is_hqq_available())
    from_hub = isinstance(setting("custom_generate"), str)
    # A setting, its values that ask for nothing, whether any other counts in this call, and why.
    table: tuple[tuple[str, tuple[float, ...], bool, str], ...] = (
        ("assistant_model", (), True, _ASSISTED),
        ("prompt_lookup_num_tokens", (), True, _ASSISTED),
        ("assistant_early_exit", (), True, _ASSISTED),
        ("use_mtp", (False,), True, _ASSISTED),
        ("is_assistant", (False,), True, _ASSISTED),
        ("constraints", (), True, _GONE),
        ("force_words_ids", (), True, _GONE),
        ("dola_layers", (), not beams, _GONE),
        ("penalty_alpha", (0,), contrastive, _GONE),
        ("num_beam_groups", (0, 1), beams, _GONE),
        ("low_memory", (False,), beams, _GONE),
        ("guidance_scale", (1,), True, _READS_IDS),
        ("token_healing", (False,), True, _READS_IDS),
        ("prefill_chunk_size", (), True, _READS_IDS),
        ("custom_generate", (), from_hub, "code from the hub is not run"),
        ("cache_implementation", (), offloaded, "this cache needs CUDA"),
        ("cache_implementation", (), quantized, _NEEDS_PACKAGE),
    )
    for name, harmless, counts, reason in table:
        value = setting(name)
        if counts and value is not None and value not in harmless:
            yield name, reason


def effective(model: VisualModel, arguments: Mapping[str, Any], name: str) -> Any:
    """Return what `generate` uses: the argument, else its generation_config, else the model's."""
    if arguments.get(name) is not None:
        return arguments[name]
    own = getattr(arguments.get("generation_config"), name, None)
    return own if own is not None else getattr(model.generation_config, name, None)


def check_length(model: VisualModel, arguments: Mapping[str, Any], prompt: int) -> None:
    """Refuse a `max_length` that leaves no room for an answer.

    Args:
        model: its generation config says what the arguments do not.
        arguments: of `generate`.
        prompt: tokens of the longest prompt, those of its images included.

    Raises:
        UserInputError: names both lengths.
    """
    longest = effective(model, arguments, "max_length")
    if longest is None or effective(model, arguments, "max_new_tokens") is not None:
        return
    if longest <= prompt:
        raise UserInputError(
            f"max_length={longest} counts the prompt too, which has {prompt} tokens with its "
            f"images; give max_new_tokens={longest} for so many new tokens, or a max_length above "
            f"{prompt}"
        )


def generate_rows(
    model: GenerativeModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    images: Images | None,
    image_sizes: Sequence[tuple[int, int]] | None,
    questions: Sequence[str] | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Call `model.generate` with one row after the other, each as if it had been alone.

    Products of a batch are rounded in another order than those of a row, so that tokens with nearly
    equal scores may change places. Here nothing of one row takes part in another.

    Returns:
        int64 [B, new], rows that ended early padded on the right; several a prompt where
        `num_return_sequences` asks for them.

    Raises:
        UserInputError: what belongs to a batch as a whole (a streamer, a cache, ...); images, their
            sizes or questions that do not match the rows.
    """
    for name in _OF_A_BATCH:
        value = effective(model, kwargs, name)
        if value is not None and value is not False:
            raise UserInputError(
                f"{name} belongs to a batch as a whole, and strict=True runs its rows one by one; "
                "leave one of the two out"
            )
    rows = unpadded(input_ids, attention_mask)
    if questions is not None:
        check_questions(questions, len(rows), "prompts")
    count = 0 if images is None else len(images)
    sizes = None if images is None else check_sizes(image_sizes, count)
    new = []
    with holding(model):  # one setting for all rows
        for number, share in enumerate(share_images(rows, count)):
            own = slice(share.start, share.stop)
            output = model.generate(
                rows[number][None],
                images=images[own] if images is not None and len(share) else None,
                image_sizes=None if sizes is None else sizes[own],
                questions=None if questions is None else [questions[number]],
                **kwargs,
            )
            new.extend(output)
    return pad_sequence(new, batch_first=True, padding_value=_padding(model, kwargs))


def _padding(model: VisualModel, kwargs: dict[str, Any]) -> int:
    """Return what `generate` fills up rows with that have ended."""
    for name in ("pad_token_id", "eos_token_id"):
        value = kwargs[name] if name in kwargs else effective(model, kwargs, name)
        if value is not None:
            return value[0] if isinstance(value, list) else int(value)
    return 0
