"""Families of vision-language models, and the one contract that everything above them uses."""
