"""The tokenizer of a checkpoint: the class it was trained with, BOS, and room for every token."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
from transformers import LlamaTokenizer

from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model, load_tokenizer
from llava.utils import UserInputError

WORDS = "what is the colour of this red blue green square circle and how many are there"
RELEASED = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model like Llama's: BPE with byte fallback, unk, BOS, EOS first."""
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    chooser = random.Random(0)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [" ".join(chooser.choices(WORDS.split(), k=8)) + "?" for _ in range(300)]
        ),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def folder(model_file: Path, small_model: Callable, tmp_path: Path) -> Path:
    """A checkpoint with a bare tokenizer.model, its vocabulary as large as the tokenizer's."""
    size = spm.SentencePieceProcessor(model_file=str(model_file)).get_piece_size()
    path = tmp_path / "checkpoint"
    small_model(vocab_size=size).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(model_file.read_bytes())
    return path


def _edit(file: Path, **changes: object) -> None:
    data = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**data, **changes}))


@pytest.mark.parametrize("settings", [None, RELEASED, {"tokenizer_class": "LlamaTokenizer"}])
@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_ids_are_those_of_the_sentencepiece_model(settings, model_type, folder, model_file) -> None:
    _edit(folder / "config.json", model_type=model_type)
    if settings is not None:
        _edit(folder / "tokenizer_config.json", **settings)
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    assert isinstance(tokenizer, LlamaTokenizer)
    pieces = spm.SentencePieceProcessor(model_file=str(model_file))
    text = "what is the colour of this?"
    assert tokenizer(text).input_ids == [1, *pieces.encode(text)]
    ids = tokenizer_image_token(f"{text} <image>\n{text}", tokenizer)
    assert ids.count(1) == 1 and ids[0] == 1 and ids.count(-200) == 1
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_image_tokens_get_rows_of_embeddings(folder: Path) -> None:
    _edit(folder / "config.json", mm_use_im_patch_token=True, mm_use_im_start_end=True)
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    new = tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"])
    assert new == [len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1]
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.get_output_embeddings().out_features == model.config.vocab_size == len(tokenizer)
    assert model(torch.tensor([new])).logits.isfinite().all()


def test_patch_token_is_added_where_the_config_is_silent(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["mm_use_im_patch_token"]
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    assert tokenizer.convert_tokens_to_ids("<im_patch>") == len(tokenizer) - 1
    assert model.config.vocab_size == len(tokenizer)


def test_new_rows_depend_on_nothing_random(folder: Path) -> None:
    _edit(folder / "config.json", mm_use_im_patch_token=True)
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        _, model, _, _ = load_pretrained_model(str(folder), device="cpu")
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_missing_and_damaged_tokenizers(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserInputError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(folder)
