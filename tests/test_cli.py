"""The command as a user meets it: help at once, bad input in one sentence with exit code 2."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.plans import MODELS
from crosslora import cli, pipeline, plan
from crosslora.adapter import LoraFactors, write_adapter
from crosslora.evaluation import harness
from crosslora.run_folder import RunFolder
from tests.test_compare import finished
from tests.tiny import tiny_gemma, tiny_llama, tiny_lora, tiny_tokenizer

Run = Callable[..., str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny_llama(folder / "source")
    tiny_gemma(folder / "target")
    tiny_lora(folder / "adapter", folder / "source", seed=1)
    tiny_lora(folder / "wide", folder / "source", r=513)
    (folder / "c.yaml").write_text(
        yaml.safe_dump(
            {
                "run": "run",
                "source": {"base": "source"},
                "adapters": [{"name": "a", "path": "adapter"}],
                "target": {"base": "target"},
                "synthesis": {"max_response_tokens": 128},  # both bases have 512 positions
            }
        )
    )
    return folder


@pytest.fixture
def refused(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command that must be refused; returns the sentence."""

    def run(command: str, *overrides: str, options: Sequence[str] = ()) -> str:
        settings = [
            argument for override in (f"run={tmp_path / 'run'}", *overrides) for argument in ("-s", override)
        ]
        monkeypatch.setattr(sys, "argv", ["crosslora", command, str(pair / "c.yaml"), *options, *settings])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and "Traceback" not in message
        return message

    return run


def test_help_needs_no_heavy_imports() -> None:
    code = "import sys, crosslora, crosslora.cli; print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must succeed; returns what it prints."""

    def run(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["crosslora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return run


def test_plan_and_validate(pair: Path, said: Run) -> None:
    assert said("validate", pair / "c.yaml").endswith("c.yaml: valid\n")
    made = json.loads(said("plan", pair / "c.yaml", "--json"))
    assert made["layer_map"] == [0, 2, 3] and made["unused_source_layers"] == [1]
    assert made["shared_tokens"] > 0 and made["adapters"][0]["modules"] == 28
    assert made["on_gpus"] is None


def test_plan_on_gpus(pair: Path, said: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    command = ("plan", pair / "c.yaml", "--gpu", "H100-80GB", "--gpus", "8")
    shown = said(*command)
    assert "On 8 x H100-80GB (1 would do)" in shown and "fit, checkpointing" in shown
    assert shown.splitlines()[-1].startswith("-s cluster.gpus_per_engine=1 -s cluster.gpus_per_worker=1")
    made = json.loads(said(*command, "--json"))["on_gpus"]
    assert made["fit"]["settings"]["fit.workers"] == 8 and made["smallest"] == 1
    assert set(made["memory"]["fit"]) == {"weights", "learned", "activations", "working", "other", "total"}
    settings = [argument for argument in shown.splitlines()[-1].split() if argument != "-s"]
    said("validate", pair / "c.yaml", *(f"--set={setting}" for setting in settings))


def test_a_number_of_gpus_needs_their_kind(refused: Run) -> None:
    assert "--gpus 8: of which kind?" in refused("plan", options=["--gpus", "8"])


def test_plan_for_an_unknown_kind(refused: Run) -> None:
    assert "--gpu B200: not known here" in refused("plan", options=["--gpu", "B200"])


@pytest.mark.real
def test_plan_that_the_cluster_cannot_hold(refused: Run) -> None:
    message = refused(
        "plan",
        "synthesis.engines=1000",
        "cluster.gpus_per_engine=1",
        options=["--gpu", "H100-80GB", "--check"],
    )
    assert (
        "synthesize needs 1000 times 1 CPU and 1 GPU, each on one node, and the Ray cluster holds" in message
    )


def test_plan_of_a_70b_pair_takes_seconds_and_no_weights(tmp_path: Path, said: Run) -> None:
    for name, model in (("source", "Llama-3.1-70B"), ("target", "Qwen2.5-72B")):
        MODELS[model].save_pretrained(tmp_path / name)
        tiny_tokenizer(tmp_path / name, "byte_level")
    factors = {
        f"model.layers.{layer}.self_attn.q_proj": LoraFactors(torch.ones(1, 8192), torch.ones(8192, 1))
        for layer in range(80)
    }
    write_adapter(tmp_path / "adapter", factors, str(tmp_path / "source"))
    (tmp_path / "c.yaml").write_text(
        "{run: run, source: {base: source}, adapters: [{name: a, path: adapter}], target: {base: target}}"
    )
    made = json.loads(said("plan", tmp_path / "c.yaml", "--gpu", "H100-80GB", "--gpus", "8", "--json"))
    assert made["on_gpus"]["smallest"] == 4
    assert made["on_gpus"]["fit"]["settings"]["fit.zero_stage"] == 3


def test_unknown_key(refused: Run) -> None:
    assert "did you mean steps?" in refused("validate", "fit.stepz=1")


def test_missing_model(refused: Run) -> None:
    assert "does not exist" in refused("transfer", "target.base=./nowhere")


def test_adapter_of_another_base(refused: Run) -> None:
    assert "give the base that the adapter was trained on" in refused("transfer", "source.base=target")


def test_empty_adapter(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in refused("transfer", f"adapters.0.path={tmp_path / 'empty'}")


def test_nan_adapter(refused: Run, pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "adapter", tmp_path / "nan")
    file = tmp_path / "nan" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, file)
    assert "NaN" in refused("transfer", f"adapters.0.path={tmp_path / 'nan'}")


def test_rank_that_vllm_cannot_run(refused: Run) -> None:
    assert "rank 513" in refused("transfer", "adapters.0.path=wide")


def test_port_in_use(refused: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "port" in refused("transfer", f"evaluation.port={server.getsockname()[1]}")


def test_unwritable_run_folder(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "not writable" in refused("transfer", f"run={tmp_path / 'file'}")


def test_run_folder_in_use(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with RunFolder.open(str(tmp_path / "run")).writing():
        assert "in use by process" in refused("transfer")


def test_disk_full(refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "shard")

    monkeypatch.setattr(RunFolder, "write_bytes", full)
    assert "disk full" in refused("transfer")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_disk_really_full(refused: Run, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        assert "disk full" in refused("transfer", f"run={disk / 'run'}")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_too_little_memory(refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_memory_available", lambda: 0.5)
    assert "0.5 GB are free" in refused("transfer")


def test_memory_of_this_machine_is_no_limit_for_gpus_elsewhere(
    pair: Path, said: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_memory_available", lambda: 0.5)
    assert said("plan", pair / "c.yaml", "-s", "cluster.gpus_per_engine=1", "-s", "cluster.gpus_per_worker=1")


def test_bad_task_file(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "x"}\n')
    task = f"evaluation.tasks=[{{name: t, path: {tmp_path / 't.jsonl'}}}]"
    assert "line 1" in refused("transfer", task)


def test_a_refused_redo_loses_nothing(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = tmp_path / "run/fit/a/manifest.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    overrides = ["-s", f"run={tmp_path / 'run'}", "-s", "synthesis.prompts.file=1"]
    overrides += ["-s", f"synthesis.prompts.prompts_file={tmp_path / 'none'}"]
    monkeypatch.setattr(
        sys, "argv", ["crosslora", "transfer", str(pair / "c.yaml"), "--redo", "fit", *overrides]
    )
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "prompts_file" in capsys.readouterr().err
    assert done.exists()


def test_unknown_stage_to_redo(
    pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["crosslora", "transfer", str(pair / "c.yaml"), "--redo", "fitt"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "one of synthesize" in capsys.readouterr().err


def test_no_prompt_survives(tmp_path: Path, pair: Path) -> None:
    from crosslora.config import load_config
    from crosslora.errors import UserError
    from crosslora.teacher.corpus import write_shard
    from tests.teacher.test_corpus import sample

    folder = RunFolder.open(str(tmp_path))
    corpus, filtered = folder.stage("synthesize/a", {}), folder.stage("filter/a", {})
    write_shard(folder, corpus.name, 0, [sample("0", finished=False)], 1)
    corpus.finish({"shards": [0]})
    with pytest.raises(UserError, match=r"0 of 1 samples were kept.*1 unfinished"):
        pipeline.filter_corpus(load_config(pair / "c.yaml"), corpus, filtered)
    assert corpus.done and not filtered.done


def test_how_far_a_run_is_and_how_runs_compare(tmp_path: Path, said: Callable[..., str]) -> None:
    run = finished(tmp_path / "a", 0.5)
    assert json.loads(said("status", run, "--json"))["fit/mine"] == "not started"
    assert json.loads(said("compare", run, "--json"))[0]["student"][0] == 0.5


def test_a_comma_in_brackets_belongs_to_the_pattern(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "evaluate_run", lambda run, names, *_: {"names": names})
    asked = said("evaluate", "run", "--tasks", "mmlu, check.jsonl:regex:(a,b)", "--json")
    assert json.loads(asked) == {"names": ["mmlu", "check.jsonl:regex:(a,b)"]}
    asked = said("evaluate", "run", "--tasks", r"mmlu,check.jsonl:regex:\}\s*$", "--json")
    assert json.loads(asked) == {"names": ["mmlu", r"check.jsonl:regex:\}\s*$"]}
