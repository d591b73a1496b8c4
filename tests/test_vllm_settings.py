"""What engines are started with."""

from importlib.metadata import PackageNotFoundError

import pytest

from crosslora import vllm_settings
from crosslora.errors import UserError
from crosslora.vllm_settings import refuse_cpu_with_gpu_build


def test_the_build_for_gpus_runs_nothing_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_settings, "version", lambda package: "0.32.1")
    with pytest.raises(UserError, match=r"build for GPUs is installed.*\(--gpus 1\)"):
        refuse_cpu_with_gpu_build(0, "--gpus 1")
    refuse_cpu_with_gpu_build(1, "--gpus 1")


def test_the_build_for_cpus_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(vllm_settings, "version", none)
    refuse_cpu_with_gpu_build(0, "--gpus 1")
    monkeypatch.setattr(vllm_settings, "version", lambda package: "0.32.1+cpu")
    refuse_cpu_with_gpu_build(0, "--gpus 1")
