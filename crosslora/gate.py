"""What an endpoint lets through to vLLM's app: a few routes, and of their requests the known fields within bounds.

vLLM's own app has many more routes (some without the API key) and fields, of which a single one can occupy the server.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 4 << 20
"""Bytes."""
MOST_CHOICES, MOST_PROMPTS, MOST_LOGPROBS, MOST_STOPS = 16, 128, 20, 16

Ids = list[Annotated[int, Field(ge=0, lt=1 << 31)]]


class _Known(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Known):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Request(_Known):
    """Fields of completions and chats alike; what they mean is in the API's own documentation."""

    model: str
    max_tokens: int | None = Field(None, ge=0, le=1 << 20)
    min_tokens: int = Field(0, ge=0, le=1 << 20)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 20)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=64)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None


class Completion(_Request):
    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(max_length=MOST_PROMPTS)]
        | Annotated[list[Ids], Field(max_length=MOST_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


class TextPart(_Known):
    type: Literal["text"]
    text: str


class ChatMessage(_Known):
    """Text only: a server that fetches images from addresses it is sent can be used to reach what only it can."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    # empty in the answers that clients send back in the next turn
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[str], Field(max_length=0)] | None = None
    reasoning: None = None


class Chat(_Request):
    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 20)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)


READ = ("/", "/health", "/v1/models")
BODIES: dict[str, type[_Request]] = {"/v1/completions": Completion, "/v1/chat/completions": Chat}


class Gate:
    """ASGI middleware. 404 for another route, 413 for too long a body, 400 for a body that is not as above."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        method, path = scope.get("method"), scope["path"]
        if scope["type"] == "http" and method in ("GET", "HEAD") and path in READ:
            await self._app(scope, receive, send)
        elif scope["type"] == "http" and method == "POST" and path in BODIES:
            await self._checked(scope, receive, send)
        else:
            await _refuse(404, f"{method} {path}: this endpoint has no such route")(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            await _refuse(413, f"the request is longer than {LARGEST_BODY} bytes")(scope, receive, send)
            return
        problem = _problem(body, BODIES[scope["path"]])
        if problem is not None:
            await _refuse(400, problem)(scope, receive, send)
            return
        await self._app(scope, replayed(body, receive), send)


def replayed(body: bytes, then: Callable[[], Awaitable[Any]]) -> Receive:
    """`receive` for an app that is to read a body once more; after it, `then` says when the client is gone."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return pending.pop() if pending else await then()

    return receive


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None where it is too long."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            return None
        if not message.get("more_body", False):
            return body


def _problem(body: bytes, known: type[_Request]) -> str | None:
    """What is wrong with a body, or None."""
    try:
        known.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "body"
        return f"{place}: {problem['msg']}"
    return None


def _refuse(status: int, message: str) -> ASGIApp:
    error: dict[str, Any] = {"message": message, "type": "invalid_request_error", "code": status}
    return JSONResponse({"error": error}, status_code=status)
