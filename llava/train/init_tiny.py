"""Write the untrained language model of llava-tiny: ``python -m llava.train.init_tiny DIR``."""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llava.train.tokenizer import make_tokenizer

SIZES = {
    "tiny": dict(
        hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4
    ),
    "small": dict(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    ),
}


def init_language_model(folder: Path, size: str, seed: int) -> None:
    """A random Llama in the shape of ``size`` with the tokenizer of the world's prompts."""
    make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        # a slow base: what a token is matters here more than how far it stands away
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.04,
        **SIZES[size],
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    init_language_model(args.folder, args.size, args.seed)


if __name__ == "__main__":
    main()
