"""Shards survive their engines, and the budget in minutes is kept."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from ray.exceptions import OutOfMemoryError, RayTaskError
from safetensors.torch import load_file, save_file

from crosslora import cluster
from crosslora.config import Base, Synthesis
from crosslora.errors import UserError
from crosslora.models import load_format
from crosslora.run_folder import RunFolder, Stage
from crosslora.teacher import synthesize as synthesis
from crosslora.teacher.corpus import FILE, read_samples, write_shard
from crosslora.teacher.prompts import GENERAL
from crosslora.teacher.synthesize import synthesize
from tests.failing import FailsOnce
from tests.teacher.test_corpus import sample
from tests.tiny import bare_config, tiny_llama
from tests.tiny_pair import make_pair, tiny_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("synthesis pair"))


@pytest.mark.parametrize(
    ("strategies", "answers"), [([FILE], None), ([FILE, "self"], False), ([GENERAL, FILE], True)]
)
def test_engines_go_by_what_was_decided_for_the_shards_that_there_are(
    strategies: list[str], answers: bool | None, tmp_path: Path
) -> None:
    stage = RunFolder.open(str(tmp_path)).stage("synthesize/a", {})
    assert synthesis._are_answers(stage, [], Synthesis()) is None
    samples = [sample(str(row), strategy=name) for row, name in enumerate(strategies)]
    write_shard(stage.folder, stage.name, 0, samples[:1], 1)
    write_shard(stage.folder, stage.name, 1, samples, len(samples))
    assert synthesis._are_answers(stage, [0, 1], Synthesis()) is answers


def test_what_the_user_can_mend_is_said_without_the_engines_traceback() -> None:
    trace = "Traceback (most recent call last)\n  ..."
    error = RayTaskError("shard", trace, UserError("mend it")).as_instanceof_cause()
    assert str(error) != "mend it", "as Ray hands it over"
    with pytest.raises(UserError, match=r"^mend it$"):
        synthesis._refuse(error)
    synthesis._refuse(RayTaskError("shard", trace, ValueError("no")).as_instanceof_cause())


def test_an_engine_that_ray_stops_for_its_nodes_memory_is_lost_like_others() -> None:
    error = OutOfMemoryError("Memory on the node was 30 GB of 31.\nTo disable this, set a variable.")
    assert isinstance(error, synthesis.LOST)
    assert synthesis._cause(error) == "Memory on the node was 30 GB of 31."
    assert (
        synthesis._cause(RayTaskError("shard", "Traceback:\n  ...\nValueError: no", ValueError()))
        == "ValueError: no"
    )


def test_a_prompt_with_its_answer_must_fit_into_the_context_of_the_source(tmp_path: Path) -> None:
    base = Base(base=str(tiny_llama(tmp_path)))  # of 512 positions
    chat = load_format(base.base, base)
    for tokens, fits in ((32, True), (500, False)):
        config = bare_config(
            source={"base": base.base},
            synthesis={"max_prompt_tokens": 32, "max_response_tokens": tokens},
        )
        with (
            nullcontext()
            if fits
            else pytest.raises(UserError, match="has room for 512; lower max_prompt_tokens")
        ):
            synthesis.check_room(config, chat)


def run(pair: Path, folder: Path, **settings: object) -> Stage:
    config = tiny_config(pair, folder)
    config = config.model_copy(update={"synthesis": config.synthesis.model_copy(update=settings)})
    stage = RunFolder.open(str(folder)).stage("synthesize/tiny", {})
    with cluster.session(config.cluster):
        synthesize(config, config.adapters[0].path, stage)
    return stage


def kill_the_engine(events: Path) -> None:
    while not (events.exists() and '"shard": 0' in events.read_text()):
        time.sleep(0.02)
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    engine = next(
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid in ours and "ray::Teacher" in str(process.info["cmdline"])
    )
    os.kill(engine.pid, signal.SIGKILL)


@pytest.mark.real
@pytest.mark.slow
def test_an_engine_that_dies_is_replaced(pair: Path, tmp_path: Path) -> None:
    events = tmp_path / "synthesize/tiny/events.jsonl"
    threading.Thread(target=kill_the_engine, args=[events], daemon=True).start()
    stage = run(pair, tmp_path, samples=2000, shard_size=200)
    assert any(json.loads(line)["event"] == "engine_lost" for line in events.read_text().splitlines())
    assert stage.manifest()["shards"] == list(range(10))
    ids = [sample.sample_id for sample in read_samples(stage.folder, stage.name)]
    assert len(ids) == len(set(ids)) and {sample_id.split("-")[0] for sample_id in ids} == {
        f"{index:05d}" for index in range(10)
    }


@pytest.mark.real
@pytest.mark.slow
def test_an_engine_that_fails_without_dying_is_replaced(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "Teacher", FailsOnce)
    stage = run(pair, tmp_path, samples=100, shard_size=50)
    events = (tmp_path / "synthesize/tiny/events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events].count("engine_lost") == 1
    assert len(read_samples(stage.folder, stage.name)) >= 75


@pytest.mark.real
@pytest.mark.slow
def test_an_adapter_that_was_saved_as_a_state_dict_is_the_teacher(pair: Path, tmp_path: Path) -> None:
    """Its names hold the adapter's own name, which vLLM does not read."""
    folder = tmp_path / "adapter"
    shutil.copytree(pair / "adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    config = tiny_config(pair, tmp_path / "run")
    stage = RunFolder.open(str(tmp_path / "run")).stage("synthesize/tiny", {})
    with cluster.session(config.cluster):
        synthesize(config, folder, stage)
    samples = read_samples(stage.folder, stage.name)
    assert max(abs(sample.adapter_effect) for sample in samples) > 0.01, "with and without it are the same"


@pytest.mark.real
@pytest.mark.slow
def test_no_shard_is_begun_after_the_minutes_and_more_of_them_add_to_it(pair: Path, tmp_path: Path) -> None:
    assert run(pair, tmp_path, minutes=1e-4).manifest()["shards"] == [0]
    first = (tmp_path / "synthesize/tiny/shard-00000.parquet").read_bytes()
    stage = run(pair, tmp_path)
    assert stage.manifest()["shards"] == [0, 1]
    assert (tmp_path / "synthesize/tiny/shard-00000.parquet").read_bytes() == first
    prompts = [sample.prompt for sample in read_samples(stage.folder, stage.name)]
    assert prompts[:48] != prompts[48:]
