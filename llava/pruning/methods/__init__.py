"""One file per method. Every module in this package is imported by the registry."""
