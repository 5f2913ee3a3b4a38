"""Which k tokens, given features and importance?"""
