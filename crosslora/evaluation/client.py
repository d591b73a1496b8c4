"""Answers from any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError, Timeout

from crosslora.errors import UserError
from crosslora.evaluation.tasks import Answer, Item
from crosslora.progress import Meter, progress
from crosslora.text.templates import ChatFormat

T = TypeVar("T")
GREEDY = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""A request without them gets the penalties of the base's generation_config.json, also at temperature 0."""


def ask(
    url: str, model: str, items: list[Item], chat: ChatFormat, max_tokens: int, concurrency: int
) -> list[Answer]:
    """Greedy answers, in order. Prompts travel as token ids, so that the endpoint cannot add or lose a BOS.

    Raises UserError where the endpoint refuses a request."""

    async def run() -> list[Answer]:
        gate = asyncio.Semaphore(concurrency)
        with progress(f"evaluate {model}", len(items), "answers") as meter:
            async with connect(url) as client:
                return await asyncio.gather(
                    *(_answer(client, model, item, chat, max_tokens, gate, meter) for item in items)
                )

    return asked(url, run())


def asked(url: str, work: Coroutine[Any, Any, T]) -> T:
    """Result of requests to an endpoint; raises UserError where it refuses one."""
    try:
        return _run(work)
    except OpenAIError as error:
        raise UserError(
            f"{url}: no OpenAI-compatible endpoint answers there as it should ({str(error)[:300]}); its address ends in /v1, "
            "and OPENAI_API_KEY is its key where it wants one"
        ) from error


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:  # a notebook runs a loop of its own, and a thread has but one
        return thread.submit(asyncio.run, work).result()


def served_models(url: str) -> dict[str, float]:
    """Names that an endpoint lists, and the tokens that each of them has for a prompt and its answer, infinite where it
    does not say; raises UserError where it does not answer."""

    async def run() -> dict[str, float]:
        async with connect(url) as client:
            models = {
                model.id: model.model_extra or {}
                async for model in client.with_options(max_retries=0).models.list()
            }
            # vLLM says the length of a base alone, and the base of an adapter
            bases = {name: models.get(str(said.get("parent")), said) for name, said in models.items()}
            return {name: said.get("max_model_len") or float("inf") for name, said in bases.items()}

    try:
        return asked(url, run())
    except AttributeError as error:  # the client takes a web page for the list
        raise UserError(
            f"{url}: answers with something else than a list of models; its address ends in /v1"
        ) from error


def connect(url: str) -> AsyncOpenAI:
    """A client that tries again: a replica that is lost takes its requests with it, and Ray Serve brings another."""
    key = os.environ.get("OPENAI_API_KEY") or "none"
    near = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")  # no proxy leads there
    return AsyncOpenAI(
        base_url=url,
        api_key=key,
        timeout=Timeout(None, connect=60),  # all answers of a slow machine may come at the end
        max_retries=8,
        http_client=DefaultAsyncHttpxClient(trust_env=False) if near else None,
    )


async def _answer(
    client: AsyncOpenAI,
    model: str,
    item: Item,
    chat: ChatFormat,
    max_tokens: int,
    gate: asyncio.Semaphore,
    meter: Meter,
) -> Answer:
    async with gate:
        begun = time.monotonic()
        completion = await client.completions.create(
            model=model,
            prompt=chat.prompt_ids(item.prompt),
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"stop_token_ids": sorted(chat.stop_ids), **GREEDY},
        )
    meter.advance(1)
    choice = completion.choices[0]
    tokens = completion.usage.completion_tokens if completion.usage else 0
    return Answer(choice.text, choice.finish_reason == "stop", tokens, begun, time.monotonic())
