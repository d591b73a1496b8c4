"""Asking endpoints, wherever one is asked from."""

import asyncio

from crosslora.evaluation.client import asked


async def answer() -> str:
    await asyncio.sleep(0)
    return "yes"


def test_a_notebook_may_ask_too() -> None:
    """It runs a loop already, in which another cannot be started."""

    async def cell() -> str:
        return asked("http://127.0.0.1/v1", answer())

    assert asyncio.run(cell()) == asked("http://127.0.0.1/v1", answer()) == "yes"
