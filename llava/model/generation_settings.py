"""Settings of `generate`, from generation_config.json and from arguments, by the same rules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from llava.model.checkpoint import read_json_object
from llava.model.config_values import TOKENS, known_tokens
from llava.utils import UserInputError
from llava.value_rules import (
    FLAG,
    TEXT,
    Rule,
    either,
    list_of,
    number,
    one_line,
    one_of,
    read_values,
    unfit,
    whole,
)

GENERATION_FILE = "generation_config.json"
_OR_REMOVE = ", or remove it for the default"
_TOKENS = (*TOKENS, "forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id")
# What a program asks for; a checkpoint that asks for it would surprise the next program.
_OF_A_CALL = ("return_dict_in_generate", "output_attentions", "output_hidden_states")
_OF_A_CALL += ("output_scores", "output_logits", "compile_config", "cache_implementation")
_SHARE = number(0, 1)
_IDS = list_of(whole(0), empty=True)
_NOTHING = one_of(())._replace(wanted="null: prompts with images cannot be read in parts")
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
    **{f"output_{part}": FLAG for part in ("attentions", "hidden_states", "scores", "logits")},
    "return_dict_in_generate": FLAG,
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
    **dict.fromkeys(("prompt_lookup_num_tokens", "prefill_chunk_size"), _NOTHING),
}
# Settings for which None means "not given"; filters of draws are switched off by it.
_UNSET = set(RULES) - {"temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"}


class PublishedGenerationConfig(GenerationConfig):
    """Settings of a checkpoint, which are saved again as they were read.

    Vicuna's has a temperature without do_sample, which transformers would not save.
    """

    def validate(self, strict: bool = False, **kwargs: Any) -> None:
        super().validate(strict=False, **kwargs)


def read_generation_config(
    folder: Path, config: Any, raw_config: Mapping[str, Any]
) -> GenerationConfig:
    """How a checkpoint answers: from generation_config.json, else from what config.json says.

    Args:
        folder: of the checkpoint.
        config: of the model; its tokens are the defaults of those that no file names.
        raw_config: config.json in LLaVA's form, which older checkpoints kept such settings in.

    Raises:
        UserInputError: the file is damaged, or a value cannot be used.
    """
    file = folder / GENERATION_FILE
    try:
        values, place = read_json_object(file), f"in {str(file)!r}"
    except FileNotFoundError:
        place = f"in {str(folder / 'config.json')!r}"
        values = {name: raw_config[name] for name in RULES if name in raw_config}
        values["_from_model_config"] = True
    values = {**{name: getattr(config, name, None) for name in TOKENS}, **values}
    values = {name: value for name, value in values.items() if name not in _OF_A_CALL}
    values = read_values(values, RULES, place, _OR_REMOVE)
    for name in _TOKENS:
        values[name] = known_tokens(name, values.get(name), config.vocab_size, place)
    try:
        return PublishedGenerationConfig(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserInputError(
            f"the settings {place} cannot be used ({one_line(error)}); correct them, or remove "
            "the file for the defaults"
        ) from error


def check_settings(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` with the values they mean.

    Args:
        model: its generation config says what the arguments do not.
        arguments: of `generate`; those that are no settings are kept as they are.

    Raises:
        UserInputError: a value, or two that exclude each other.
    """
    config = arguments.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise unfit("generation_config", config, "of generate", "give a GenerationConfig")
    for name in ("stopping_criteria", "logits_processor"):
        several = arguments.get(name)
        if several is not None and not _are_functions(several):
            raise unfit(name, several, "of generate", "give a list of objects that can be called")
    given = {k: v for k, v in arguments.items() if v is not None or k not in _UNSET}
    read = read_values(given, RULES, "of generate")
    vocabulary = model.get_input_embeddings().num_embeddings
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
    return read


def _are_functions(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(callable, value))


def effective(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """What `generate` goes by: the argument, else its generation_config, else the model's."""
    if arguments.get(name) is not None:
        return arguments[name]
    own = getattr(arguments.get("generation_config"), name, None)
    return own if own is not None else getattr(model.generation_config, name, None)


def check_length(model: Any, arguments: Mapping[str, Any], prompt: int) -> None:
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
