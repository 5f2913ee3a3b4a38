"""Commands of `python -m llava.eval`: flags to a request."""
