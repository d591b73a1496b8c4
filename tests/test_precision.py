"""What models compute in: as configured or, left to the device, what it multiplies fast."""

import time

import pytest
import torch

from crosslora.precision import chosen, decided
from tests.tiny import bare_config


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_configured_is_taken(dtype: str, on_gpu: bool) -> None:
    assert chosen(dtype, on_gpu) == dtype  # type: ignore[arg-type]


def test_a_cpu_computes_in_what_it_need_not_make_by_hand() -> None:
    """The gradient of a product of the size of a small model's: bfloat16 by hand takes many times as long, so no more than 4
    times is asked for, on machines that do other work too."""
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        gradient, weights = torch.randn(256, 2048, dtype=dtype), torch.randn(2048, 640, dtype=dtype)
        times = []
        for _ in range(4):
            started = time.perf_counter()
            _ = gradient @ weights
            times.append(time.perf_counter() - started)
        fastest[dtype] = min(times)
    ratio = fastest[torch.bfloat16] / fastest[torch.float32]
    assert ratio < 4 if chosen("auto", on_gpu=False) == "bfloat16" else ratio > 1


def test_engines_and_workers_may_run_on_different_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosslora.precision._cpu_multiplies_bfloat16", lambda: False)
    gpus = decided(bare_config(cluster={"gpus_per_engine": 1, "gpus_per_worker": 0}))
    assert (gpus.synthesis.dtype, gpus.fit.dtype, gpus.evaluation.dtype) == (
        "bfloat16",
        "float32",
        "bfloat16",
    )
    assert decided(bare_config()).synthesis.dtype == "float32"
    assert decided(bare_config(), on_gpus=True).fit.dtype == "bfloat16"
    assert decided(bare_config(fit={"dtype": "float32"}), on_gpus=True).fit.dtype == "float32"
