"""What LLaVA's own form of a checkpoint in Hugging Face's form holds."""

from pathlib import Path

from llava.conversation import conv_mode_for
from llava.model.checkpoint import native_name
from llava.model.convert.source import VOCABULARY_TABLES, Source
from llava.model.convert.tokens import copy_without_image_token
from llava.model.convert.weights import Weight
from llava.model.generation import read_generation_config
from llava.model.hugging_face import OWN_VOCABULARY
from llava.value_rules import unfit, whole

# Hugging Face's names of models may lack what LLaVA chooses a template by ("v1", "mistral").
_NAMELESS = conv_mode_for("")
_TEMPLATES = {"llava_llama": "llava_v1", "llava_mistral": "mistral_instruct"}


class ToNative:
    """The files of a checkpoint in LLaVA's own form.

    Tokens that a conversion to Hugging Face's form had added are left out again.

    Args:
        source: in Hugging Face's form.
        name: of the model, which chooses its conversation template where the config does not; a
            name that says nothing stands for that of LLaVA-1.5, or of Mistral.

    Raises:
        UserInputError: `mm_vocab_size` is not a number of tokens of this model.
    """

    def __init__(self, source: Source, name: str) -> None:
        self.source, self.config = source, source.config
        mode, own = conv_mode_for(name, source.config), getattr(source.config, "mm_conv_mode", None)
        if own is None and mode == _NAMELESS:
            mode = _TEMPLATES[source.config.model_type]
        self.config.mm_conv_mode = mode
        self.own = _own_vocabulary(source)
        if self.own is not None:
            self.config.vocab_size = self.own

    def weights(self) -> list[Weight]:
        """List the weights to write."""
        weights = []
        for name, stored in self.source.weights.items():
            rows = self.own if name in VOCABULARY_TABLES else None
            weights.append(Weight(native_name(name), stored.file, stored.key, stored.value, rows))
        return weights

    def write_settings(self, folder: Path) -> None:
        """Write all that is not weights."""
        self.config.save_pretrained(folder)
        answers = read_generation_config(self.source.folder, self.config)
        if self.own is not None and answers.suppress_tokens is not None:
            kept = [token for token in answers.suppress_tokens if token < self.own]
            answers.suppress_tokens = kept or None
        answers.save_pretrained(folder)
        padding = getattr(self.config, "tokenizer_padding_side", None) or "right"
        copy_without_image_token(self.source.folder, folder, self.own, padding)
        # The name may be that of a model on the hub; with its description here nobody has to ask.
        self.source.tower.save_description(folder / self.config.mm_vision_tower)


def _own_vocabulary(source: Source) -> int | None:
    """Read how many tokens the model had before a conversion; None if it never had fewer."""
    given = source.raw.get(OWN_VOCABULARY)
    if given is None:
        return None
    try:
        return int(whole(1, source.config.vocab_size).read(given))
    except (ValueError, TypeError) as error:
        remedy = f"give the number of tokens without <image>, at most {source.config.vocab_size}"
        raise unfit(OWN_VOCABULARY, given, f"in config.json of {source.folder}", remedy) from error
