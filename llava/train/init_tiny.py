"""Write the untrained language model of llava-tiny: `python -m llava.train.init_tiny DIR`."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llava.command_line import OneLineParser, one_line_errors
from llava.model.builder import load_tokenizer
from llava.train.tokenizer import make_tokenizer

# hidden size, MLP width, layers, heads
SIZES = {"tiny": (128, 344, 4, 4), "small": (512, 1376, 8, 8)}


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
