"""The adapters that an endpoint serves, for all its replicas on all nodes, while they come, change and go."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from ray import serve

from crosslora.adapter_places import Places
from crosslora.adapter_watch import Change, Files, Rules, Watch
from crosslora.errors import UserError

SECONDS_BETWEEN_LOOKS = 2.0
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

    async def __init__(self, places: Places, rules: Rules) -> None:  # type: ignore[misc]
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
        self._news: list[tuple[int, str]] = []
        """When, in nanoseconds, and what."""
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
        self._refused |= refused
        slowest = min(version for version, said in self._replicas.values() if now - said < 3 * POLL_SECONDS)
        for name in [name for name, since in self._coming.items() if since <= slowest]:
            del self._coming[name]
            reason = self._refused.get(name)
            self._tell(f"serving {name}" if reason is None else f"not serving {name}: {reason}")

    async def refused(self) -> dict[str, str]:
        """Adapters that were found and are not served, and why."""
        return self._refused

    async def news(self, after: int) -> list[tuple[int, str]]:
        """What came and went after a time in nanoseconds."""
        return [(when, line) for when, line in self._news if when > after]

    def _tell(self, line: str) -> None:
        self._news.append((time.time_ns(), line))

    async def _look_on(self, watch: Watch) -> None:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            try:
                await self._apply(await asyncio.to_thread(watch.look))
            except (OSError, UserError) as error:  # a store that is out of reach is no reason to serve less
                logging.getLogger(__name__).warning("looking for adapters: %s", error)

    async def _apply(self, changes: list[Change]) -> None:
        if not changes:
            return
        async with self._changed:
            self._version = time.time_ns()  # grows from one start of this shelf to the next, too
            for change in changes:
                self._put(change)
            self._changed.notify_all()

    def _put(self, change: Change) -> None:
        name = change.name
        self._refused.pop(name, None)
        self._coming.pop(name, None)
        was_served = self._adapters.pop(name, None) is not None
        if change.files is not None:
            self._adapters[name] = (change.state, change.files)
            self._tokenizer = self._tokenizer or change.tokenizer or {}
            self._coming[name] = self._version
        elif change.problem is not None:
            self._refused[name] = change.problem
            self._tell(f"not serving {name}: {change.problem}")
        elif was_served:
            self._tell(f"no longer serving {name}")
