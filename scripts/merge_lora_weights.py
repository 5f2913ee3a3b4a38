"""LLaVA's script that merges a LoRA into its base model; `llava merge-lora` does the work."""

import sys

from llava.train.merge_lora import main

if __name__ == "__main__":
    sys.exit(main(prog="merge_lora_weights.py"))
