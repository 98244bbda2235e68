"""A conversation on one cache: each turn feeds the model only what is new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qjl.errors import QJLError
from qjl.generation import GREEDY, Generation, Sampling, generate, make_cache, require_context
from qjl.presets import DEFAULT_PRESET, CacheConfig

MARK = "\u241f"  # stands for an unknown text in a rendered chat template


class Conversation:
    """Turns of a user and a model.

    Raises:
        QJLError: if the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        preset: str | Path | CacheConfig = DEFAULT_PRESET,
    ) -> None:
        if not tokenizer.chat_template:
            raise QJLError("this model has no chat template: use `qjl generate` with it.")
        self.model, self.tokenizer = model, tokenizer
        self.cache = make_cache(model, preset)
        self.ids: list[int] = []

    def say(
        self,
        message: str,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Generation:
        """The model's answer.

        Raises:
            QJLError: if the conversation does not fit the model's context with it; it stays as it was.
        """
        ids = self.ids + self._turn(message)
        require_context(self.model, len(ids), "the conversation")
        answer = generate(
            self.model, self.tokenizer, ids, self.cache, max_new_tokens, sampling=sampling, on_text=on_text
        )
        self.ids = answer.ids
        return answer

    def _turn(self, message: str) -> list[int]:
        """Tokens from the end of the last answer to where the next one begins."""
        user = {"role": "user", "content": message}
        if not self.ids:
            return chat_tokens(self.tokenizer, [user])[0]
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": MARK}]
        tokens = chat_tokens(self.tokenizer, [*before, user])[1]
        return tokens[1:] if tokens[:1] == self.ids[-1:] else tokens


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[list[int]]:
    """Tokens of a prompt that asks for the model's turn, cut where ``MARK`` stands in a message."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return [tokenizer(part, add_special_tokens=False).input_ids for part in text.split(MARK)]
