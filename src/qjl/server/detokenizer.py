"""A text as its tokens come: only what no later token can change, and no further than a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from qjl.errors import QJLError
from qjl.server.decoders import UNFINISHED, Rules, rules_of

WINDOW = 8  # tokens that are decoded once more, before those that are new
GROWTH = 1.25  # of a text that cannot be decoded in parts, from one search for stop strings to the next


class Writer:
    """Turns tokens into pieces of text that can be sent at once; joined, they are what the tokenizer decodes all tokens
    to, without special tokens and with spaces as they are (``clean_up_tokenization_spaces=False``).

    ``stopped`` tells whether a stop string was met. The text ends where the first one begins, whichever tokens it is
    spread over. A tokenizer whose decoder looks further than at neighbours gives all of its text at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        rules = rules_of(tokenizer)
        self._window = None if rules is None else _Window(self._decode, rules)
        self._tokens: list[int] = []
        self._sent: list[str] = []
        self._held = ""  # text that may be the beginning of a stop string
        self._next_look = 1.0

    def write(self, token: int) -> str:
        """The text that is certain now that this token is there; often none.

        Raises:
            QJLError: if text that was sent is not how the tokenizer's text begins.
        """
        self._tokens.append(token)
        if self._window is not None:
            return self._release(self._window.add(token))
        if self.stops and len(self._tokens) >= self._next_look:
            self._next_look = len(self._tokens) * GROWTH
            if self._first_stop(self._decode(self._tokens)) is not None:
                return self.finish()
        return ""

    def finish(self) -> str:
        """The text still held back, when no token will come any more.

        Raises:
            QJLError: as ``write``.
        """
        if self.stopped:
            return ""
        text = self._decode(self._tokens)
        start = self._first_stop(text)
        self.stopped = start is not None
        text, sent = text[:start], "".join(self._sent)
        if not text.startswith(sent):
            raise QJLError(
                f"{type(self.tokenizer).__name__} decodes a text otherwise than its parts: report it, with the model."
            )
        self._sent = [text]
        return text[len(sent) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, fresh: str) -> str:
        """What cannot be part of a stop string any more."""
        if self.stopped:
            return ""
        text = self._held + fresh
        start, end = self._first_stop(text), len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        if start is not None and start <= end:  # otherwise one that begins before it may become whole
            self.stopped, end = True, start
        self._held = text[end:]
        self._sent.append(text[:end])
        return text[:end]

    def _first_stop(self, text: str) -> int | None:
        return min((at for at in (text.find(stop) for stop in self.stops) if at >= 0), default=None)


class _Window:
    """The last tokens, of which only the end is decoded anew with each token."""

    def __init__(self, decode: Callable[[list[int]], str], rules: Rules) -> None:
        self._decode, self._rules = decode, rules
        self._tokens: list[int] = []
        self._given = 0  # characters of these tokens' text

    def add(self, token: int) -> str:
        """Text that is certain, and was not before."""
        if self._rules.is_silent(token):
            return ""
        self._tokens.append(token)
        if self._rules.is_open(token):
            return ""
        text = self._decode(self._tokens)
        unfinished = len(UNFINISHED) if self._rules.joins_bytes and text.endswith(UNFINISHED) else 0
        certain = text[self._given : len(text) - unfinished]
        self._given = len(text) - unfinished
        if len(self._tokens) >= 2 * WINDOW:
            self._shorten(unfinished)
        return certain

    def _shorten(self, unfinished: int) -> None:
        """Forget old tokens; there must be text before what is not given yet, since decoders treat the first apart."""
        tokens = self._tokens[-WINDOW:]
        given = len(self._decode(tokens)) - unfinished
        if given > 0:
            self._tokens, self._given = tokens, given


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
