"""Write the untrained language model of llava-tiny: `python -m llava.train.tiny.init_tiny DIR`.

Its tokenizer is a SentencePiece BPE with byte fallback, as Vicuna's. It is learnt from the prompts
of the world and the conversation template, so that a question costs about twelve tokens. The
characters of signs stay single pieces: reading them is the task.
"""

import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava.command_line import OneLineParser, one_line_errors
from llava.conversation import conv_templates
from llava.model.builder import load_tokenizer
from llava.utils import UserInputError
from llava.world import FAMILIES, ask, scene
from llava.world.font import ALPHABET
from llava.world.questions import text as text_family
from llava.world.shapes import COLORS

# hidden size, MLP width, layers, heads
SIZES = {"tiny": (128, 344, 4, 4), "small": (512, 1376, 8, 8)}
VOCABULARY = 640
# Older ones end the whole process where a required character is not in the corpus.
OLDEST_SENTENCEPIECE = (0, 2, 3)


def can_make_tokenizer() -> bool:
    """Whether the installed sentencepiece can learn this tokenizer; any can use it."""
    version = tuple(map(int, sentencepiece.__version__.split(".")[:3]))
    return version >= OLDEST_SENTENCEPIECE


def _corpus(lines: int = 4000) -> list[str]:
    rng = np.random.RandomState(0)
    families = [name for name in FAMILIES if FAMILIES[name] is not text_family]
    made = [scene(f"train/{index:06d}") for index in range(24)]
    corpus = []
    for index in range(lines):
        question, answer = ask(rng, made[index % len(made)], families[index % len(families)])
        corpus += [f"USER: {question} ASSISTANT: {answer}", question, answer]
    corpus += [f"What does the {color} sign say?" for color in COLORS for _ in range(lines // 20)]
    return corpus + [conv_templates["vicuna_v1"].system] * (lines // 20)


def make_tokenizer(folder: Path) -> None:
    """Write `tokenizer.model` and `tokenizer_config.json` (LLaVA-1.5's files) to `folder`.

    Raises:
        UserInputError: sentencepiece is too old.
    """
    if not can_make_tokenizer():
        needed = ".".join(map(str, OLDEST_SENTENCEPIECE))
        raise UserInputError(
            f"making llava-tiny's tokenizer needs sentencepiece {needed} or newer, and "
            f"{sentencepiece.__version__} is installed: pip install --upgrade sentencepiece"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_corpus()),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCABULARY,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            required_chars=ALPHABET,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_surface=" \u2047 ",
            num_threads=1,
            minloglevel=2,
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        **special,
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": "<unk>",
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def init_language_model(folder: Path, size: str, seed: int) -> None:
    """Write a random Llama in the shape of `size` with the tokenizer of the world's prompts."""
    make_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(seed)
    hidden, intermediate, layers, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        # a slow base: what a token is matters here more than how far away it is
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # equal queries and keys: looking for what is alike is a head start
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight.mul_(2.1))
    model.save_pretrained(folder)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with one_line_errors(parser):
        init_language_model(args.folder, args.size, args.seed)


if __name__ == "__main__":
    main()
