"""Fitting a tiny pair: every ZeRO stage, a worker that dies, and other workers that go on."""

import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import crosslora
from crosslora import cluster
from crosslora.config import Config
from crosslora.errors import UserError
from crosslora.run_folder import RunFolder
from crosslora.training.fit import fit
from crosslora.training.record import RECORD
from tests.checkpoints import check_last_checkpoint
from tests.interrupted import events
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


@pytest.fixture(scope="module")
def undisturbed(pair: Path, run: Path) -> list[dict[str, Any]]:
    """Events of a longer fit by two workers with ZeRO-2."""
    return _fit(_long(pair, run), run, "fit/undisturbed")


def _long(pair: Path, run: Path, **fit: object) -> Config:
    return tiny_config(pair, run, steps=60, checkpoint_every=10, evaluate_every=30, **fit)


def _fit(config: Config, run: Path, name: str, kill_after: int | None = None) -> list[dict[str, Any]]:
    """Fit on the run's corpus under a name of its own; its events. Goes on where a fit of that name has been."""
    stage = RunFolder.open(str(run)).stage(name, {"name": name})
    if kill_after is not None:
        threading.Thread(
            target=_kill_a_worker, args=[run / name / "events.jsonl", kill_after], daemon=True
        ).start()
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with cluster.session(config.cluster):
            fit(config, config.adapters[0].path, CORPUS, stage)
    finally:
        assert signal.getsignal(signal.SIGINT) is interrupt, "Ctrl-C means what it meant before"
    return events(run / name / "events.jsonl")


def _losses(told: list[dict[str, Any]], kind: str = "step") -> dict[int, float]:
    """Loss of every step, or look at the held-out samples, as last reported."""
    return {event["step"]: event["loss"] for event in told if event["event"] == kind}


def _kill_a_worker(file: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if file.exists() and f'"step": {step},' in file.read_text():
            for process in psutil.Process().children(recursive=True):  # others may fit on this machine, too
                with suppress(psutil.NoSuchProcess):
                    if "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        return
        time.sleep(0.05)


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "float32"), (3, "float32"), (3, "bfloat16")])
def test_zero_stages_agree(pair: Path, run: Path, zero_stage: int, dtype: str) -> None:
    name = f"fit/zero{zero_stage} {dtype}"
    config = tiny_config(pair, run, zero_stage=zero_stage, dtype=dtype)
    losses = _losses(_fit(config, run, name))
    # ZeRO's dummy Adam step makes the first steps differ a little, bfloat16 those on the base's own text, which cost next to
    # nothing
    assert losses == pytest.approx(_losses(events(run / "fit/tiny/events.jsonl")), rel=0.05, abs=1e-3)
    check_last_checkpoint(RunFolder.open(str(run)).sub(name), config)


def test_a_checkpoint_of_zero_2_holds_what_is_learned(pair: Path, run: Path) -> None:
    check_last_checkpoint(RunFolder.open(str(run)).sub("fit/tiny"), tiny_config(pair, run))


def test_a_killed_worker_resumes_with_the_same_losses(
    pair: Path, run: Path, undisturbed: list[dict[str, Any]]
) -> None:
    disturbed = _fit(_long(pair, run), run, "fit/disturbed", kill_after=15)
    assert any(event["event"] == "resumed" for event in disturbed)
    assert _losses(disturbed) == pytest.approx(_losses(undisturbed), abs=1e-6)


def test_a_fit_goes_on_where_rays_record_was_cut_short(pair: Path, run: Path) -> None:
    name, config = "fit/cut short", _long(pair, run, max_failures=0)
    with pytest.raises(UserError, match="the workers failed 1 times"):
        _fit(config, run, name, kill_after=15)
    (record,) = (run / name).glob(f"train/*/{RECORD}")
    record.write_bytes(record.read_bytes()[:100])
    told = _fit(config, run, name)
    (resumed,) = [event["step"] for event in told if event["event"] == "resumed"]
    assert resumed in range(10, 60, 10)
    assert sorted(_losses(told)) == list(range(1, 61))


@pytest.mark.parametrize(("first", "then"), [((2, 3), (1, 1)), ((1, 1), (2, 3))])
def test_a_fit_goes_on_with_another_number_of_workers(
    pair: Path, run: Path, undisturbed: list[dict[str, Any]], first: tuple[int, int], then: tuple[int, int]
) -> None:
    """(workers, ZeRO stage) before it is lost and after. The looks at held-out samples are those of a fit that was not."""
    name = f"fit/{first[0]} then {then[0]}"
    begun, ended = (
        _long(pair, run, workers=workers, zero_stage=stage, max_failures=0)
        for workers, stage in (first, then)
    )
    with pytest.raises(UserError, match="the workers failed 1 times"):
        _fit(begun, run, name, kill_after=15)
    told = _fit(ended, run, name)
    (resumed,) = [event["step"] for event in told if event["event"] == "resumed"]
    assert resumed in range(10, 60, 10)
    assert sorted(_losses(told)) == list(range(1, 61))
    looks = _losses(told, "held_out")
    assert list(looks) == [0, 30, 60] and looks[0] > looks[30] > looks[60]
    assert looks == pytest.approx(_losses(undisturbed, "held_out"), rel=1e-4)
    check_last_checkpoint(RunFolder.open(str(run)).sub(name), ended)
