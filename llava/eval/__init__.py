"""Evaluation: tasks and scorers in, per-sample records out, tables and plots computed from them."""
