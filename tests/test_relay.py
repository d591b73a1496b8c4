"""An app that is asked from another process answers like one that is asked over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message

from crosslora.relay import Call, Relay, answer


def call(path: str, body: bytes = b"") -> Call:
    return {"method": "POST", "path": path, "headers": [(b"authorization", b"Bearer key")], "body": body}


def test_path_headers_and_body_arrive() -> None:
    async def echo(request: Request) -> JSONResponse:
        key = request.headers["authorization"]
        return JSONResponse([request.url.path, key, (await request.body()).decode()], 201)

    async def run() -> list[dict[str, object]]:
        app = Starlette(routes=[Route("/v1/x", echo, methods=["POST"])])
        return [dict(message) async for message in answer(app, call("/v1/x", b"asked"))]

    start, body = asyncio.run(run())[:2]
    assert start["status"] == 201
    assert body["body"] == b'["/v1/x","Bearer key","asked"]'


def test_a_stream_arrives_piece_by_piece_and_ends_with_its_reader() -> None:
    state = {"sent": 0, "cancelled": 0}

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                state["sent"] += 1
                yield b"piece"
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            state["cancelled"] = 1
            raise

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(pieces())

    async def run() -> None:
        app = Starlette(routes=[Route("/", stream, methods=["POST"])])
        async with aclosing(answer(app, call("/"))) as messages:
            async for message in messages:
                if message.get("body"):
                    break
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert state["cancelled"] == 1 and state["sent"] < 5


def test_an_app_that_listens_hears_that_its_reader_is_gone() -> None:
    heard = []

    async def listen(request: Request) -> JSONResponse:
        await request.body()
        heard.append((await request.receive())["type"])
        return JSONResponse({})

    async def run() -> None:
        app = Starlette(routes=[Route("/", listen, methods=["POST"])])

        async def read() -> None:
            async with aclosing(answer(app, call("/"))) as messages:
                async for _ in messages:
                    pass

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        reader.cancel()
        await asyncio.wait([reader])

    asyncio.run(run())
    assert heard == ["http.disconnect"]


def test_an_error_of_the_app_is_the_callers() -> None:
    async def broken(request: Request) -> JSONResponse:
        raise ZeroDivisionError

    async def run() -> None:
        app = Starlette(routes=[Route("/", broken, methods=["POST"])])
        async for _ in answer(app, call("/")):
            pass

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())


class Beside:
    """The other engine's handle, with its app in this process."""

    def __init__(self, app: Starlette) -> None:
        self.app = app

    def options(self, method_name: str, stream: bool) -> "Beside":
        return self

    def remote(self, asked: Call) -> AsyncIterator[Message]:
        return answer(self.app, asked)


@pytest.mark.parametrize(("own", "beside", "said"), [(200, 200, 200), (503, 200, 503), (200, 503, 503)])
def test_an_endpoint_is_as_well_as_the_worse_of_its_engines(own: int, beside: int, said: int) -> None:
    def engine(status: int) -> Starlette:
        async def health(request: Request) -> Response:
            return Response(status_code=status)

        return Starlette(routes=[Route("/health", health)])

    relay = Relay(engine(own), lambda model: True, Beside(engine(beside)))
    assert TestClient(relay).get("/health").status_code == said


def test_a_model_is_asked_where_it_is_and_both_are_listed() -> None:
    def engine(name: str) -> Starlette:
        async def complete(request: Request) -> Response:
            return JSONResponse({"engine": name, "asked": (await request.json())["model"]})

        async def models(request: Request) -> Response:
            return JSONResponse({"data": [{"id": name}]})

        return Starlette(
            routes=[Route("/v1/completions", complete, methods=["POST"]), Route("/v1/models", models)]
        )

    client = TestClient(Relay(engine("own"), lambda model: model == "a", Beside(engine("other"))))
    answers = [client.post("/v1/completions", json={"model": model}).json() for model in ("a", "b")]
    assert answers == [{"engine": "own", "asked": "a"}, {"engine": "other", "asked": "b"}]
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["own", "other"]
