"""The endpoints. They only wait: prompts become jobs of the engine, and its pieces become answers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import inspect
import json
import reprlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from qjl.architecture import context_length
from qjl.errors import QJLError
from qjl.server.engine import Engine, Job, Piece, Stopped
from qjl.server.openai_api import ChatForm, ChatRequest, CompletionForm, CompletionRequest, Form, error, usage

WENT_AWAY = 499  # as nginx counts a client that did not wait for the answer
ANSWERED = ("/v1/chat/completions", "/v1/completions")
PATHS = (*ANSWERED, "/v1/models", "/health", "/metrics")
RETRY_WHEN_FULL, RETRY_WHEN_STOPPING = "1", "5"  # seconds
BODY_SECONDS = 30.0
_OURS_TO_TELL = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
_REASONING = ("reasoning_effort", "enable_thinking", "thinking")  # what templates call it
_TEMPLATES_RAISE = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)
_IN_OTHER_WORDS = {  # a kind of pydantic's errors
    "extra_forbidden": "extra fields are not permitted: leave it out, or write it as OpenAI does.",
    "missing": "is missing: give it.",
    "too_short": "is empty: give at least one.",
}


@dataclass(frozen=True)
class Limits:
    """What requests may ask for, and how the server is called.

    - ``max_tokens``: of an answer; ``context``: of prompt and answer together, None for those that the model was made
      for.
    - ``max_body``: bytes of a request.
    - ``queue``: requests that may wait for one of the engine's slots.
    - ``origins``: pages whose scripts may read answers, as browsers name them; ``*`` for all.
    """

    name: str
    api_key: str | None = None
    max_tokens: int = 2048
    context: int | None = None
    max_body: int = 4 << 20
    queue: int = 64
    origins: tuple[str, ...] = ()


class BadRequest(QJLError):
    """A request that has to be put otherwise."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Service:
    """What endpoints need: the engine, a tokenizer of their own, and the limits."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self.engine, self.tokenizer, self.limits = engine, tokenizer, limits
        known = context_length(engine.model.config)
        self.context = min((size for size in (known, limits.context) if size is not None), default=None)
        self.started = int(time.time())
        self._tokenizing = ThreadPoolExecutor(1, "qjl-tokenizer")  # a tokenizer cannot be used by two threads at once

    async def ids(self, request: ChatRequest | CompletionRequest) -> list[int]:
        """The prompt's tokens."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._ids, request)

    def close(self) -> None:
        """Answers that are being written fail."""
        self.engine.close()
        self._tokenizing.shutdown()

    def _ids(self, request: ChatRequest | CompletionRequest) -> list[int]:
        if isinstance(request, ChatRequest):
            return self._chat_ids(request)
        if isinstance(request.prompt, str):
            return self.tokenizer(request.prompt, verbose=False).input_ids
        return request.prompt

    def _chat_ids(self, request: ChatRequest) -> list[int]:
        if not self.tokenizer.chat_template:
            raise BadRequest(
                f"{self.limits.name} has no chat template: use /v1/completions, or serve a model that has one.",
                param="messages",
            )
        messages, told = [message.for_template() for message in request.messages], self._told_to_template(request)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **told)
        except _TEMPLATES_RAISE as problem:
            raise BadRequest(f"the chat template refuses these messages: {problem}.", param="messages") from problem
        return self.tokenizer(str(text), add_special_tokens=False, verbose=False).input_ids

    def _told_to_template(self, request: ChatRequest) -> dict[str, Any]:
        """What a template may be told besides messages."""
        told = request.chat_template_kwargs
        ours = sorted(told.keys() & _OURS_TO_TELL)
        if ours:
            raise BadRequest(
                f"chat_template_kwargs cannot have {ours[0]}: leave {ours[0]} out.", param="chat_template_kwargs"
            )
        effort, template = request.reasoning_effort, str(self.tokenizer.chat_template)
        if effort is None or (effort == "none" and not any(name in template for name in _REASONING)):
            return told
        if "reasoning_effort" not in template:
            raise BadRequest(
                f"{self.limits.name} knows no reasoning_effort: leave it out, and tell its chat template what it knows "
                "by chat_template_kwargs.",
                param="reasoning_effort",
            )
        return {"reasoning_effort": effort} | told

    def require_model(self, name: str | None) -> None:
        """Raises BadRequest if that is another model; who names none means the one that is here."""
        if name not in (None, "", self.limits.name):
            raise BadRequest(
                f"the model {reprlib.repr(name)} does not exist here: this server has {self.limits.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def room_for(self, ids: list[int], wanted: int | None) -> int:
        """The longest answer to a prompt, in tokens: as many as are wanted, the limit and the context allow."""
        if not ids:
            raise BadRequest("the prompt is empty: give some text.")
        size = self.engine.model.config.get_text_config(decoder=True).vocab_size
        if not 0 <= min(ids) <= max(ids) < size:
            raise BadRequest(f"tokens of the prompt must be from 0 to {size - 1}.", param="prompt")
        room = None if self.context is None else self.context - len(ids)
        if room is not None and room < 1:
            raise BadRequest(
                f"the context is {self.context} tokens and the prompt has {len(ids)} tokens, which leaves no room for "
                "an answer: make it shorter.",
                code="context_length_exceeded",
            )
        return min(size for size in (wanted, self.limits.max_tokens, room) if size is not None)


class Answer:
    """The pieces of one answer, as they come to the event loop. Leaving it cancels what is not written yet."""

    def __init__(self, service: Service, http: Request, request: ChatRequest | CompletionRequest, ids: list[int]):
        loop, self._heard = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()
        self._engine, self._http = service.engine, http
        room = service.room_for(ids, request.tokens_wanted)
        self.job = Job(
            ids,
            room,
            lambda heard: loop.call_soon_threadsafe(self._heard.put_nowait, heard),
            request.choice,
            request.stop,
            client_of(http.headers.get("authorization"), request.conversation),
        )
        self._engine.submit(self.job)
        self._watch = asyncio.create_task(self._cancel_when_gone())

    async def _cancel_when_gone(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(self.job)
        self._heard.put_nowait(BadRequest("the client went away.", status=WENT_AWAY))

    @property
    def usage(self) -> dict[str, int]:
        return usage(len(self.job.ids), self.job.written)

    async def next(self) -> Piece:
        """Raises what the engine or the client ran into."""
        heard = await self._heard.get()
        if isinstance(heard, Exception):
            raise heard
        return heard

    def leave(self) -> None:
        self._watch.cancel()
        self._engine.cancel(self.job)


async def _respond(service: Service, http: Request, request: ChatRequest | CompletionRequest, form: Form) -> Response:
    service.require_model(request.model)
    answer = Answer(service, http, request, await service.ids(request))
    is_handed_on = False
    try:
        first = await answer.next()  # until then an error has a status of its own
        if request.stream:
            is_handed_on = True
            return Events(answer, _events(answer, first, form, request.sends_usage))
        text, piece = first.text, first
        while piece.reason is None:
            piece = await answer.next()
            text += piece.text
        return JSONResponse(form.answer(text, piece.reason, answer.usage))
    finally:
        if not is_handed_on:
            answer.leave()


class Events(StreamingResponse):
    """Server-sent events of one answer, which is left when nobody hears them any more, even before the first."""

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.leave()


async def _events(answer: Answer, piece: Piece, form: Form, sends_usage: bool) -> AsyncIterator[str]:
    """Server-sent events, from the first piece on."""
    try:
        for chunk in form.first():
            yield _event(chunk)
        while True:
            for chunk in form.piece(piece.text, piece.reason):
                yield _event(chunk)
            if piece.reason is not None:
                break
            piece = await answer.next()
        if sends_usage:
            yield _event(form.usage(answer.usage))
        yield "data: [DONE]\n\n"
    except Exception as problem:
        yield _event(_told(problem)[1])


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"  # in ASCII, since clients end lines at more characters than at newlines


def _told(problem: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body; what is not the client's doing is told in the log alone."""
    if isinstance(problem, BadRequest):
        return problem.status, error(problem.status, str(problem), problem.param, problem.code)
    if isinstance(problem, Stopped):
        return 503, error(503, str(problem))
    return 500, error(500, "the server could not write this answer: its log says why.")


def client_of(authorization: str | None, conversation: str | None) -> str | None:
    """Whose requests may share what was read of their prompts: those of one key, and of one conversation if it has a
    name (``prompt_cache_key``, or ``user``). None without either, which shares with nobody."""
    if authorization is None and conversation is None:
        return None
    return hashlib.sha256(json.dumps([authorization, conversation]).encode()).hexdigest()


def build(service: Service) -> ASGIApp:
    """The whole application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, max_body_size=service.limits.max_body)
    reading = partial(app.api_route, methods=["GET", "HEAD"])

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest, http: Request) -> Response:
        return await _respond(service, http, request, ChatForm(service.limits.name))

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await _respond(service, http, request, CompletionForm(service.limits.name))

    @reading("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service)]}

    @reading("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.require_model(name)
        return _model_card(service)

    @reading("/health")
    async def health() -> Response:
        is_stopping = service.engine.is_stopping
        return JSONResponse({"status": "stopping" if is_stopping else "ok"}, 503 if is_stopping else 200)

    @reading("/metrics")
    async def metrics() -> Response:
        held = await asyncio.wrap_future(service.engine.held())
        return Response(service.engine.metrics.text(held), media_type="text/plain; version=0.0.4; charset=utf-8")

    _tell_errors(app)
    gate = Gate(app, service)
    return Browsers(gate, service.limits.origins) if service.limits.origins else gate


def _model_card(service: Service) -> dict[str, Any]:
    card = {"id": service.limits.name, "object": "model", "created": service.started, "owned_by": "qjl"}
    return card | {"max_model_len": service.context, "preset": service.engine.config.name}


def _is_of_the_request(part: str | int) -> bool:
    """And no name that pydantic has for one of several types."""
    return isinstance(part, int) or (part.isidentifier() and part != "str")


def _what_is_wrong(problem: dict[str, Any]) -> tuple[str, str | None]:
    """A sentence, and the field that it is about."""
    place, kind = [*takewhile(_is_of_the_request, problem["loc"][1:])], problem["type"]
    if kind == "json_invalid" or (len(problem["loc"]) == 1 and kind != "not_built"):
        return "the body is no JSON object: send one, as application/json.", None
    message = _IN_OTHER_WORDS.get(kind) or str(problem["msg"]).removeprefix("Value error, ")
    name = ".".join(map(str, place))
    message = f"{name}: {message}" if name else message
    if kind == "not_built":
        name = ".".join(filter(None, [name, problem["ctx"]["param"]]))
    return message, name or None


def _tell_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, problem: RequestValidationError) -> Response:
        message, param = _what_is_wrong(problem.errors()[0])
        return JSONResponse(error(400, message, param), 400)

    @app.exception_handler(HTTPException)
    async def refused_by_http(http: Request, problem: HTTPException) -> Response:
        message = str(problem.detail)
        if problem.status_code == 404:
            message = f"there is no {reprlib.repr(http.scope['path'])} here: use one of {', '.join(PATHS)}."
        if problem.status_code == 405:
            allowed = sorted((problem.headers or {}).get("Allow", "another method").split(", "))
            message = f"{http.method} is not for {http.scope['path']}: use {', '.join(allowed)}."
        return JSONResponse(error(problem.status_code, message), problem.status_code, problem.headers)

    @app.exception_handler(Stopped)
    async def stopped(http: Request, problem: Stopped) -> Response:
        status, body = _told(problem)
        return JSONResponse(body, status, {"Retry-After": RETRY_WHEN_STOPPING})

    @app.exception_handler(BadRequest)
    @app.exception_handler(Exception)
    async def failed(http: Request, problem: Exception) -> Response:
        status, body = _told(problem)
        return JSONResponse(body, status)


class Gate:
    """Before all else: who may come in, with how much, and how many at a time; and what they were answered."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._limits = app, service.limits
        self._requests = service.engine.metrics.requests
        self._room = service.engine.slots + service.limits.queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _tidied(scope)
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._requests.labels(path, message["status"]).inc()
            await send(message)

        refusal = self._refusal(path, dict(scope["headers"]))
        if refusal is not None:
            await refusal(scope, receive, count)
            return
        taken = path in ANSWERED
        self._room -= taken
        try:
            await self._app(scope, _in_time(receive) if taken else receive, count)
        finally:
            self._room += taken

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        """Before the body is read; one that does not tell its length is cut off where it is read."""
        if not self._knows(headers) and path != "/health":
            return _refused(401, "this server wants an API key: send it as `Authorization: Bearer KEY`.")
        most = self._limits.max_body
        if int(headers.get(b"content-length", 0)) > most:
            return _refused(413, f"the request has more than {most} bytes, the most here: make it shorter.")
        if self._room <= 0 and path in ANSWERED:
            return _refused(429, "as many requests as may wait here are waiting: ask again later.")
        return None

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        if self._limits.api_key is None:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._limits.api_key.encode())


def _tidied(scope: Scope) -> Scope:
    """Without slashes that are too many; and what no browser sent is JSON, as whatever it is declared."""
    path = "/" + "/".join(part for part in scope["path"].split("/") if part)
    headers = scope["headers"]
    if path in ANSWERED and not any(name == b"origin" for name, _ in headers):
        headers = [(name, value) for name, value in headers if name != b"content-type"]
        headers.append((b"content-type", b"application/json"))
    return {**scope, "path": path, "raw_path": quote(path).encode(), "headers": headers}


class Browsers(CORSMiddleware):
    """Before the gate: tells browsers that the scripts of some pages may read what is answered, errors too."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "OPTIONS"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["Retry-After", "WWW-Authenticate"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        message = f"{bytes(response.body).decode()}: start the server with another --cors-origin."
        headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return JSONResponse(error(response.status_code, message), response.status_code, headers)


def _in_time(receive: Receive) -> Receive:
    """Raises HTTPException where a body takes too long: who sends none would keep a place for ever."""
    ends, is_whole = time.monotonic() + BODY_SECONDS, False

    async def in_time() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), ends - time.monotonic())
        except TimeoutError:
            raise HTTPException(
                408, f"the request took more than {BODY_SECONDS:g} s to come: send it faster."
            ) from None
        is_whole = not message.get("more_body", False)
        return message

    return in_time


_REFUSALS = {  # a status's code, and the header that goes with it
    401: ("invalid_api_key", {"WWW-Authenticate": "Bearer"}),
    413: (None, None),
    429: (None, {"Retry-After": RETRY_WHEN_FULL}),
}


def _refused(status: int, message: str) -> Response:
    code, headers = _REFUSALS[status]
    return JSONResponse(error(status, message, code=code), status, headers)
