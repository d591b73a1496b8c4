"""Progress of long work: a bar with rate and time left on a terminal, else a line every so often."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 15.0
SECONDS_FOR_A_RATE = 5.0
"""What is shorter says little: answers that were asked for at once also come at once."""
LOG_WIDTH = 200
"""Columns of a file or a job's log, which does not say how wide it is: rich's 80 would cut tables."""
console = Console(stderr=True, highlight=False)


class Meter:
    """Counts work done; `advance` may be called as often as wanted."""

    def __init__(self, title: str, total: int, unit: str, bar: Progress | None) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._bar = bar
        self._task = None if bar is None else bar.add_task(title, total=total, note="")
        self._last_line = time.monotonic()
        self._began: float | None = None
        self._first = 0

    def start_at(self, done: int) -> None:
        """Work found done already: it counts, but not in the rate."""
        self.done = done
        self.advance(0)

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount
        if amount and self._began is None:
            # The rate begins with the first piece: before it, engines may load.
            self._began, self._first = time.monotonic(), self.done
        if self._bar is not None and self._task is not None:
            rate = self._rate()
            pace = f"{rate:.3g} {self.unit}/s " if rate else ""
            self._bar.update(self._task, completed=self.done, note=pace + note)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or self.done >= self.total:
            self._last_line = time.monotonic()
            print(self._line(note), file=sys.stderr, flush=True)

    def _rate(self) -> float:
        seconds = 0.0 if self._began is None else time.monotonic() - self._began
        return (self.done - self._first) / seconds if seconds >= SECONDS_FOR_A_RATE else 0.0

    def _line(self, note: str) -> str:
        rate = self._rate()
        pace = f", {rate:.3g}/s, {(self.total - self.done) / rate:.0f} s left" if rate > 0 else ""
        return f"{self.title}: {self.done}/{self.total} {self.unit}{pace} {note}".rstrip()


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Meter]:
    if not console.is_terminal:
        yield Meter(title, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Meter(title, total, unit, bar)


def say(text: str) -> None:
    """One line for a person, beside the bars."""
    console.print(text, soft_wrap=True)


def output() -> Console:
    """Standard output, for what a command was asked for."""
    printed = Console(highlight=False)
    if not printed.is_terminal:
        printed.width = LOG_WIDTH
    return printed
