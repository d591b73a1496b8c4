"""Answers from any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import os
import time

from openai import AsyncOpenAI, OpenAIError

from crosslora.errors import UserError
from crosslora.evaluation.tasks import Answer, Item
from crosslora.progress import Meter, progress
from crosslora.text.templates import ChatFormat


def ask(
    url: str, model: str, items: list[Item], chat: ChatFormat, max_tokens: int, concurrency: int
) -> list[Answer]:
    """Greedy answers, in order. Prompts travel as token ids, so that the endpoint cannot add or lose a BOS."""

    async def run() -> list[Answer]:
        gate = asyncio.Semaphore(concurrency)
        with progress(f"evaluate {model}", len(items), "answers") as meter:
            async with connect(url) as client:
                return await asyncio.gather(
                    *(_answer(client, model, item, chat, max_tokens, gate, meter) for item in items)
                )

    return asyncio.run(run())


def served_models(url: str) -> list[str]:
    """Names that an endpoint lists; raises UserError where it does not answer."""

    async def run() -> list[str]:
        async with connect(url) as client:
            return [model.id async for model in client.with_options(max_retries=0).models.list()]

    try:
        return asyncio.run(run())
    except OpenAIError as error:
        raise UserError(
            f"--url {url}: no OpenAI-compatible endpoint answers there ({error}); it ends in /v1, and OPENAI_API_KEY is "
            "its key where it wants one"
        ) from None


def connect(url: str) -> AsyncOpenAI:
    """A client that tries again: a replica that is lost takes its requests with it, and Ray Serve brings another."""
    key = os.environ.get("OPENAI_API_KEY") or "none"
    return AsyncOpenAI(base_url=url, api_key=key, timeout=600, max_retries=8)


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
            extra_body={"stop_token_ids": sorted(chat.stop_ids)},
        )
    meter.advance(1)
    choice = completion.choices[0]
    tokens = completion.usage.completion_tokens if completion.usage else 0
    return Answer(choice.text, choice.finish_reason == "stop", tokens, begun, time.monotonic())
