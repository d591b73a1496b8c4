"""The real adapter moves between the two real models (`make models` makes their folders), in a short run.

The tests are one story, told in order: the run is killed, interrupted, and ended by `ray job submit`. The fit that one
worker began is ended by two with ZeRO-2 (tests/test_nodes.py has ZeRO-3). Each test also works alone: whatever the run still lacks is then made by the job.
"""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import crosslora
from crosslora.config import Config
from crosslora.errors import UserError
from crosslora.evaluation.harness import evaluate_run
from crosslora.run_folder import RunFolder, stage_states
from crosslora.training.fit import check_corpus
from tests.interrupted import Transfer, events
from tests.nodes import ROOT, Nodes
from tests.tiny import write_benchmarks

CORPUS = ("synthesize/snips", "filter/snips")
SHORT = (
    "synthesis.samples=112",
    "synthesis.shard_size=56",
    "synthesis.min_kept=48",
    "fit.steps=40",
    "fit.checkpoint_every=5",
    "fit.evaluate_every=40",
    "evaluation.tasks.0.items=16",
    "evaluation.held_out_items=4",
    "evaluation.baseline_items=2",
)
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (ROOT / "models").is_dir(), reason="run `make models` first"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    run = tmp_path_factory.mktemp("a run") / "run"
    return crosslora.load_config(ROOT / "examples/snips/demo.yaml", [f"run={run}", *SHORT])


@pytest.fixture(scope="module")
def config_file(config: Config) -> Path:
    file = Path(config.run).with_name("config.yaml")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return file


@pytest.fixture(scope="module")
def run(config: Config, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, ended by a job on a cluster of one node."""
    job: list[str | Path] = [
        "python",
        "ray_jobs/transfer.py",
        "--config",
        config_file,
        "cluster.address=auto",
    ]
    job += ["fit.workers=2", "fit.zero_stage=2"]
    with Nodes(tmp_path_factory.mktemp("link"), head_cpus=os.cpu_count() or 1) as nodes:
        nodes.job(*job)
        config_file.with_name("job.log").write_text(nodes.ask("logs"))
    return Path(config.run)


def test_killed_in_synthesis(config: Config, config_file: Path) -> None:
    folder = Path(config.run) / "synthesize/snips"
    transfer = Transfer(config_file)
    transfer.wait_for(folder / "events.jsonl", '"shard": 0')
    assert transfer.stop(signal.SIGKILL) == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()


def test_interrupted_in_fitting(config: Config, config_file: Path) -> None:
    folder = Path(config.run)
    first_shard = (folder / "synthesize/snips/shard-00000.parquet").stat().st_mtime_ns
    transfer = Transfer(config_file)
    transfer.wait_for(folder / "fit/snips/events.jsonl", '"step": 11,')
    assert transfer.stop(signal.SIGINT) == 1
    assert (folder / "synthesize/snips/shard-00000.parquet").stat().st_mtime_ns == first_shard
    synthesized = events(folder / "synthesize/snips/events.jsonl")
    assert [event["shard"] for event in synthesized if event["event"] == "shard"] == [0, 1]


def test_the_adapter_arrives(run: Path) -> None:
    assert set(stage_states(RunFolder.open(str(run))).values()) == {"done"}
    results = json.loads((run / "evaluate/snips/results.json").read_text())
    models = results["tasks"]["snips"]["models"]

    def intent(model: str) -> float:
        return float(models[model]["metrics"]["json_field:intent"]["mean"])

    assert list(models) == ["teacher", "target_base", "random", "crop", "closed_form", "student"]
    assert intent("teacher") >= 0.9
    assert intent("target_base") == 0.0
    assert intent("student") >= 0.4 and models["student"]["ended"] >= 0.8
    nats = {model: summary["mean"] for model, summary in results["tasks"]["snips"]["nats_per_byte"].items()}
    assert nats["teacher"] < nats["student"] < nats["target_base"]
    assert 0.5 < results["tasks"]["snips"]["rho_teacher_nats"]["value"] <= 1
    assert 0.9 < results["drift"]["perplexity_ratio"]["mean"] < 1.5
    assert set(results["speed"]) == set(models)
    assert all(0 < row["median_seconds"] <= row["p95_seconds"] for row in results["speed"].values())
    assert json.loads((run / "fit/snips/manifest.json").read_text())["coverage"] >= 0.85
    assert (run / "evaluate/snips/chart.png").read_bytes().startswith(b"\x89PNG")
    assert "| student |" in (run / "evaluate/snips/report.md").read_text()
    assert "of the teacher's gain on snips" in (run / "evaluate/snips/report.html").read_text()


def test_the_log_of_a_job_ends_with_its_results(config: Config, run: Path) -> None:
    table, _, last = run.with_name("job.log").read_text().rstrip().rpartition("\n")
    assert last == f"adapter: {config.run}/export/snips"
    results = json.loads((run / "evaluate/snips/results.json").read_text())
    for task in ("snips", "held_out"):
        result = results["tasks"][task]
        student = result["models"]["student"]["metrics"][result["metric"]]
        assert re.search(rf"{task} .* {student['mean']:.3f} ", table)
        assert f"{student['low']:.3f}-{student['high']:.3f}" in table


def test_the_fit_went_on_from_its_checkpoint(run: Path) -> None:
    fitted = events(run / "fit/snips/events.jsonl")
    if [event["event"] for event in fitted].count("start") == 1:
        pytest.skip("nothing interrupted it: the tests above did not run")
    resumed = [event["step"] for event in fitted if event["event"] == "resumed"]
    assert resumed and resumed[0] >= 10
    steps = [event["step"] for event in fitted if event["event"] == "step"]
    assert len([step for step in set(steps) if steps.count(step) > 1]) <= 5, "checkpoint_every at most"
    assert set(steps) == set(range(1, 41))


def test_the_result_is_an_ordinary_adapter_that_acts(config: Config, run: Path) -> None:
    folder = run / "export/snips"
    base = AutoModelForCausalLM.from_pretrained(config.target.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Play some jazz"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and ids[0, 1] != tokenizer.bos_token_id
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder)(ids).logits
    assert not torch.allclose(plain, adapted, atol=1e-3)


def test_too_little_coverage_is_refused_before_a_worker_starts(config: Config, run: Path) -> None:
    stage = RunFolder.open(str(run)).stage("fit/floor", {})
    floor = config.model_copy(update={"fit": config.fit.model_copy(update={"min_coverage": 1.0})})
    with pytest.raises(UserError, match=r"coverage 0\.\d+ is below fit.min_coverage = 1.0"):
        check_corpus(floor, stage, CORPUS)


def test_done_work_is_not_done_again(config: Config, run: Path) -> None:
    (moved,) = crosslora.transfer(config).adapters
    assert Path(moved.folder) == run / "export/snips" and moved.results["tasks"].keys() == {
        "snips",
        "held_out",
    }
    assert [event["event"] for event in events(run / "evaluate/snips/events.jsonl")] == ["start", "done"]


def test_changed_inputs_are_refused_with_the_difference(config: Config, run: Path) -> None:
    before = (run / "run.json").read_bytes()
    fewer = config.model_copy(update={"fit": config.fit.model_copy(update={"steps": 13})})
    with pytest.raises(UserError, match=r"fit\.steps: 40 -> 13.*--redo fit"):
        crosslora.transfer(fewer)
    settings = config.synthesis.model_copy(update={"response_temperature": 0.123})
    other_corpus = config.model_copy(update={"synthesis": settings})
    with pytest.raises(UserError, match=r"response_temperature.*--redo synthesize"):
        crosslora.transfer(other_corpus, redo="fit")
    assert (run / "run.json").read_bytes() == before
    assert set(stage_states(RunFolder.open(str(run))).values()) == {"done"}


@pytest.mark.slow
def test_standard_benchmarks_of_a_run(run: Path, tmp_path: Path) -> None:
    write_benchmarks(tmp_path)
    own = f"{ROOT}/examples/snips/test.jsonl:json_field:intent"
    results = evaluate_run(str(run), ["mmlu", "gsm8k", own], tmp_path, 4)
    tasks = results["snips"]["tasks"]
    models = ["teacher", "target_base", "random", "crop", "closed_form", "student"]
    assert {name: (task["n"], list(task["models"])) for name, task in tasks.items()} == {
        "mmlu": (4, models),
        "gsm8k": (2, models),
        "test": (4, models),
    }
    assert tasks["test"]["models"]["teacher"]["metrics"]["json_field:intent"]["mean"] > 0.5
    assert json.loads((run / "harness/snips/results.json").read_text()) == results["snips"]


@pytest.mark.slow
def test_killed_in_evaluation(config_file: Path, run: Path) -> None:
    """It goes on after the model that had said all."""
    transfer = Transfer(config_file, "--redo", "evaluate")
    while (run / "evaluate/snips/manifest.json").exists():
        assert transfer.process.poll() is None, "the transfer ended by itself"
        time.sleep(0.1)
    teacher = run / "evaluate/snips/answers/teacher.json"
    transfer.wait_for(teacher, "answers")
    assert transfer.stop(signal.SIGKILL) == -signal.SIGKILL
    said = teacher.stat().st_mtime_ns
    assert Transfer(config_file).process.wait() == 0
    assert teacher.stat().st_mtime_ns == said, "asked again"
    assert (run / "evaluate/snips/results.json").exists()
