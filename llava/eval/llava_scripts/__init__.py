"""LLaVA's command lines."""
