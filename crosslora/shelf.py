"""The adapters that an endpoint serves, for all its replicas on all nodes, while they come, change and go."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any

from ray import serve

from crosslora.adapter_places import Places
from crosslora.adapter_watch import Change, Files, Rules, Watch

SECONDS_BETWEEN_LOOKS = 2.0
SERVED, REFUSED, GONE = "serving", "not serving", "no longer serving"
POLL_SECONDS = 5.0
"""How long a replica waits for a change before it says again that it is there."""


@serve.deployment(
    max_ongoing_requests=10_000,
    ray_actor_options={"num_cpus": 0},
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=0.5,
)
class Shelf:
    """Holds what lies in the places. Every replica waits here for changes, takes what it lacks and says so."""

    async def __init__(  # type: ignore[misc] # Ray Serve awaits it
        self, places: Places, rules: Rules, board: Any
    ) -> None:
        """board: where the program that started this reads what comes and goes; None where there is no such program."""
        self._adapters: dict[str, tuple[str, Files]] = {}
        """State and files of what is served."""
        self._tokenizer: Files = {}
        self._version = 0
        self._changed = asyncio.Condition()
        self._replicas: dict[str, tuple[int, float]] = {}
        """The version that each one serves, and when it said so."""
        self._refused: dict[str, str] = {}
        """Why a replica cannot serve an adapter."""
        self._coming: dict[str, int] = {}
        """Adapters that not all replicas serve yet, and since which version they should."""
        self._board = board
        watch = Watch(places, rules)
        await self._apply(watch.look())
        self._looking = asyncio.create_task(self._look_on(watch))

    async def after(self, version: int) -> tuple[int, dict[str, str]]:
        """Version of the whole and state of each adapter in it: when it is newer than `version`, or after seconds."""
        async with self._changed:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._version > version), POLL_SECONDS)
            return self._version, {name: state for name, (state, _) in self._adapters.items()}

    async def tokenizer(self) -> Files:
        """Files of the tokenizer that all are served with; none for the base's own."""
        return self._tokenizer

    async def files(self, name: str) -> Files | None:
        """Files of an adapter; None where it was removed in the meantime."""
        return self._adapters[name][1] if name in self._adapters else None

    async def report(self, replica: str, version: int, refused: dict[str, str]) -> None:
        """A replica serves what `after` gave as `version`, without those that it had to refuse, and says why."""
        now = time.monotonic()
        self._replicas[replica] = (version, now)
        # what it says of a version that was replaced meanwhile is no news of the new one
        self._refused |= {name: why for name, why in refused.items() if self._coming.get(name, 0) <= version}
        slowest = min(version for version, said in self._replicas.values() if now - said < 3 * POLL_SECONDS)
        news = [(name, self._refused.get(name)) for name, since in self._coming.items() if since <= slowest]
        for name, _ in news:  # before the first await: another replica may report meanwhile
            del self._coming[name]
        for name, reason in news:
            await self._tell(name, SERVED if reason is None else REFUSED, reason)

    async def _look_on(self, watch: Watch) -> None:
        problem = ""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            try:
                await self._apply(await asyncio.to_thread(watch.look))
                problem = ""
            except Exception as error:  # a store that is out of reach, say: no reason to serve less
                if str(error) != problem:
                    problem = str(error)
                    await self._tell("adapters", "cannot look for", problem)

    async def _apply(self, changes: list[Change]) -> None:
        if not changes:
            return
        async with self._changed:
            self._version = time.time_ns()  # grows from one start of this shelf to the next, too
            for change in changes:
                await self._put(change)
            self._changed.notify_all()

    async def _put(self, change: Change) -> None:
        name = change.name
        was_served = self._adapters.pop(name, None) is not None and name not in self._refused
        self._refused.pop(name, None)
        self._coming.pop(name, None)
        if change.files is not None:
            self._adapters[name] = (change.state, change.files)
            self._tokenizer = self._tokenizer or change.tokenizer or {}
            self._coming[name] = self._version
        elif change.problem is not None:
            self._refused[name] = change.problem
            await self._tell(name, REFUSED, change.problem)
        elif was_served:
            await self._tell(name, GONE)

    async def _tell(self, name: str, event: str, why: str | None = None) -> None:
        if self._board is not None:
            await self._board.add.remote({"event": event, "adapter": name, "why": why})
        elif event != SERVED:
            logging.getLogger(__name__).warning("%s %s: %s", event, name, why)
