"""Selection rules: which k tokens, given features and importance."""
