"""Where the data of benchmarks come from."""
