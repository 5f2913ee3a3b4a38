"""The one exception type of this package."""

from llava.utils import UserInputError


class PruningError(UserInputError):
    """A pruning setting or input that cannot be honoured; the message says what would work."""
