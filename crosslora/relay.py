"""Two engines behind one endpoint: requests for a model that the first does not have go on to the second."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crosslora.gate import replayed

MODELS, HEALTH = "/v1/models", "/health"
Call = dict[str, Any]
"""A request as plain values that travel between processes: method, path, headers, body."""


class Relay:
    """ASGI app: `own` answers for the models that it `has`, and `other`, a handle of an engine, for all else."""

    def __init__(self, own: ASGIApp, has: Callable[[str], bool], other: Any) -> None:
        self._own, self._has, self._other = own, has, other.options(method_name="answer", stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/":
            await self._own(scope, receive, send)
            return
        body = (await receive()).get("body", b"")
        call = {name: scope[name] for name in ("method", "path", "headers")} | {"body": body}
        if scope["path"] == MODELS:
            await (await self._models(call))(scope, receive, send)
        elif scope["path"] == HEALTH:
            await (await self._health(call))(scope, receive, send)
        elif self._has(json.loads(body)["model"]):
            await self._own(scope, replayed(body, receive), send)
        else:
            async for message in self._other.remote(call):
                await send(message)

    async def _models(self, call: Call) -> Response:
        """Both lists as one."""
        status, first = await _whole(answer(self._own, call))
        if status != 200:
            return Response(first, status, media_type="application/json")
        listed = json.loads(first)
        status, second = await _whole(self._other.remote(call))
        if status == 200:
            listed["data"] += json.loads(second)["data"]
        return Response(json.dumps(listed), media_type="application/json")

    async def _health(self, call: Call) -> Response:
        """200 where both engines are well."""
        status, body = await _whole(answer(self._own, call))
        if status == 200:
            status, body = await _whole(self._other.remote(call))
        return Response(body, status)


async def answer(app: ASGIApp, call: Call) -> AsyncGenerator[Message]:
    """The messages with which an ASGI app answers. A caller that stops listening cancels it."""
    scope = {
        **{name: call[name] for name in ("method", "path", "headers")},
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"},
        **{
            "query_string": b"",
            "root_path": "",
            "raw_path": call["path"].encode(),
            "client": None,
            "server": None,
        },
    }
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()

    async def until_gone() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(scope, replayed(call["body"], until_gone), messages.put)
        finally:
            messages.put_nowait(None)

    running = asyncio.create_task(run())
    try:
        while (message := await messages.get()) is not None:
            yield message
        await running
    finally:
        gone.set()  # vLLM listens for this while it makes a whole answer
        await asyncio.wait([running], timeout=1)
        running.cancel()


async def _whole(messages: AsyncIterator[Message]) -> tuple[int, bytes]:
    status, body = 0, b""
    async for message in messages:
        status = message.get("status", status)
        body += message.get("body", b"")
    return status, body
