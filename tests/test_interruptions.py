"""Killed or interrupted, a run goes on with the same command, and no process is left 30 s later.

test_pipeline.py ends this run, and kills it in evaluation.
"""

import signal
from pathlib import Path

import pytest

from tests.interrupt import Transfer, events

pytestmark = pytest.mark.real


def test_killed_in_synthesis(pair: Path) -> None:
    transfer = Transfer(pair)
    transfer.wait_for("synthesize", '"shard": 0')
    assert transfer.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not (pair / "run/synthesize/tiny/manifest.json").exists()


def test_interrupted_in_fitting(pair: Path) -> None:
    first_shard = (pair / "run/synthesize/tiny/shard-00000.parquet").stat().st_mtime_ns
    transfer = Transfer(pair)
    transfer.wait_for("fit", '"step": 10,')
    assert transfer.stop(signal.SIGINT) == 1
    assert (pair / "run/synthesize/tiny/shard-00000.parquet").stat().st_mtime_ns == first_shard
    shards = [event["shard"] for event in events(pair, "synthesize") if event["event"] == "shard"]
    assert shards == [0, 1]
