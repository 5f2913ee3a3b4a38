"""Scorers: one module per rule that turns a generated text into right or wrong."""
