"""Commands of the evaluation: flags in, one call out."""
