"""Getting the data of benchmarks into LLaVA's layout, see `python -m llava.eval prepare`."""
