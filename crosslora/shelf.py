"""The adapters that an endpoint serves and its tokenizer, for all replicas on all nodes, while adapters change."""

from __future__ import annotations

import asyncio

Files = dict[str, bytes]
"""name -> content"""


class Shelf:
    """An actor. The driver puts adapters on it; every replica waits here for changes, takes what it lacks and says so.

    `tokenizer`: files of the one that all are served with; empty for the base's own.
    """

    def __init__(self, tokenizer: Files) -> None:
        self._tokenizer = tokenizer
        self._adapters: dict[str, tuple[int, Files]] = {}
        self._version = 0
        self._adopted: dict[str, int] = {}
        self._changed = asyncio.Condition()

    async def change(self, put: dict[str, Files], remove: list[str]) -> int:
        """Add or replace the adapters `put`, drop those in `remove`; returns the new version of the whole."""
        async with self._changed:
            self._version += 1
            self._adapters |= {name: (self._version, files) for name, files in put.items()}
            for name in remove:
                self._adapters.pop(name, None)
            self._changed.notify_all()
            return self._version

    async def after(self, version: int) -> tuple[int, dict[str, int]]:
        """Wait until the whole is newer than `version`: its version, and the version of each adapter in it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._version > version)
            return self._version, {name: version for name, (version, _) in self._adapters.items()}

    async def tokenizer(self) -> Files:
        return self._tokenizer

    async def files(self, name: str) -> Files | None:
        """Files of an adapter; None where it was removed in the meantime."""
        return self._adapters[name][1] if name in self._adapters else None

    async def adopted(self, replica: str, version: int) -> None:
        """A replica serves what `after` gave as `version`."""
        async with self._changed:
            self._adopted[replica] = version
            self._changed.notify_all()

    async def adopted_by(self, replicas: int, version: int, seconds: float) -> bool:
        """Whether so many replicas serve `version`, or a newer one, before `seconds` are over."""

        def enough() -> bool:
            return sum(adopted >= version for adopted in self._adopted.values()) >= replicas

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(enough), seconds)
            except TimeoutError:
                return False
            return True
