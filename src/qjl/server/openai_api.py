"""OpenAI's requests and answers: what is taken, what is refused, and how it is said."""

from __future__ import annotations

import reprlib
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from qjl.server.sampling import Choice

COMPLETION_TOKENS = 16  # of a completion whose length was not told, as with OpenAI
_NO_LIMIT = (-1, -2)  # as other servers say "as long as there is room"
_CHANGE_NOTHING = {
    *(
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "priority",
        "request_id",
        "parallel_tool_calls",
    ),
    *("prompt_cache_retention", "cache_prompt", "cache_salt", "keep_alive", "num_ctx", "id_slot"),
    *("prediction", "verbosity"),  # a help to be faster; a wish of which no model here knows
    *("repeat_last_n", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    *("xtc_threshold", "dynatemp_exponent", "mirostat_tau", "mirostat_eta"),  # settings of what is off
}
_ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of", "num_beams"), (1,)),
    **dict.fromkeys(("repetition_penalty", "repeat_penalty", "encoder_repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("typical_p", "tfs_z", "guidance_scale"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "min_p", "top_a"), (0,)),
    **dict.fromkeys(("mirostat", "mirostat_mode", "dynatemp_range", "dry_multiplier", "xtc_probability"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "smoothing_factor", "penalty_alpha", "min_tokens"), (0,)),
    **dict.fromkeys(("top_logprobs", "n_probs"), (0,)),
    **dict.fromkeys(("top_k", "top_n_sigma"), (-1, 0)),
    **dict.fromkeys(("logprobs", "echo", "ignore_eos", "use_beam_search", "early_stopping", "safe_prompt"), (False,)),
    **dict.fromkeys(("include_stop_str_in_output", "continue_final_message", "return_token_ids"), (False,)),
    **dict.fromkeys(("return_tokens_as_token_ids", "timings_per_token", "return_progress"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt"), (True,)),
    **dict.fromkeys(("tools", "functions", "documents", "stop_token_ids", "bad_words", "logits_processors"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    **dict.fromkeys(("logit_bias", "extra_body", "options"), ({},)),
    **dict.fromkeys(("suffix", "grammar"), ("",)),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "web_search_options", "prompt_logprobs", "allowed_token_ids"), ()),
}
_OF_A_MESSAGE_CHANGE_NOTHING = {
    *("cache_control", "annotations", "id", "reasoning_details", "thinking_blocks", "provider_specific_fields"),
    "tool_call_id",  # of a role that is refused
}
_OF_A_MESSAGE_ONLY: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tool_calls", "images"), ([],)),
    **dict.fromkeys(("prefix", "partial"), (False,)),
    **dict.fromkeys(("audio", "function_call"), ()),
    "type": ("message",),
}
_TEXT_OF_PART = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_OF_A_PART_CHANGE_NOTHING = {"type", "cache_control", "annotations", "id"}

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def _require_whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half a character (a surrogate without its other half): send whole ones.") from error
    return text


def _refuse_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number: give one.")
    return value


def _positive_or_no_limit(tokens: int) -> int:
    if tokens <= 0 and tokens not in _NO_LIMIT:
        raise ValueError(f"{tokens} is no length: give 1 or more, or -1 for as long as there is room.")
    return tokens


def _plain(content: Any) -> Any:
    """The text of a message, which may come in parts."""
    return "".join(map(_text_of, content)) if isinstance(content, list) else content


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ValueError("a part is neither a text nor an object: send texts.")
    kind = part.get("type", "text")
    name = _TEXT_OF_PART.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise ValueError(f"parts of type {reprlib.repr(kind)} are not supported here: send texts.")
    others = {key for key, value in part.items() if value is not None} - _OF_A_PART_CHANGE_NOTHING - {name}
    if others:
        raise ValueError(f"{reprlib.repr(min(others))} of a part is not supported here: leave it out.")
    if not isinstance(part.get(name), str):
        raise ValueError(f"a part of type {kind} has no {name}: give one.")
    return str(part[name])


_Text = Annotated[str, AfterValidator(_require_whole_characters)]
_Number = Annotated[float, BeforeValidator(_refuse_truth)]
_Integer = Annotated[int, BeforeValidator(_refuse_truth)]
_Length = Annotated[_Integer, AfterValidator(_positive_or_no_limit)]


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """0 is not False: as ``logprobs`` it asks for those of the tokens written."""
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in allowed)


def _without_what_changes_nothing(fields: Any, ignored: set[str], only: dict[str, tuple[Any, ...]]) -> Any:
    """Raises PydanticCustomError if a field has another value than those that change nothing."""
    if not isinstance(fields, dict):
        return fields
    given = {name: value for name, value in fields.items() if value is not None and name not in ignored}
    for name in given.keys() & only.keys():
        if not _is_one_of(given[name], only[name]):
            told = f"{name} = {reprlib.repr(given[name])} is not supported here: leave {name} out."
            raise PydanticCustomError("not_built", "{told}", {"told": told, "param": name})
    return {name: value for name, value in given.items() if name not in only}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers, of which none is sent

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, fields: Any) -> Any:
        return _without_what_changes_nothing(fields, set(), {"continuous_usage_stats": (False,)})


class _Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: _Length | None = None
    max_completion_tokens: _Length | None = None
    temperature: _Number | None = Field(None, ge=0, le=2)
    top_p: _Number | None = Field(None, gt=0, le=1)
    seed: _Integer | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = None
    user: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, fields: Any) -> Any:
        return _without_what_changes_nothing(fields, _CHANGE_NOTHING, _ONLY)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_or_more(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def conversation(self) -> str | None:
        """What the client calls the conversation, or whoever asks."""
        return self.prompt_cache_key if self.prompt_cache_key is not None else self.user

    @property
    def choice(self) -> Choice:
        temperature = 1.0 if self.temperature is None else self.temperature
        return Choice(temperature, 1.0 if self.top_p is None else self.top_p, self.seed)

    @property
    def tokens_wanted(self) -> int | None:
        """The longest answer; None for as long as there is room."""
        given = [tokens for tokens in (self.max_tokens, self.max_completion_tokens) if tokens is not None]
        if not given:
            return self.tokens_by_default
        return min((tokens for tokens in given if tokens not in _NO_LIMIT), default=None)

    @property
    def tokens_by_default(self) -> int | None:
        return None

    @property
    def sends_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[_Text, BeforeValidator(_plain)]
    name: _Text | None = None
    reasoning_content: _Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, fields: Any) -> Any:
        """Answers that are sent back as a part of the conversation have such fields."""
        kept = _without_what_changes_nothing(fields, _OF_A_MESSAGE_CHANGE_NOTHING, _OF_A_MESSAGE_ONLY)
        if not isinstance(kept, dict) or kept.get("role") != "assistant":
            return kept
        reasoning, refusal = kept.pop("reasoning", None), kept.pop("refusal", "")
        return {"content": refusal, "reasoning_content": reasoning} | kept

    def for_template(self) -> dict[str, str]:
        """As chat templates take it; they know no developers."""
        given = {"role": self.role, "content": self.content, "name": self.name}
        given |= {"reasoning_content": self.reasoning_content}
        if self.role == "developer":
            given["role"] = "system"
        return {name: text for name, text in given.items() if text is not None}


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)


class CompletionRequest(_Request):
    prompt: _Text | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise ValueError(f"{len(prompt)} prompts in one request are not supported here: ask for one at a time.")
            prompt = prompt[0]
        if not isinstance(prompt, str | list):
            raise ValueError("give a text, or a list of tokens.")
        wrong = [token for token in prompt if type(token) is not int] if isinstance(prompt, list) else []
        if wrong:
            raise ValueError(f"{reprlib.repr(wrong[0])} is no token: give integers.")
        return prompt

    @property
    def tokens_by_default(self) -> int | None:
        return COMPLETION_TOKENS


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
