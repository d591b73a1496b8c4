"""Teacher-forced likelihood through an endpoint: of reference answers, and of plain text that no task is about."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from pydoc_data.topics import topics

import numpy as np
from openai import AsyncOpenAI

from crosslora.evaluation.client import asked, connect
from crosslora.evaluation.tasks import Item
from crosslora.progress import Meter, progress
from crosslora.text.templates import ChatFormat

PASSAGES = 24
PASSAGE_CHARACTERS = 1200
PASSAGE_TOKENS = 256


def reference_nats(
    url: str, model: str, items: Sequence[Item], chat: ChatFormat, concurrency: int
) -> np.ndarray:
    """Nats per byte of each reference answer and its end, [n]: a signal where small models score 0.

    Per byte, because models with different tokenizers are compared; the end counts as one.
    """
    prompts = [chat.prompt_ids(item.prompt) for item in items]
    answers = [chat.answer_ids(item.reference) for item in items]
    sizes = [len(item.reference.encode()) + 1 for item in items]
    return _nats(url, model, list(zip(prompts, answers, strict=True)), concurrency) / sizes


def text_nats(url: str, model: str, chat: ChatFormat, concurrency: int, most: int) -> np.ndarray:
    """Nats per token of the first `most` tokens of each plain passage, [PASSAGES]: what an adapter should leave alone."""
    # with the BOS that the base expects
    ids = [list(chat.tokenizer(text)["input_ids"])[:most] for text in passages()]
    sizes = [len(text_ids) - 1 for text_ids in ids]
    return _nats(url, model, [(text_ids[:1], text_ids[1:]) for text_ids in ids], concurrency) / sizes


def passages() -> list[str]:
    """English prose that comes with Python: the beginnings of its language reference's longer topics."""
    longer = (topics[name] for name in sorted(topics) if len(topics[name]) >= PASSAGE_CHARACTERS)
    return [text[:PASSAGE_CHARACTERS] for text in islice(longer, PASSAGES)]


def _nats(url: str, model: str, parts: Sequence[tuple[list[int], list[int]]], concurrency: int) -> np.ndarray:
    """-log p of the second ids of each pair after the first, summed, in nats, [n]."""

    async def run() -> list[float]:
        gate = asyncio.Semaphore(concurrency)
        with progress(f"likelihood {model}", len(parts), "texts") as meter:
            async with connect(url) as client:
                return await asyncio.gather(*(_one(client, model, *part, gate, meter) for part in parts))

    return np.array(asked(url, run()))


async def _one(
    client: AsyncOpenAI,
    model: str,
    given: list[int],
    scored: list[int],
    gate: asyncio.Semaphore,
    meter: Meter,
) -> float:
    async with gate:
        completion = await client.completions.create(
            model=model, prompt=[*given, *scored], max_tokens=1, temperature=0, echo=True, logprobs=0
        )
    meter.advance(1)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    return -sum(logprobs.token_logprobs[len(given) : len(given) + len(scored)])
