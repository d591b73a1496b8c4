"""The command as a terminal would start it, to be interrupted or killed."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

MARK = "CROSSLORA_TEST_RUN"
"""Environment variable that every process of a run inherits."""


class Transfer:
    """`crosslora transfer` in a process group of its own."""

    def __init__(self, config: Path, *options: str) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crosslora", "transfer", str(config), *options],
            env={**os.environ, MARK: self.mark},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # a shell's background job ignores it
        )

    def wait_for(self, events_file: Path, text: str, seconds: float = 900) -> None:
        deadline = time.monotonic() + seconds
        while not (events_file.exists() and text in events_file.read_text()):
            assert self.process.poll() is None, "the transfer ended by itself"
            assert time.monotonic() < deadline, f"no {text!r} in {events_file} within {seconds} s"
            time.sleep(0.1)

    def stop(self, how: signal.Signals) -> int:
        """Ctrl-C reaches the whole group, kill -9 the one process; returns the exit code when nothing is left."""
        if how == signal.SIGINT:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        deadline = time.monotonic() + 180
        while left := list(self._alive()):
            assert time.monotonic() < deadline, f"still there after 180 s: {left}"
            self.process.poll()
            time.sleep(0.2)
        return self.process.wait()

    def _alive(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except psutil.Error:
                continue


def events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]
