"""The whole transfer on a tiny pair: vLLM, Ray Train with DeepSpeed on two workers, Ray Serve, peft.

Where test_interruptions.py ran before, the Ray job goes on with the run that it left in the middle of fitting.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import crosslora
from crosslora import cluster
from crosslora.config import Config
from crosslora.errors import UserError
from crosslora.evaluation.harness import evaluate_run, find_benchmarks
from crosslora.run_folder import RunFolder, stage_states
from crosslora.serving import free_port
from crosslora.training.fit import check_corpus, fit
from tests.interrupt import Transfer, events
from tests.tiny import write_benchmarks
from tests.tiny_pair import tiny_config

pytestmark = pytest.mark.real
CORPUS = ("synthesize/tiny", "filter/tiny")
ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def run(pair: Path) -> Path:
    """The run, ended (or made, where nothing began it) by `ray job submit` on a cluster of one node."""
    job = ["python", "ray_jobs/transfer.py", "--config", pair / "config.yaml", "cluster.address=auto"]
    with head_node() as ray_command:
        ray_command("job", "submit", "--working-dir", ".", "--", *job)
    return pair / "run"


@contextmanager
def head_node() -> Iterator[Callable[..., None]]:
    """A Ray cluster outside this process; yields a function that runs the `ray` command against it."""
    port, jobs, agent = (free_port("127.0.0.1", 0) for _ in range(3))
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{jobs}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
    }

    def ray_command(*arguments: str | Path) -> None:
        subprocess.run([BIN / "ray", *arguments], env=environment, cwd=ROOT, check=True)

    # Without a port of its own the agent that starts jobs gives up where another Ray still holds the usual one.
    ports = [f"--port={port}", f"--dashboard-port={jobs}", f"--dashboard-agent-listen-port={agent}"]
    node = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", *ports], env=environment
    )
    try:
        for attempt in range(20):
            with suppress(subprocess.CalledProcessError):
                ray_command("job", "submit", "--", "true")
                break
            assert attempt < 19, "the cluster runs no jobs"
        yield ray_command
    finally:
        node.terminate()
        node.wait()


def test_every_stage_is_done_and_reports(run: Path) -> None:
    assert set(stage_states(RunFolder.open(str(run))).values()) == {"done"}
    results = json.loads((run / "evaluate/tiny/results.json").read_text())
    assert set(results["tasks"]["say"]["models"]) == {
        "teacher", "target_base", "random", "crop", "closed_form", "student",
    }  # fmt: skip
    assert (run / "evaluate/tiny/chart.png").read_bytes().startswith(b"\x89PNG")
    assert "| student |" in (run / "evaluate/tiny/report.md").read_text()


def test_the_result_is_an_ordinary_adapter_that_acts(pair: Path, run: Path) -> None:
    folder = run / "export/tiny"
    base = AutoModelForCausalLM.from_pretrained(pair / "target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say river"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and ids[0, 1] != tokenizer.bos_token_id
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder)(ids).logits
    assert not torch.allclose(plain, adapted, atol=1e-3)


def test_an_interrupted_fit_went_on_from_a_checkpoint(pair: Path, run: Path) -> None:
    fitted = events(pair, "fit")
    resumed = [event["step"] for event in fitted if event["event"] == "resumed"]
    if not resumed:
        pytest.skip("test_interruptions.py did not run before")
    assert resumed[0] >= 8, "what was checkpointed before Ctrl-C at step 10"
    steps = [event["step"] for event in fitted if event["event"] == "step"]
    redone = {step for step in steps if steps.count(step) > 1}
    assert len(redone) <= 4, "at most checkpoint_every steps are done again"
    assert set(steps) == set(range(1, 41))


def test_too_little_coverage_is_refused_before_a_worker_starts(pair: Path, run: Path) -> None:
    stage = RunFolder.open(str(run)).stage("fit/floor", {})
    with pytest.raises(UserError, match=r"coverage 0\.\d+ is below fit.min_coverage = 1.0"):
        check_corpus(tiny_config(pair, run, min_coverage=1.0), stage, CORPUS)


def test_done_work_is_not_done_again(pair: Path, run: Path) -> None:
    started = time.monotonic()
    crosslora.transfer(tiny_config(pair, run))
    assert time.monotonic() - started < 30
    assert [event["event"] for event in events(pair, "evaluate")].count("start") == 1


def test_changed_inputs_are_refused_with_the_difference(pair: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"fit\.steps: 40 -> 13.*--redo fit"):
        crosslora.transfer(tiny_config(pair, run, steps=13))


def _losses(config: Config, run: Path, name: str, kill_after: int | None = None) -> dict[int, float]:
    """Fit on the run's corpus under a name of its own; loss of every step as last reported."""
    stage = RunFolder.open(str(run)).stage(name, {"name": name})
    if kill_after is not None:
        threading.Thread(
            target=_kill_a_worker, args=[run / name / "events.jsonl", kill_after], daemon=True
        ).start()
    with cluster.session(config.cluster):
        fit(config, config.adapters[0].path, CORPUS, stage)
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


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_zero_stages_agree(pair: Path, run: Path, zero_stage: int) -> None:
    config = tiny_config(pair, run, zero_stage=zero_stage)
    losses = _losses(config, run, f"fit/zero{zero_stage}")
    lines = [json.loads(line) for line in (run / "fit/tiny/events.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    assert losses == pytest.approx(
        expected, rel=0.05
    )  # ZeRO's dummy Adam step makes the first steps differ a little


@pytest.mark.slow
def test_a_killed_worker_resumes_with_the_same_losses(pair: Path, run: Path) -> None:
    config = tiny_config(pair, run, steps=60, checkpoint_every=10, evaluate_every=30)
    undisturbed = _losses(config, run, "fit/undisturbed")
    disturbed = _losses(config, run, "fit/disturbed", kill_after=15)
    assert disturbed == pytest.approx(undisturbed, abs=1e-6)


@pytest.mark.slow
def test_standard_benchmarks_of_a_run(run: Path, tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    results = evaluate_run(str(run), find_benchmarks(["mmlu", "gsm8k"], tmp_path, 4))
    tasks = results["tiny"]["tasks"]
    assert {name: (task["n"], set(task["models"])) for name, task in tasks.items()} == {
        "mmlu": (4, {"teacher", "target_base", "student"}),
        "gsm8k": (2, {"teacher", "target_base", "student"}),
    }
    assert json.loads((run / "harness/tiny/results.json").read_text()) == results["tiny"]


def test_killed_in_evaluation(pair: Path, run: Path) -> None:
    """The last test: the run's evaluation is gone after it."""
    transfer = Transfer(pair, "--redo", "evaluate")
    while (run / "evaluate/tiny/manifest.json").exists():
        assert transfer.process.poll() is None, "the transfer ended by itself"
        time.sleep(0.1)
    transfer.wait_for("evaluate", '"start"')
    time.sleep(5)  # Ray Serve is starting its first replica
    assert transfer.stop(signal.SIGKILL) == -signal.SIGKILL
    assert (run / "export/tiny/manifest.json").exists()
