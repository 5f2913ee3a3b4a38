"""Scoring rules that several benchmarks share; what one alone needs is in its file of `tasks`."""
