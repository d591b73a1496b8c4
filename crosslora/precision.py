"""What models compute in, where the configuration leaves it to the device."""

from __future__ import annotations

from typing import Literal

import torch

from crosslora.config import Config, Dtype


def chosen(dtype: Dtype, on_gpu: bool) -> Literal["float32", "bfloat16"]:
    """`auto` is bfloat16 on GPUs and on CPUs that multiply it, float32 on others: without AVX-512 (or its like on ARM)
    PyTorch does it by hand, and the gradient of one product takes as long as fifty in float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if on_gpu or _cpu_multiplies_bfloat16() else "float32"


def decided(config: Config, on_gpus: bool = False) -> Config:
    """The configuration with every dtype chosen: by where its engines and workers run, or for `on_gpus` all of them."""
    engine, worker = (
        on_gpus or gpus > 0 for gpus in (config.cluster.gpus_per_engine, config.cluster.gpus_per_worker)
    )
    parts = {"synthesis": engine, "fit": worker, "evaluation": engine}
    update = {
        name: section.model_copy(update={"dtype": chosen(section.dtype, on_gpu)})
        for name, on_gpu in parts.items()
        for section in [getattr(config, name)]
    }
    return config.model_copy(update=update)


def _cpu_multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
