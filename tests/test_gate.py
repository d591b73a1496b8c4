"""Which requests reach vLLM's app, with an app in its place that says what it got."""

import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from crosslora.gate import LARGEST_BODY, Gate

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETION = {"model": "m", "prompt": "Hello"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = Starlette()

    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse(f"{request.method} {(await request.body()).decode()}")

    app.add_route("/{path:path}", echo, methods=["GET", "POST", "DELETE"])
    app.add_middleware(Gate)
    return TestClient(app)


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models"])
def test_what_is_read_gets_through(client: TestClient, path: str) -> None:
    assert client.get(path).text == "GET "


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/completions", {**COMPLETION, "prompt": [1, 2, 3], "logprobs": 0, "echo": True, "stop": ["a"]}),
        ("/v1/completions", {**COMPLETION, "prompt": [[1, 2], [3]], "temperature": 0, "seed": 1234, "n": 2}),
        ("/v1/chat/completions", CHAT),
        (
            "/v1/chat/completions",
            {
                **CHAT,
                "messages": [
                    {
                        "role": "assistant",
                        "content": "Hi",
                        "refusal": None,
                        "tool_calls": [],
                        "reasoning": None,
                    },
                    {"role": "user", "content": [{"type": "text", "text": "Go on"}]},
                ],
            },
        ),
        ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ],
)
def test_known_fields_get_through_as_they_are(client: TestClient, path: str, body: dict[str, Any]) -> None:
    content = json.dumps(body)
    assert client.post(path, content=content).text == f"POST {content}"


@pytest.mark.parametrize(
    ("path", "change", "place"),
    [
        ("/v1/completions", {"n": 17}, "n"),
        ("/v1/completions", {"logprobs": 262_144}, "logprobs"),
        ("/v1/completions", {"max_tokens": -1}, "max_tokens"),
        ("/v1/completions", {"temperature": "hot"}, "temperature"),
        ("/v1/completions", {"prompt": [["a"]]}, "prompt"),
        ("/v1/completions", {"stop": ["x"] * 17}, "stop"),
        ("/v1/completions", {"structured_outputs": {"regex": "(a+)+"}}, "structured_outputs"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"chat_template": "{{ 1 }}"}, "chat_template"),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1"}}],
                    }
                ]
            },
            "messages.0.content",
        ),
    ],
)
def test_all_else_is_named(client: TestClient, path: str, change: dict[str, Any], place: str) -> None:
    answer = client.post(path, json={**(CHAT if "chat" in path else COMPLETION), **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(place)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": "m", "prompt": "\xff"}'])
def test_what_is_no_request_is_refused(client: TestClient, body: bytes) -> None:
    assert client.post("/v1/completions", content=body).status_code == 400


def test_a_long_body_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/completions", content=b" " * (LARGEST_BODY + 1))
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/tokenize"),
        ("POST", "/v1/load_lora_adapter"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("POST", "/v1/responses"),
        ("DELETE", "/v1/models"),
        ("POST", "/v1/completions/"),
    ],
)
def test_no_other_route_exists(client: TestClient, method: str, path: str) -> None:
    assert client.request(method, path, json=COMPLETION).status_code == 404
