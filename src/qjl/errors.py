"""Errors a user can act on: each message is one sentence that says what to do."""


class QJLError(ValueError):
    """Bad input or a missing resource; the command line prints the message and exits with code 2."""
