"""Ids are those of sentencepiece, as LLaVA's tokenizer has them, for every text."""

import copy
import gzip
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import torch
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from llava.conversation import conv_templates
from llava.eval.prompts import question
from llava.mm_utils import tokenize_pieces, tokenizer_image_token
from llava.model.builder import load_tokenizer
from llava.model.prompting import prompt_pieces, render
from llava.train.conversations import render as render_sample
from llava.train.conversations import tokenize
from llava.train.samples import Sample
from llava.utils import UserInputError

WORDS = "what is the colour of this red blue circle == ---- aaaa USER: é 漢字 ﬁ"
KEPT = {  # whitespace as it stands, as in Llama's and Mistral's models
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "spaces": {**KEPT, "byte_fallback": True},
    "no bytes": {**KEPT, "character_coverage": 0.98},
    "no prefix": {**KEPT, "byte_fallback": True, "add_dummy_prefix": False},
    "spaces inside": {**KEPT, "byte_fallback": True, "split_by_whitespace": False},
    "symbols": {
        **KEPT,
        "byte_fallback": True,
        "user_defined_symbols": ["<sep>", "=="],
        "control_symbols": ["[INST]"],
    },
    "normalised": {"byte_fallback": True},
    "unigram": {**KEPT, "byte_fallback": True, "model_type": "unigram"},
}
KINDS = [*MODELS, "scores"]
TEXTS = [
    *(" " * n + "what" for n in range(20)),
    *("red" + " " * n + "circle" for n in range(20)),
    *("=" * n + "-" * n + "a" * n for n in range(12)),
    "",
    "\nwhat\t\tis\r\n\n  this\u00a0\u00a0red ",
    "🧑‍🚀 🇩🇪  e\u0301 \u200bwhat\u200d\x00\x07\u3000",
    "漢字 한글 ﬁ ① ŉ İ \U0010ffff \ufeff \ufffd",
    "<0x0A> <0xE2>x <sep>  [INST] what</ s> <s",
]


def _train(file: Path, **options: Any) -> None:
    chooser = random.Random(0)
    lines = [
        "".join(
            chooser.choice(WORDS.split()) + " " * chooser.choice([1, 1, 1, 2, 3, 4, 8])
            for _ in range(8)
        )
        for _ in range(400)
    ]
    defaults = {"model_type": "bpe", "vocab_size": 380, "hard_vocab_limit": False}
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    with file.open("wb") as writer:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=writer,
            minloglevel=2,
            num_threads=1,
            **{**defaults, **ids, **options},
        )


def _equal_scores(model: bytes) -> bytes:
    """Runs of spaces get one very low score, as Llama's model has it."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        if set(piece.piece) == {"▁"}:
            piece.score = -1e9
    return proto.SerializeToString()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A `tokenizer.model` for each of `KINDS`."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    files = {name: folder / f"{name}.model" for name in KINDS}
    for name, options in MODELS.items():
        _train(files[name], **options)
    files["scores"].write_bytes(_equal_scores(files["spaces"].read_bytes()))
    return files


@pytest.fixture(scope="module")
def load(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`load(kind, **settings)`: the tokenizer of a checkpoint folder with these settings."""

    def make(kind: str, **changes: Any) -> Any:
        return load_tokenizer(folder_of(models[kind].read_bytes(), tmp_path_factory, **changes))

    return make


def folder_of(model: bytes, tmp_path_factory: Any, **changes: Any) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "tokenizer.model").write_bytes(model)
    saved = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "pad_token": "<unk>", **changes}
    saved = {name: value for name, value in saved.items() if value is not ...}
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    return folder


def _without_prefix(file: Path) -> spm.SentencePieceProcessor:
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    return spm.SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_ids_are_those_that_llava_has(goldens: Path, tmp_path_factory: Any) -> None:
    """transformers 4.37.2's slow tokenizer, recorded for llava-tiny's own tokenizer.model."""
    recorded = json.loads((goldens / "llava" / "tokenizer" / "case.json").read_text())
    model = Path("playground/llava-tiny/tokenizer.model").read_bytes()
    for case in recorded["cases"]:
        legacy = ... if case["legacy"] is None else case["legacy"]
        tokenizer = load_tokenizer(folder_of(model, tmp_path_factory, legacy=legacy))
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
        tokenizer.add_tokens(["<im_start>"])
        for text, ids in zip(recorded["texts"], case["ids"], strict=True):
            assert tokenizer(text).input_ids == ids, (case["legacy"], text)


@pytest.mark.parametrize("legacy", [False, True, ...], ids=["new", "legacy", "silent"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_plain_text_are_sentencepieces(kind, legacy, load, models) -> None:
    tokenizer = load(kind, legacy=legacy)
    pieces = spm.SentencePieceProcessor(model_file=str(models[kind]))
    # Without `legacy`, LLaVA's tokenizer starts a text with a space whatever the model says.
    lead = " " if kind == "no prefix" and legacy is False else ""
    wanted = [[1, *pieces.encode(lead * bool(text) + text)] for text in TEXTS]
    assert [tokenizer(text).input_ids for text in TEXTS] == wanted
    assert tokenizer(TEXTS).input_ids == wanted


@pytest.fixture(
    scope="module",
    params=[
        (kind, old) for kind in ("spaces", "scores", "no bytes", "unigram") for old in (False, True)
    ],
)
def loaded(request, load, models) -> tuple[Any, spm.SentencePieceProcessor]:
    kind, legacy = request.param
    return load(kind, legacy=legacy), spm.SentencePieceProcessor(model_file=str(models[kind]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.lists(
        st.one_of(
            st.sampled_from([*" \t\n\r\u00a0\u3000▁=-a", "  ", "     ", "what", "🧑‍🚀", "e\u0301"]),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
        ),
        max_size=12,
    ).map("".join)
)
def test_ids_and_places_of_any_text(loaded, text: str) -> None:
    tokenizer, pieces = loaded
    assume(not any(token in text for token in ("<s>", "</s>", "<unk>")))
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded.input_ids == [1, *pieces.encode(text)]
    check_places(text, tokenizer, encoded.input_ids[1:], encoded.offset_mapping[1:])


def check_places(text: str, tokenizer: Any, ids: list[int], places: list[tuple[int, int]]) -> None:
    """Every token's characters are where it says, in order, and all characters have tokens."""
    covered = 0
    for index, (start, end) in zip(ids, places, strict=True):
        assert start <= covered and covered <= end <= len(text)
        piece = tokenizer.convert_ids_to_tokens(index)
        shown = text[start:end].replace(" ", "▁")
        if piece not in (tokenizer.unk_token, "▁") and not piece.startswith("<0x"):
            assert piece in (shown, "▁" + shown)
        elif piece.startswith("<0x") and len(piece) == 6:
            assert int(piece[3:5], 16) in shown.encode() and end - start == 1
        covered = end
    assert covered == len(text)


@pytest.mark.parametrize("legacy", [False, True])
def test_special_tokens_in_a_text_cut_it(legacy, load, models) -> None:
    tokenizer = load("scores", legacy=legacy)
    tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
    patch = tokenizer.convert_tokens_to_ids("<im_patch>")
    full = spm.SentencePieceProcessor(model_file=str(models["scores"]))
    bare = full if legacy else _without_prefix(models["scores"])
    text = "what  is</s>USER:   this<unk> red<s></s>\n<im_patch>  "
    assert tokenizer(text).input_ids == [
        1,
        *full.encode("what  is"),
        *(2, *bare.encode("USER:   this")),
        *(0, *bare.encode(" red")),
        *(1, 2, *bare.encode("\n")),
        *(patch, *bare.encode("  ")),
    ]
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping[1:]
    named = [text[start:end] for start, end in offsets]
    assert [word for word in named if word.startswith("<")] == [
        "</s>",
        "<unk>",
        "<s>",
        "</s>",
        "<im_patch>",
    ]
    # A space before a first special token is only the text's own.
    assert tokenizer("</s>what").input_ids == [1, 2, *bare.encode("what")]
    assert tokenizer(" </s>").input_ids == [1, *full.encode(" "), 2]
    whole = tokenizer(text, split_special_tokens=True).input_ids
    assert whole == [1, *full.encode(text)]
    assert tokenizer(text).input_ids != whole  # the setting of one call is not kept


def test_added_tokens_take_spaces_and_word_borders_as_they_say(load) -> None:
    tokenizer = load("spaces")
    for name, options in {
        "<l>": {"lstrip": True},
        "<r>": {"rstrip": True},
        "<w>": {"single_word": True},
    }.items():
        tokenizer.add_tokens([transformers.AddedToken(name, normalized=False, **options)])
    l, r, single = tokenizer.convert_tokens_to_ids(["<l>", "<r>", "<w>"])  # noqa: E741
    red = tokenizer("red").input_ids
    assert tokenizer("red  <l>").input_ids == [*red, l]
    assert tokenizer("red<r>  <r>").input_ids == [*red, r, r]
    assert tokenizer("red <w>").input_ids[-1] == single
    assert single not in tokenizer("red<w> this").input_ids


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_text_starts_with_a_space_unless_told_otherwise(prefix, legacy, load, models) -> None:
    tokenizer = load("scores", legacy=legacy, add_prefix_space=prefix)
    full = spm.SentencePieceProcessor(model_file=str(models["scores"]))
    bare = _without_prefix(models["scores"])
    for text in ("what", "  what", "\n", "▁what"):
        wanted = (bare if prefix is False else full).encode(text)
        assert tokenizer(text).input_ids == [1, *wanted]


def test_a_written_space_piece_is_a_space(tmp_path_factory: Any) -> None:
    """Without `legacy`, as in LLaVA's tokenizer: a model that drops extra spaces drops it too."""
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    _train(file, byte_fallback=True, normalization_rule_name="identity")
    folder = folder_of(file.read_bytes(), tmp_path_factory, legacy=False)
    tokenizer = load_tokenizer(folder)
    assert tokenizer("red▁▁▁circle").input_ids == tokenizer("red   circle").input_ids


def test_symbols_of_the_model_stay_with_the_model(load, models) -> None:
    """transformers cuts the text at them; sentencepiece and LLaVA do not."""
    tokenizer = load("symbols", legacy=True)
    pieces = spm.SentencePieceProcessor(model_file=str(models["symbols"]))
    for text in ("what <sep>is", "<sep>is", "red ==  == [INST] red"):
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)]


def test_prompts_of_evaluation_and_training_are_sentencepieces(load, models) -> None:
    tokenizer = load("scores", legacy=False)
    full = spm.SentencePieceProcessor(model_file=str(models["scores"]))
    bare = _without_prefix(models["scores"])
    template = conv_templates["vicuna_v1"]
    asked, answer = "what   is\t\tthis?", "a    red  circle"
    dialogue = question(asked)
    prompt = render(dialogue, "vicuna_v1")
    head, tail = prompt.split("<image>")
    wanted = [1, *full.encode(head), -200, *full.encode(tail)]
    assert tokenizer_image_token(prompt, tokenizer) == wanted
    assert tokenize_pieces(prompt_pieces(dialogue, "vicuna_v1", None), tokenizer) == wanted
    told = f"{prompt} {answer}</s>USER:  next ASSISTANT: red</s>"
    turns = (f"<image>\n{asked}", answer, " next", "red")
    parts = render_sample(Sample("sample 0", turns, ("red.png",)), template)
    assert "".join(part.text for part in parts) == told
    ids, labels = tokenize(parts, tokenizer)
    assert ids.tolist() == tokenizer_image_token(told, tokenizer)
    assert ids.tolist() == [
        *(1, *full.encode(head), -200, *full.encode(f"{tail} {answer}"), 2),
        *(*bare.encode("USER:  next ASSISTANT: red"), 2),
    ]
    learnt = tokenizer.decode([label for label in labels.tolist() if label >= 0])
    assert learnt.split() == f"{answer}</s> red</s>".split()


def test_everything_else_is_as_in_transformers(load, models, tmp_path_factory) -> None:
    folder = folder_of(models["spaces"].read_bytes(), tmp_path_factory, add_bos_token=True)
    theirs, ours = transformers.LlamaTokenizer.from_pretrained(folder), load_tokenizer(folder)
    assert isinstance(ours, transformers.LlamaTokenizer) and ours.is_fast
    texts = ["what is this?", "red", "é 漢"]
    calls: list[dict[str, Any]] = [
        {},
        {"padding": True, "return_tensors": "pt", "padding_side": "left"},
        {"padding": "max_length", "max_length": 20},
        {"padding": True, "pad_to_multiple_of": 8},
        {"truncation": True, "max_length": 4, "return_offsets_mapping": True},
        {"truncation": True, "max_length": 4, "stride": 1, "return_overflowing_tokens": True},
        {"text_pair": ["red", "what", "this"], "return_token_type_ids": True},
        {"add_special_tokens": False, "return_special_tokens_mask": True},
    ]
    for call in calls:
        first, second = theirs(texts, **call), ours(texts, **call)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.as_tensor(first[key] == second[key]).all(), (call, key)
    one, other = theirs(texts[0]), ours(texts[0])
    assert one.tokens() == other.tokens() and one.char_to_token(5) == other.char_to_token(5)
    assert theirs.tokenize("what is") == ours.tokenize("what is")
    assert theirs.encode("red", "is") == ours.encode("red", "is")
    words = [["what", "is"], ["red"]]
    split = [tokenizer(words, is_split_into_words=True) for tokenizer in (theirs, ours)]
    assert split[0].input_ids == split[1].input_ids
    assert split[0].word_ids(0) == split[1].word_ids(0)
    assert ours.decode(ours("what  is</s>").input_ids, skip_special_tokens=True) == "what  is"
    assert ours.batch_decode([[1, 2]], skip_special_tokens=True) == [""]
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert ours.backend_tokenizer.encode("a  a").ids == ours("a  a").input_ids


@pytest.mark.parametrize("legacy", [False, True, ...], ids=["new", "legacy", "silent"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_saved_tokenizer_gives_the_same_ids(legacy, bos, load, models, tmp_path) -> None:
    tokenizer = load("scores", legacy=legacy, add_bos_token=bos)
    tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
    texts = [*TEXTS, "what</s>  is<im_patch>red", "<im_patch> red"]
    wanted = [tokenizer(text).input_ids for text in texts]
    for name, again in {
        "saved": lambda: load_tokenizer(tmp_path / "saved"),
        "pickled": lambda: pickle.loads(pickle.dumps(tokenizer)),
        "copied": lambda: copy.deepcopy(tokenizer),
    }.items():
        tokenizer.save_pretrained(tmp_path / "saved")
        other = again()
        assert [other(text).input_ids for text in texts] == wanted, name
        assert len(other) == len(tokenizer), name
        assert type(other) is type(tokenizer), name
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == models["scores"].read_bytes()
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "LlamaTokenizer"  # what other tools look up


def test_a_tokenizer_without_its_model_is_transformers_own(load, tmp_path) -> None:
    load("spaces").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    ours, theirs = load_tokenizer(tmp_path), transformers.LlamaTokenizer.from_pretrained(tmp_path)
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


def test_files_of_two_tokenizers_are_refused(load, models, tmp_path) -> None:
    load("spaces").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(models["unigram"].read_bytes())
    with pytest.raises(UserInputError, match=r"token \d+ is .* in tokenizer.model and"):
        load_tokenizer(tmp_path)


def test_llava15s_published_prompts() -> None:
    """Ids recorded in LLaVA itself; its tokenizer may not be copied into the project."""
    place = os.environ.get("LLAVA_TOKENIZER_GOLDENS")
    if not place:
        pytest.skip("set LLAVA_TOKENIZER_GOLDENS to a folder with LLaVA-1.5's tokenizer and ids")
    tokenizer = load_tokenizer(Path(place))
    for row in _rows(Path(place, "prompts.jsonl.gz")):
        prompt = render(question(row["question"]), "vicuna_v1")
        assert tokenizer_image_token(prompt, tokenizer) == row["ids"], prompt
    for row in _rows(Path(place, "two_turns.jsonl.gz")):
        template = conv_templates["vicuna_v1"].copy()
        words = [f"<image>\n{row['question']}", row["answer"], row["next"], None]
        for index, text in enumerate(words):
            template.append_message(template.roles[index % 2], text)
        assert tokenizer_image_token(template.get_prompt(), tokenizer) == row["ids"], row
        sample = Sample("sample", tuple(words[:3]), ("image.png",))
        asked = conv_templates["vicuna_v1"]
        ids, _ = tokenize(render_sample(sample, asked), tokenizer)
        assert ids.tolist()[:-1] == row["ids"][: len(ids) - 1]  # then the open turn begins


def _rows(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert rows
    return rows
