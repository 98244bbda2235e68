"""OpenAI's requests and answers: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import reprlib
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from qjl.serving.sampling import Choice

COMPLETION_TOKENS = 16  # of a completion whose length was not told, as with OpenAI
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def _require_whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a character (a surrogate without its other half): send whole ones.") from error
    return text


_Text = Annotated[str, AfterValidator(_require_whole_characters)]


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """0 is not False: as ``logprobs`` it asks for those of the tokens written."""
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in allowed)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers, of which none is sent


class _Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name, allowed in _ONLY.items():
            value = fields.get(name)
            if value is not None and not _is_one_of(value, allowed):
                raise ValueError(f"{name} = {reprlib.repr(value)} is not supported here: leave {name} out.")
        return {
            name: value
            for name, value in fields.items()
            if name not in _IGNORED and name not in _ONLY and value is not None
        }

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_or_more(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def choice(self) -> Choice:
        temperature = 1.0 if self.temperature is None else self.temperature
        return Choice(temperature, 1.0 if self.top_p is None else self.top_p, self.seed)

    @property
    def tokens_wanted(self) -> int | None:
        """The longest answer; None for as long as there is room."""
        return self.max_tokens

    @property
    def sends_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: _Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_null(cls, fields: Any) -> Any:
        """Answers that are sent back as a part of the conversation have such fields."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}

    def for_template(self) -> dict[str, str]:
        """As chat templates take it; they know no developers."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def tokens_wanted(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    prompt: _Text | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int):
            return prompt
        if len(prompt) > 1:
            raise ValueError(f"{len(prompt)} prompts in one request are not supported here: ask for one at a time.")
        return prompt[0]

    @property
    def tokens_wanted(self) -> int | None:
        return self.max_tokens or COMPLETION_TOKENS


class Form:
    """How the answer to one request is written down, whole or in chunks."""

    whole: ClassVar[str]
    chunk: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def answer(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """All at once."""
        choice = self._choice(self._text(text), reason)
        return self._head | {"object": self.whole, "choices": [choice], "usage": usage}

    def first(self) -> list[dict[str, Any]]:
        """Chunks before any text."""
        return []

    def piece(self, text: str, reason: str | None) -> list[dict[str, Any]]:
        return [self._chunk([self._choice(self._more(text), reason)])]

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return self._chunk([]) | {"usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": self.chunk, "choices": choices}

    def _choice(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def _text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _more(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class ChatForm(Form):
    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self) -> list[dict[str, Any]]:
        return [self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])]

    def piece(self, text: str, reason: str | None) -> list[dict[str, Any]]:
        chunks = super().piece(text, None) if text else []
        return chunks if reason is None else [*chunks, self._chunk([self._choice({"delta": {}}, reason)])]

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _more(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


class CompletionForm(Form):
    whole, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _more = _text


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that is none."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
