"""What the shelf makes of reports that overlap; with real replicas: tests/test_endpoint.py."""

import asyncio
from pathlib import Path
from typing import Any

from crosslora.adapter_places import Places
from crosslora.adapter_watch import Change, Rules
from crosslora.shelf import SERVED, Shelf


class SlowBoard:
    """Takes a while to hear something, as the first call to an actor does."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.add = self

    async def remote(self, event: dict[str, Any]) -> None:
        await asyncio.sleep(0.01)
        self.told.append((event["adapter"], event["event"]))


def test_replicas_may_report_at_the_same_time(tmp_path: Path) -> None:
    async def story() -> list[tuple[str, str]]:
        shelf_class: Any = Shelf.func_or_class  # type: ignore[attr-defined]  # without Ray Serve around it
        board, shelf = SlowBoard(), shelf_class.__new__(shelf_class)
        rules = Rules("base", None, None, {"max_lora_rank": 8, "lora_target_modules": []})
        await shelf.__init__(Places((str(tmp_path),)), rules, board)
        await shelf._apply([Change(name, "state", files={}) for name in ("one", "two", "three")])
        version = shelf._version
        await asyncio.gather(*(shelf.report(replica, version, {}) for replica in ("a", "b")))
        shelf._looking.cancel()
        return board.told

    assert sorted(asyncio.run(story())) == [(name, SERVED) for name in ("one", "three", "two")]
