"""LLaVA's own command lines for scoring and submitting answer files: same names, flags, files."""
