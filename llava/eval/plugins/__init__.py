"""Adapters that other evaluation programs load; importing this package imports none of them."""
