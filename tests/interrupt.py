"""A transfer as a terminal would start it, to be interrupted or killed."""

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
    """The command in a process group of its own, on the configuration and the run of the tiny pair in `folder`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.mark, self.folder = uuid.uuid4().hex, folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crosslora", "transfer", str(folder / "config.yaml"), *options],
            env={**os.environ, MARK: self.mark},
            start_new_session=True,
        )

    def wait_for(self, stage: str, text: str) -> None:
        file = _events_file(self.folder, stage)
        while not (file.exists() and text in file.read_text()):
            assert self.process.poll() is None, "the transfer ended by itself"
            time.sleep(0.1)

    def stop(self, how: signal.Signals) -> int:
        """Ctrl-C reaches the whole group, kill -9 the one process; returns the exit code when nothing is left."""
        if how == signal.SIGINT:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        deadline = time.monotonic() + 30
        while left := list(self._alive()):
            assert time.monotonic() < deadline, f"still there after 30 s: {left}"
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


def events(folder: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _events_file(folder, stage).read_text().splitlines()]


def _events_file(folder: Path, stage: str) -> Path:
    return folder / "run" / stage / "tiny" / "events.jsonl"
