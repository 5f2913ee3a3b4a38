"""Pruning inside the language model: tokens of images are dropped between its layers."""
