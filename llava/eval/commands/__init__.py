"""The commands of `python -m llava.eval`: flags in, one call."""
