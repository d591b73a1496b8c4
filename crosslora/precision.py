"""What models compute in, where the configuration leaves it to the device."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch

from crosslora.config import Config, Dtype, Evaluation, Fit, Synthesis

S = TypeVar("S", Synthesis, Fit, Evaluation)


def chosen(dtype: Dtype, on_gpu: bool) -> Literal["float32", "bfloat16"]:
    """`auto` is bfloat16 on GPUs and on CPUs that multiply it, float32 on others: without AVX-512 (or its like on ARM)
    PyTorch does it by hand, and the gradient of a product takes many times as long (tests/test_precision.py)."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if on_gpu or _cpu_multiplies_bfloat16() else "float32"


def decided(config: Config, on_gpus: bool = False) -> Config:
    """The configuration with every dtype chosen: by where its engines and workers run, or for `on_gpus` all of them."""
    engine = on_gpus or config.cluster.gpus_per_engine > 0
    worker = on_gpus or config.cluster.gpus_per_worker > 0

    def concrete(section: S, on_gpu: bool) -> S:
        return section.model_copy(update={"dtype": chosen(section.dtype, on_gpu)})

    return config.model_copy(
        update={
            "synthesis": concrete(config.synthesis, engine),
            "fit": concrete(config.fit, worker),
            "evaluation": concrete(config.evaluation, engine),
        }
    )


def _cpu_multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
