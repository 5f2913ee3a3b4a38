"""Changed settings files: the right answer or one line, never a traceback, never another answer.

The tables below say what every change must do. `same`: the answer of the unchanged checkpoint, bit
for bit, because the change restores a default, says the same in another way, or is about something
that has no part in answers. `other`: another answer, for the reason next to it
(`test_old_configs` compares some of these with the setting applied by hand). Whatever is not in the
tables must be refused with one line.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from config_changes import CHECKPOINTS, Answer, Change, answer, changes, write

from llava.utils import UserInputError


@dataclass(frozen=True)
class Expect:
    """Names of changes (see `config_changes`), separated by `|`; `all` of them."""

    same: str = ""
    other: str = ""
    why: str = ""

    def outcome(self, how: str) -> str:
        if self.same == "all" or how in self.same.split("|"):
            return "same"
        return "other" if how in self.other.split("|") else "refused"


NO_PART = Expect(same="all")
SIZE = Expect(same="as float")  # a missing one is transformers' default, not that of the weights
DERIVED_SIZE = Expect(same="delete|null|as float")
OFF = Expect(same="delete|null|0")  # flags that are off unless they are set
OFF_WITHOUT_EFFECT = Expect(same="delete|null|0|1|true")
WORD = Expect(same="delete|null")
TOKEN = Expect(same="delete|null|-1|0|1|huge|as float|more|double")
ENDS = Expect(same="delete|null|-1|0|1|huge|[]|[1]|in a list|as float|more|double")
COUNT = Expect(same="delete|null|-1|0|1|huge|as float|more|double")
LAYER = Expect("delete|null", "-1|0|1|more|double", "another layer of the tower")
EPSILON = Expect("delete|null", "0", "norms divide by a little less")
DROPOUT = Expect(same="delete|null|-1|0|1|huge|0.5|-0.5|nan|inf")  # nothing is dropped in answers

LANGUAGE_MODEL = {
    "attention_bias": OFF,
    "attention_dropout": DROPOUT,
    "bos_token_id": TOKEN,
    "eos_token_id": ENDS,
    "head_dim": DERIVED_SIZE,
    "hidden_act": WORD,
    "hidden_size": SIZE,
    "initializer_range": Expect(same="delete|null|0|1|0.5"),
    "intermediate_size": SIZE,
    "max_position_embeddings": COUNT,
    "mlp_bias": OFF,
    "num_attention_heads": SIZE,
    "num_hidden_layers": SIZE,
    "num_key_value_heads": DERIVED_SIZE,
    "pad_token_id": TOKEN,
    "pretraining_tp": COUNT,
    "rms_norm_eps": EPSILON,
    # The weights of both tables are there, and they win.
    "tie_word_embeddings": OFF_WITHOUT_EFFECT,
    "use_cache": Expect(same="delete|null|0|1|false"),
    "vocab_size": SIZE,
}
ABOUT_THE_FILE = {"transformers_version": NO_PART, "torch_dtype": NO_PART, "dtype": NO_PART}
LLAVA = {
    **LANGUAGE_MODEL,
    **ABOUT_THE_FILE,
    "_name_or_path": NO_PART,
    "architectures": WORD,
    "freeze_mm_mlp_adapter": NO_PART,
    "freeze_mm_vision_resampler": NO_PART,
    "image_aspect_ratio": Expect(other="delete|null", why="LLaVA's default cuts out the centre"),
    "image_grid_pinpoints": NO_PART,
    "max_length": NO_PART,  # max_new_tokens is given
    "max_sequence_length": Expect(
        "delete|null|as float", "1|huge|more|double", "the loader reports another context"
    ),
    "mm_conv_mode": WORD,
    "mm_hidden_size": DERIVED_SIZE,
    "mm_next_protocol": WORD,
    "mm_patch_merge_type": WORD,
    "mm_projector_type": Expect(),
    "mm_resampler_type": NO_PART,
    "mm_token_pruning": Expect(same="delete|{}"),
    "mm_use_im_patch_token": OFF_WITHOUT_EFFECT,  # these folders hold no tokenizer
    "mm_use_im_start_end": OFF_WITHOUT_EFFECT,
    "mm_vision_select_feature": WORD,
    "mm_vision_select_layer": LAYER,
    "mm_vision_tower": Expect(),
    "model_type": Expect(same="delete|null|text"),  # the architecture decides
    "rope_parameters": Expect(same="delete|null|{}"),
    "rope_parameters.rope_theta": Expect(same="delete|null"),
    "rope_parameters.rope_type": Expect(same="delete"),
    "rope_scaling": Expect(same="delete|{}"),
    "rope_theta": Expect("delete|null", "huge", "positions turn more slowly"),
    "tokenizer_model_max_length": Expect(
        "delete|null|huge|more|double", "1", "the prompt is cut, with a warning"
    ),
    "tokenizer_padding_side": WORD,
    "tune_mm_mlp_adapter": NO_PART,
    "unfreeze_mm_vision_tower": OFF_WITHOUT_EFFECT,  # read when the model is saved
    "use_mm_proj": NO_PART,
}
LLAVA_NEXT = {
    **LLAVA,
    "image_grid_pinpoints": Expect(same="delete|null|as text"),  # those of the released models
    "mm_patch_merge_type": Expect(),  # without newlines there is no place for their weight
    "unfreeze_mm_vision_tower": Expect(same="delete|null|0|1|false"),
}
NAMED_TWICE = Expect(same="delete|null|text|as text")  # model_type says what the model is
SAVED_NOW = {
    **LLAVA,
    "architectures": NAMED_TWICE,
    # It stands in rope_parameters too, and the two must agree.
    "rope_theta": WORD,
}
TOWER = {
    **ABOUT_THE_FILE,
    "architectures": NO_PART,
    "attention_dropout": DROPOUT,
    "hidden_act": WORD,
    "hidden_size": SIZE,
    "image_size": SIZE,
    "initializer_factor": DROPOUT,
    "initializer_range": DROPOUT,
    "intermediate_size": SIZE,
    "layer_norm_eps": EPSILON,
    "model_type": Expect(),
    "num_attention_heads": Expect("as float", "1|double", "the weights fit any number of heads"),
    "num_channels": DERIVED_SIZE,
    "num_hidden_layers": SIZE,
    "patch_size": SIZE,
    "projection_dim": COUNT,
    "vision_use_head": Expect(same="delete|null|0|1|false"),  # no LLaVA runs SigLIP's head
}
STEP = Expect("delete|null|1", "0|false", "the step is left out")
SIDE = Expect(same="as float")
CLIP = {
    "crop_size": Expect(same="delete|null"),
    "crop_size.height": SIDE,
    "crop_size.width": SIDE,
    "do_center_crop": Expect(same="delete|null|0|1|false"),  # the padded picture is a square
    "do_convert_rgb": Expect(same="delete|null|0|1|false"),  # pictures are RGB before it
    "do_normalize": STEP,
    "do_rescale": STEP,
    "do_resize": STEP,
    "feature_extractor_type": NO_PART,
    "image_mean": WORD,
    "image_processor_type": NO_PART,
    "image_std": WORD,
    "resample": Expect("delete|null|as float", "0|1|more", "another filter"),
    "rescale_factor": Expect("delete|null", "1|0.5", "lighter pictures"),
    "size": Expect(same="delete|null"),
    "size.shortest_edge": Expect("as float", "more|double", "a smaller part of the picture"),
}
SIGLIP = {
    **{key: expect for key, expect in CLIP.items() if not key.startswith(("crop", "size"))},
    "do_resize": Expect(same="delete|null|1"),  # nothing else makes the picture as small as a tile
    "size": Expect(same="delete|null"),
    "size.height": SIDE,
    "size.width": SIDE,
}
GENERATION = {
    "_from_model_config": NO_PART,
    "bos_token_id": TOKEN,
    "do_sample": Expect("delete|null|0", "1|true", "tokens are drawn"),
    "eos_token_id": ENDS,
    "max_length": Expect(same="delete|null|1|huge|as float|more|double"),  # max_new_tokens is given
    "num_beams": Expect(same="delete|null|as float|more|double"),  # two beams find the same words
    "pad_token_id": TOKEN,
    "temperature": Expect(same="delete|null|0|1|huge|0.5"),  # nothing is drawn
    "top_p": Expect(same="delete|null|0|1|0.5"),
    "transformers_version": NO_PART,
}
HUGGING_FACE = {
    **ABOUT_THE_FILE,
    "architectures": NAMED_TWICE,
    "image_seq_length": COUNT,
    "image_token_index": COUNT,
    "model_type": Expect(),
    "multimodal_projector_bias": Expect(same="delete|null|1"),
    "projector_hidden_act": WORD,
    "text_config": Expect(),
    "tie_word_embeddings": OFF_WITHOUT_EFFECT,
    "vision_config": Expect(),
    "vision_feature_layer": Expect(f"{LAYER.same}|as float", LAYER.other, LAYER.why),
    "vision_feature_select_strategy": WORD,
    **{f"text_config.{key}": expect for key, expect in LANGUAGE_MODEL.items()},
    "text_config.model_type": WORD,
    "text_config.num_key_value_heads": SIZE,  # not as many as there are heads
    "text_config.rope_parameters": Expect(same="delete|null|{}"),
    "text_config.rope_parameters.rope_theta": LLAVA["rope_theta"],
    "text_config.rope_parameters.rope_type": Expect(same="delete"),
    **{f"vision_config.{key}": expect for key, expect in TOWER.items()},
    "vision_config.model_type": WORD,
}


HUGGING_FACE_NEXT = {
    **HUGGING_FACE,
    "image_grid_pinpoints": Expect(other="delete|null", why="canvases for tiles of 336 pixels"),
}


@dataclass(frozen=True)
class Subject:
    checkpoint: str
    file: str
    table: dict[str, Expect]
    sample: int  # changes of the default run; all of them run with --slow

    def __str__(self) -> str:
        return f"{self.checkpoint} {self.file}"


SUBJECTS = (
    Subject("llava-1.5", "config.json", LLAVA, 150),
    Subject("llava-1.5", "generation_config.json", GENERATION, 60),
    Subject("llava-1.5", "tower/config.json", TOWER, 50),
    Subject("llava-1.5", "tower/preprocessor_config.json", CLIP, 80),
    Subject("llava-1.6", "config.json", LLAVA_NEXT, 50),
    Subject("saved now", "config.json", SAVED_NOW, 50),
    Subject("siglip", "tower/config.json", TOWER, 30),
    Subject("siglip", "tower/preprocessor_config.json", SIGLIP, 40),
    Subject("llava-hf", "config.json", HUGGING_FACE, 80),
    Subject("llava-hf", "preprocessor_config.json", CLIP, 20),
    Subject("llava-next-hf", "config.json", HUGGING_FACE_NEXT, 30),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Answer]]:
    """`checkpoints(name)`: the folder of a checkpoint, made once, and its answer."""
    made: dict[str, tuple[Path, Answer]] = {}

    def make(name: str) -> tuple[Path, Answer]:
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            CHECKPOINTS[name](folder)
            made[name] = folder, answer(folder)
        return made[name]

    return make


def outcome(folder: Path, wanted: Answer, key: str) -> str:
    """What a changed checkpoint does: `same`, `other`, `refused`, or what it must not do."""
    try:
        given = answer(folder)
    except UserInputError as error:
        message = str(error)
        if "\n" in message:
            return f"more than a line: {message}"
        if not (key in message or "config" in message or "tower" in message):
            return f"names neither key nor file: {message}"
        return "refused" if ";" in message or ". " in message else f"no remedy: {message}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "same" if given.equals(wanted) else "other"


def faults(
    subject: Subject, checkpoints: Callable[[str], tuple[Path, Answer]], tried: list[Change]
) -> list[str]:
    folder, wanted = checkpoints(subject.checkpoint)
    file = folder / subject.file
    original = file.read_text()
    found = []
    try:
        for change in tried:
            write(file, change.apply(json.loads(original)))
            must = subject.table.get(change.key, Expect()).outcome(change.how)
            does = outcome(folder, wanted, change.path[-1])
            if does != must:
                found.append(f"{change.key} {change.how}: {does} instead of {must}")
    finally:
        file.write_text(original)
    return found


def all_changes(
    subject: Subject, checkpoints: Callable[[str], tuple[Path, Answer]]
) -> list[Change]:
    folder, _ = checkpoints(subject.checkpoint)
    return list(changes(json.loads((folder / subject.file).read_text())))


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_a_sample_of_changes(subject: Subject, checkpoints) -> None:
    """More than 600 changes in all, the same in every run."""
    tried = all_changes(subject, checkpoints)
    sample = random.Random(str(subject)).sample(tried, subject.sample)
    assert faults(subject, checkpoints, sample) == []


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_all_changes(subject: Subject, checkpoints) -> None:
    assert faults(subject, checkpoints, all_changes(subject, checkpoints)) == []
