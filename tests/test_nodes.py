"""A transfer as jobs on three nodes and an S3 store, while nodes are lost. The head does no work.

The two workers fit with ZeRO-3. The first job ends with the export; the second, which is slow, evaluates.
"""

import hashlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import NotFoundError, OpenAI
from pyarrow import fs as arrow_fs

from crosslora.config import Config
from crosslora.endpoint import free_port
from crosslora.evaluation.harness import evaluate_run
from crosslora.run_folder import RunFolder, stage_states
from crosslora.serve import settings, write_config
from crosslora.teacher.corpus import read_samples
from crosslora.text.templates import ChatFormat
from tests.checkpoints import check_last_checkpoint
from tests.nodes import Nodes
from tests.tiny import load_tokenizer
from tests.tiny_pair import make_pair, tiny_config

pytestmark = pytest.mark.real
SAMPLES, SHARD, STEPS = 2000, 200, 60


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """An S3 service on loopback with a bucket; pyarrow finds it by the usual environment variables."""
    port = free_port("127.0.0.1", 0)
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL
        ) as server,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}/"), 60)
            bucket = urllib.request.Request(f"http://127.0.0.1:{port}/adapters", method="PUT")
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(bucket)
            yield "s3://adapters"
        finally:
            server.kill()


@pytest.fixture(scope="module")
def config(store: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    pair = make_pair(tmp_path_factory.mktemp("three nodes"))
    config = tiny_config(pair, pair, zero_stage=3, steps=STEPS, checkpoint_every=10, evaluate_every=20)
    many = {"samples": SAMPLES, "shard_size": SHARD, "engines": 2, "held_out": 0.02}
    return config.model_copy(
        update={
            "run": f"{store}/run",
            "synthesis": config.synthesis.model_copy(update=many),
            "evaluation": config.evaluation.model_copy(update={"concurrency": 1}),
        }
    )


@pytest.fixture(scope="module")
def config_file(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("configuration") / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return file


@pytest.fixture(scope="module")
def nodes(store: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with Nodes(tmp_path_factory.mktemp("link"), head_cpus=0) as nodes:
        nodes.add()
        nodes.add()
        yield nodes


@pytest.fixture(scope="module")
def folder(config: Config) -> RunFolder:
    return RunFolder.open(config.run)


@pytest.fixture(scope="module")
def early_shards(nodes: Nodes, config_file: Path, folder: RunFolder) -> dict[int, str]:
    """Digests of the shards that were there when the first node was lost; the run is made here."""
    job = nodes.begin_job("python", "ray_jobs/export.py", "--config", config_file, "cluster.address=auto")

    def wait_for(stage: str, event: Callable[[dict[str, Any]], bool]) -> None:
        until(lambda: any(map(event, events(folder, stage))) or job.poll() is not None, 300)
        assert job.poll() is None, "the job ended by itself"

    wait_for("synthesize", lambda event: event["event"] == "shard")
    nodes.lose_node_of("ray::Teacher.shard")  # one that still starts may never be missed
    early = shards(folder)
    nodes.add()
    wait_for("fit", lambda event: event.get("step", 0) >= 13)
    nodes.lose_node_of("RayTrainWorker")
    nodes.add()
    assert job.wait() == 0
    config_file.with_name("job.log").write_text(nodes.ask("logs"))
    return early


@pytest.mark.slow
def test_a_mistake_fails_the_job_with_a_sentence(nodes: Nodes, config_file: Path) -> None:
    """Submitted with the environment that the project brings."""
    job = nodes.begin_job(
        *("python", "ray_jobs/transfer.py", "--config", config_file, "fit.workers=2", "fit.batch_size=7"),
        environment=["--runtime-env", "ray_jobs/runtime_env.yaml"],
    )
    assert job.wait() != 0
    said = nodes.ask("status")
    assert "' failed" in said and "failed with exit code 2" in said
    assert said.rstrip().endswith("fit.batch_size: 7 does not divide into workers x micro_batches = 2")
    assert "Traceback" not in said, "the end of the log is in it"


def test_the_log_of_a_job_tells_how_far_it_is(early_shards: dict[int, str], config_file: Path) -> None:
    log = config_file.with_name("job.log").read_text()
    assert re.search(rf"^synthesize: {SAMPLES}/{SAMPLES} samples.* response tokens/s$", log, re.MULTILINE)
    assert re.search(rf"^fit: {STEPS}/{STEPS} steps.* loss \d\.\d+", log, re.MULTILINE)


def test_the_job_ends_with_its_stage(early_shards: dict[int, str], folder: RunFolder) -> None:
    assert list(stage_states(folder).values()) == ["done"] * 4 + ["not started"]
    assert folder.exists("export/tiny/adapter_model.safetensors")


def test_no_sample_is_lost_or_doubled_and_finished_shards_stay(
    early_shards: dict[int, str], folder: RunFolder
) -> None:
    told = events(folder, "synthesize")
    assert any(event["event"] == "engine_lost" for event in told)
    written = {event["shard"]: event["samples"] for event in told if event["event"] == "shard"}
    assert min(written.values()) >= SHARD * 3 // 4, "the file gives its share of the prompts in any case"
    ids = [sample.sample_id for sample in read_samples(folder, "synthesize/tiny")]
    assert ids == [
        f"{index:05d}-{row:05d}" for index in range(SAMPLES // SHARD) for row in range(written[index])
    ]
    assert early_shards and early_shards.items() <= shards(folder).items()


def test_the_fit_goes_on_from_its_checkpoint(early_shards: dict[int, str], folder: RunFolder) -> None:
    fitted = events(folder, "fit")
    (resumed,) = [event["step"] for event in fitted if event["event"] == "resumed"]
    assert resumed >= 10
    steps = [event["step"] for event in fitted if event["event"] == "step"]
    assert set(steps) == set(range(1, STEPS + 1))
    assert len(steps) - len(set(steps)) <= 10, "checkpoint_every at most"


@pytest.mark.slow
def test_losses_after_a_lost_node_are_those_of_an_undisturbed_fit(
    early_shards: dict[int, str], nodes: Nodes, config_file: Path, folder: RunFolder, store: str
) -> None:
    """By as many workers, on the same corpus."""
    calm = RunFolder.open(f"{store}/calm")
    arrow_fs.copy_files(folder.root, calm.root, folder.filesystem, calm.filesystem)
    for stage in ("fit", "export"):
        calm.remove(stage)
    nodes.job(
        *("python", "ray_jobs/fit.py", "--config", config_file), "cluster.address=auto", f"run={calm.uri}"
    )
    assert not any(event["event"] == "resumed" for event in events(calm, "fit"))
    assert losses(folder) == pytest.approx(losses(calm), abs=1e-5)


def losses(folder: RunFolder) -> dict[int, float]:
    """Loss of every step, as last reported."""
    return {event["step"]: event["loss"] for event in events(folder, "fit") if event["event"] == "step"}


def test_checkpoints_of_zero_3_hold_what_is_learned(
    early_shards: dict[int, str], config: Config, folder: RunFolder
) -> None:
    check_last_checkpoint(folder.sub("fit/tiny"), config)


def test_serve_deploy_serves_student_and_teacher_from_the_bucket(
    early_shards: dict[int, str], nodes: Nodes, config: Config, tmp_path: Path
) -> None:
    """Without a program that stays: two engines on two nodes."""
    port = free_port("127.0.0.1", 0)
    given = settings(None, places=[config.run], teacher=True, threads=1, dtype="float32")
    nodes.serve("deploy", write_config(given, tmp_path, "127.0.0.1", port)[0])
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    until(lambda: answers(f"{client.base_url}models"), 800)
    names = [model.id for model in client.models.list()]
    assert names == ["target", "tiny", "source", "tiny-teacher"]
    texts = []
    for name in names:
        asked: Any = {
            "model": name,
            "prompt": [5] * 8,
            "max_tokens": 12,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        whole = client.completions.create(**asked).choices[0].text
        streamed = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
        assert len(streamed) > 1 and "".join(streamed) == whole
        texts.append(whole)
    assert len(set(texts)) >= 3, "they are different models"
    tokenizer = ChatFormat(load_tokenizer(Path(config.target.base)))
    chat: list[Any] = [{"role": "user", "content": "Say river"}]
    ids: Any = {"max_tokens": 1, "extra_body": {"return_token_ids": True}}
    asked_ids = [
        client.chat.completions.create(model="tiny", messages=chat, **ids).prompt_token_ids,
        client.completions.create(model="tiny", prompt="Say river", **ids).choices[0].prompt_token_ids,
    ]
    assert asked_ids[0] == tokenizer.prompt_ids("Say river")
    bos = tokenizer.tokenizer.bos_token_id
    assert all(prompt[0] == bos and prompt.count(bos) == 1 for prompt in asked_ids)
    with pytest.raises(NotFoundError):
        client.completions.create(model="another", prompt="x")
    prompts = str(config.evaluation.tasks[0].path)
    judged = evaluate_run(config.run, [prompts], None, 4, str(client.base_url))["tiny"]["tasks"]["prompts"]
    assert {name: model["n"] for name, model in judged["models"].items()} == dict.fromkeys(
        ("teacher", "target_base", "student"), 4
    )
    nodes.serve("shutdown", "-y")


@pytest.mark.slow
def test_a_replica_is_lost_in_evaluation(
    early_shards: dict[int, str], nodes: Nodes, config_file: Path, folder: RunFolder
) -> None:
    port = free_port("127.0.0.1", 0)
    job = nodes.begin_job(
        *("python", "ray_jobs/evaluate.py", "--config", config_file, "cluster.address=auto"),
        *(f"evaluation.port={port}", "evaluation.tasks.0.items=96", "evaluation.tasks.0.max_tokens=64"),
    )
    until(lambda: answers(f"http://127.0.0.1:{port}/v1/models") or job.poll() is not None, 300)
    time.sleep(5)
    nodes.lose_node_of("ray::ServeReplica")
    nodes.add()
    assert job.wait() == 0
    assert set(stage_states(folder).values()) == {"done"}
    assert json.loads(folder.read_bytes("evaluate/tiny/results.json"))["tasks"]["say"]["n"] == 96


@pytest.mark.slow
def test_a_stopped_job_goes_on(
    early_shards: dict[int, str], nodes: Nodes, config_file: Path, store: str
) -> None:
    command: list[str | Path] = [
        "python",
        "ray_jobs/export.py",
        "--config",
        config_file,
        "cluster.address=auto",
    ]
    command += [f"run={store}/stopped", "synthesis.samples=1200", "fit.steps=20"]
    stopped, seen = RunFolder.open(f"{store}/stopped"), []
    for stage, event in (("synthesize", "shard"), ("fit", "step")):
        job = nodes.begin_job(*command)
        until(
            lambda stage=stage, event=event: (  # type: ignore[misc]
                any(e["event"] == event for e in events(stopped, stage)) or job.poll() is not None  # noqa: B023
            ),
            300,
        )
        nodes.stop_job()
        job.wait()  # 0: for Ray a job that was stopped has not failed
        assert "STOPPED" in nodes.ask("status").upper()
        seen.append(shards(stopped))
    nodes.job(*command)
    assert seen[0].items() <= seen[1].items() and shards(stopped) == seen[1]
    assert len(seen[1]) == 1200 // SHARD
    assert list(stage_states(stopped).values()) == ["done"] * 4 + ["not started"]


@pytest.mark.slow
def test_speed_is_measured_as_a_job(nodes: Nodes, config_file: Path, store: str) -> None:
    job: list[str | Path] = [
        "python",
        "ray_jobs/benchmark.py",
        "--config",
        config_file,
        "--engines",
        "1",
        "2",
        "--workers",
        "1",
        "2",
    ]
    nodes.job(*job, "--samples", "400", "--steps", "5", "cluster.address=auto", f"run={store}/speed")
    result = json.loads(RunFolder.open(f"{store}/speed/benchmark").read_bytes("benchmark.json"))
    assert [row["engines"] for row in result["synthesis"]] == [1, 2]
    assert [row["workers"] for row in result["fit"]] == [1, 2]
    assert all(row["per_core"] > 0 for row in [*result["synthesis"], *result["fit"]])


def events(folder: RunFolder, stage: str) -> list[dict[str, Any]]:
    """Events of a stage, oldest first; a store keeps each in a file of its own."""
    files = folder.sub(f"{stage}/tiny/events").entries()
    return [json.loads(folder.read_bytes(f"{stage}/tiny/events/{file.base_name}")) for file in files]


def shards(folder: RunFolder) -> dict[int, str]:
    """Digest of each shard that has its marker."""
    found = {}
    for entry in folder.sub("synthesize/tiny").entries():
        if entry.base_name.startswith("shard-") and entry.base_name.endswith(".json"):
            content = folder.read_bytes(f"synthesize/tiny/{entry.base_name[:-5]}.parquet")
            found[int(entry.base_name[6:11])] = hashlib.sha256(content).hexdigest()
    return found


def answers(url: str) -> bool:
    with suppress(OSError):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).read()
        return True
    return False


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)
