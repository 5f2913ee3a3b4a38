"""LLaVA's other name for `llava.train.train`: attention saves memory without being asked to."""

from llava.train.train import main

if __name__ == "__main__":
    main()
