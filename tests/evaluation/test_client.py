"""Asking endpoints, wherever one is asked from."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from crosslora.errors import UserError
from crosslora.evaluation.client import asked, served_models


@contextmanager
def answering(kind: str, body: str) -> Iterator[str]:
    """URL of a server that answers everything with one body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_an_adapter_has_the_room_of_its_base() -> None:
    """vLLM says that of the base alone."""
    listed = [
        {"id": "base", "max_model_len": 512},
        {"id": "mine", "parent": "base", "max_model_len": None},
        {"id": "other"},
    ]
    with answering("application/json", json.dumps({"object": "list", "data": listed})) as url:
        assert served_models(url) == {"base": 512, "mine": 512, "other": float("inf")}


def test_a_web_page_is_no_endpoint() -> None:
    with (
        answering("text/html", "<html>log in</html>") as url,
        pytest.raises(UserError, match="its address ends in /v1"),
    ):
        served_models(url)


async def answer() -> str:
    await asyncio.sleep(0)
    return "yes"


def test_a_notebook_may_ask_too() -> None:
    """It runs a loop already, in which another cannot be started."""

    async def cell() -> str:
        return asked("http://127.0.0.1/v1", answer())

    assert asyncio.run(cell()) == asked("http://127.0.0.1/v1", answer()) == "yes"
