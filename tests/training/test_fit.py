"""Fitting a tiny pair with two workers: every ZeRO stage, and a worker that dies."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

import crosslora
from crosslora import cluster
from crosslora.config import Config
from crosslora.run_folder import RunFolder
from crosslora.training.fit import fit
from tests.tiny_pair import make_pair, tiny_config

pytestmark = [pytest.mark.real, pytest.mark.slow]
CORPUS = ("synthesize/tiny", "filter/tiny")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("tiny pair"))


@pytest.fixture(scope="module")
def run(pair: Path) -> Path:
    """A finished run, fitted with ZeRO-2."""
    crosslora.transfer(tiny_config(pair, pair / "run"))
    return pair / "run"


def _losses(config: Config, run: Path, name: str, kill_after: int | None = None) -> dict[int, float]:
    """Fit on the run's corpus under a name of its own; loss of every step as last reported."""
    stage = RunFolder.open(str(run)).stage(name, {"name": name})
    if kill_after is not None:
        threading.Thread(
            target=_kill_a_worker, args=[run / name / "events.jsonl", kill_after], daemon=True
        ).start()
    interrupt = signal.getsignal(signal.SIGINT)
    with cluster.session(config.cluster):
        fit(config, config.adapters[0].path, CORPUS, stage)
    assert signal.getsignal(signal.SIGINT) is interrupt, "Ctrl-C means what it meant before"
    lines = [json.loads(line) for line in (run / name / "events.jsonl").read_text().splitlines()]
    if kill_after is not None:
        assert any(line["event"] == "resumed" for line in lines)
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def _kill_a_worker(events: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if events.exists() and f'"step": {step},' in events.read_text():
            workers = [
                p
                for p in psutil.process_iter(["cmdline"])
                if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])
            ]
            if workers:
                os.kill(workers[0].pid, signal.SIGKILL)
                return
        time.sleep(0.05)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_zero_stages_agree(pair: Path, run: Path, zero_stage: int) -> None:
    losses = _losses(tiny_config(pair, run, zero_stage=zero_stage), run, f"fit/zero{zero_stage}")
    lines = [json.loads(line) for line in (run / "fit/tiny/events.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    assert losses == pytest.approx(
        expected, rel=0.05
    )  # ZeRO's dummy Adam step makes the first steps differ a little


def test_a_killed_worker_resumes_with_the_same_losses(pair: Path, run: Path) -> None:
    config = tiny_config(pair, run, steps=60, checkpoint_every=10, evaluate_every=30)
    undisturbed = _losses(config, run, "fit/undisturbed")
    disturbed = _losses(config, run, "fit/disturbed", kill_after=15)
    assert disturbed == pytest.approx(undisturbed, abs=1e-6)
