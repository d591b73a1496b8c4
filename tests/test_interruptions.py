"""Killed or interrupted in any stage, a run goes on with the same command, and no process is left 30 s later."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.tiny_pair import make_pair, tiny_config

pytestmark = pytest.mark.real
MARK = "CROSSLORA_TEST_RUN"
"""Environment variable that every process of a run inherits."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_pair(tmp_path_factory.mktemp("interrupted pair"))
    config = tiny_config(folder, folder / "run", steps=40, patience=100)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


class Transfer:
    """The command in a process group of its own, as a terminal would start it."""

    def __init__(self, folder: Path) -> None:
        self.mark, self.run = uuid.uuid4().hex, folder / "run"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crosslora", "transfer", str(folder / "config.yaml")],
            env={**os.environ, MARK: self.mark},
            start_new_session=True,
        )

    def wait_for(self, stage: str, text: str) -> None:
        file = self.run / stage / "tiny" / "events.jsonl"
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


def events(folder: Path, stage: str) -> list[dict[str, object]]:
    return [
        json.loads(line) for line in (folder / "run" / stage / "tiny/events.jsonl").read_text().splitlines()
    ]


def test_killed_in_synthesis(folder: Path) -> None:
    transfer = Transfer(folder)
    transfer.wait_for("synthesize", '"shard": 0')
    assert transfer.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not (folder / "run/synthesize/tiny/manifest.json").exists()


def test_interrupted_in_fitting(folder: Path) -> None:
    first_shard = (folder / "run/synthesize/tiny/shard-00000.parquet").stat().st_mtime_ns
    transfer = Transfer(folder)
    transfer.wait_for("fit", '"step": 10,')
    assert transfer.stop(signal.SIGINT) == 1
    assert (folder / "run/synthesize/tiny/shard-00000.parquet").stat().st_mtime_ns == first_shard
    shards = [event["shard"] for event in events(folder, "synthesize") if event["event"] == "shard"]
    assert shards == [0, 1]


def test_killed_in_evaluation(folder: Path) -> None:
    transfer = Transfer(folder)
    transfer.wait_for("evaluate", '"start"')
    time.sleep(5)  # Ray Serve is starting its first replica
    assert transfer.stop(signal.SIGKILL) == -signal.SIGKILL
    fitted = events(folder, "fit")
    resumed = next(event["step"] for event in fitted if event["event"] == "resumed")
    before = [event["step"] for event in fitted if event["event"] == "step"]
    assert isinstance(resumed, int) and resumed >= 4, "it goes on from a checkpoint"
    redone = {step for step in before if before.count(step) > 1}
    assert len(redone) <= 4, "at most checkpoint_every steps are done again"
    assert (folder / "run/export/tiny/manifest.json").exists()
