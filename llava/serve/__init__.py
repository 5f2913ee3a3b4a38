"""Serving: the command-line chat."""
