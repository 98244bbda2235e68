"""A text as its tokens come: whole characters only, and no further than a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what the bytes of a character decode to as long as not all of them are there
PATIENCE = 8  # tokens after which such bytes are no character that will be finished


class Writer:
    """Turns tokens into pieces of text that can be sent at once; joined, they are the text.

    ``stopped`` tells whether a stop string was met; it and what follows are no part of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.stopped = False
        self._context: list[int] = []  # tokens already written, which those behind them may need to decode rightly
        self._pending: list[int] = []
        self._held = ""  # text that may be the beginning of a stop string

    def write(self, token: int) -> str:
        """The text that is certain now that this token is there; often none."""
        self._pending.append(token)
        fresh = self._decoded()
        if fresh.endswith(UNFINISHED) and len(self._pending) < PATIENCE:
            return ""
        return self._release(fresh)

    def finish(self) -> str:
        """The text still held back, when no token will come any more."""
        piece = self._release(self._decoded())
        held, self._held = self._held, ""
        return piece + held

    def _decoded(self) -> str:
        """Text of the pending tokens, as it is behind the others."""
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _release(self, fresh: str) -> str:
        self._context, self._pending = self._pending or self._context, []
        text = self._held + fresh
        ends = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if ends or self.stopped:
            self.stopped, self._held = True, ""
            return text[: min(ends, default=0)]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
