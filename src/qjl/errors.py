"""Errors a user can act on: each message is one sentence that says what to do."""


class QJLError(ValueError):
    """Bad input or a missing resource; the command line prints the message and exits with code 2."""


def reason(error: Exception) -> str:
    """What another's error says, as part of a sentence: its first line in words, or what could not be reached."""
    url = getattr(getattr(error, "request", None), "url", None)
    if url and getattr(error, "response", None) is None:
        return f"{url} cannot be reached"
    lines = [line.strip() for line in str(error).splitlines() if any(map(str.isalpha, line))]
    return lines[0].rstrip(".:") if lines else type(error).__name__
