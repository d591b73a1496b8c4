"""What a transfer takes on GPUs: settings that fit, memory, hours and cost, from the two bases' configurations alone.

Memory is counted in sizing.py. Times are upper bounds in tokens (every prompt and answer as long as allowed) at the
shares of a GPU's peak that are written below; nothing here was measured on a GPU by this project.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from crosslora.config import Config
from crosslora.errors import UserError
from crosslora.sizing import (
    BYTES,
    CONCURRENT,
    CONTEXT_BYTES,
    Shape,
    fit_memory,
    teacher_memory,
)


@dataclass(frozen=True)
class Gpu:
    memory: float
    """Bytes."""
    flops: float
    """Dense bfloat16 operations per second, from the data sheet."""
    bandwidth: float
    """Bytes per second to its own memory, from the data sheet."""
    link: float
    """Bytes per second in one direction, all told, to the other GPUs of its node: half of what data sheets give for
    NVLink (A100, H100, H200) or PCIe 4.0 x16 (A10G, L4, L40S), which count both directions."""
    network: float
    """Bytes per second in one direction between nodes: an eighth of what AWS gives its nodes of 8 (g5, g6 and g6e
    .48xlarge, p4de, p5, p5en)."""
    dollars: float
    """Per hour, roughly what clouds asked in 2026; prices differ by a factor of two."""


GPUS = {
    "A10G-24GB": Gpu(24e9, 70e12, 600e9, 32e9, 1.6e9, 1.2),
    "L4-24GB": Gpu(24e9, 121e12, 300e9, 32e9, 1.6e9, 0.8),
    "L40S-48GB": Gpu(48e9, 362e12, 864e9, 32e9, 6.3e9, 1.9),
    "A100-80GB": Gpu(80e9, 312e12, 2.0e12, 300e9, 6.3e9, 2.5),
    "H100-80GB": Gpu(80e9, 989e12, 3.35e12, 450e9, 50e9, 4.0),
    "H200-141GB": Gpu(141e9, 989e12, 4.8e12, 450e9, 50e9, 5.0),
}
USABLE = 0.9
"""Of a GPU's memory; the rest goes to fragments."""
FIT_SHARE, PREFILL_SHARE, DECODE_SHARE = 0.4, 0.4, 0.5
"""Of the peak of operations, of the same, and of the bandwidth."""
NODE = 8
"""GPUs of a node. Tensor parallelism stays inside one."""
TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True)
class GpuStage:
    """A stage on a number of GPUs. `settings` are those of the configuration that make it fit."""

    gpus: int
    settings: dict[str, int | bool]
    gigabytes: float
    """Per GPU."""
    hours: float
    dollars: float
    gigabytes_sent: float
    """By each GPU over the whole stage, for ZeRO."""


@dataclass(frozen=True)
class GpuPlan:
    gpu: str
    smallest: int | None
    """Fewest GPUs on which both stages fit; None where 1024 are too few."""
    synthesize: GpuStage | None
    fit: GpuStage | None
    """On the GPUs that were asked for, or on the smallest number; None where a stage does not fit there."""
    advice: str


def gpu_plan(
    config: Config, source: Shape, target: Shape, *, rank: int, learned: int, gpu: str, gpus: int | None
) -> GpuPlan:
    """The plan on `gpus` GPUs of the kind `gpu`, or on as few as will do; raises UserError for a kind not in GPUS."""
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: not known here; one of {', '.join(GPUS)}")
    kind = GPUS[gpu]

    def stages(count: int) -> tuple[GpuStage | None, GpuStage | None]:
        return _synthesize(config, source, target, rank, kind, count), _fit(
            config, target, learned, kind, count
        )

    counts = [2**n for n in range(11)]
    smallest = next((count for count in counts if all(stages(count))), None)
    chosen = gpus or smallest or counts[-1]
    synthesize, fit = stages(chosen)
    return GpuPlan(gpu, smallest, synthesize, fit, _advice(gpu, chosen, synthesize, fit, smallest))


def _advice(
    gpu: str, chosen: int, synthesize: GpuStage | None, fit: GpuStage | None, smallest: int | None
) -> str:
    missing = [name for name, stage in (("synthesize", synthesize), ("fit", fit)) if stage is None]
    if missing:
        more = (
            f"{smallest} would do" if smallest else "no number of them will do: take a kind with more memory"
        )
        return f"{' and '.join(missing)} cannot run on {chosen} x {gpu}; {more}, or lower fit.max_tokens"
    assert synthesize is not None and fit is not None
    settings = {
        "cluster.gpus_per_engine": 1,
        "cluster.gpus_per_worker": 1,
        **synthesize.settings,
        **fit.settings,
    }
    return " ".join(f"-s {name}={str(value).lower()}" for name, value in settings.items())


def _synthesize(
    config: Config, shape: Shape, target: Shape, rank: int, kind: Gpu, gpus: int
) -> GpuStage | None:
    """Evaluation serves both bases with the tensor parallelism of synthesis: the larger one decides."""
    settings = config.synthesis
    length = 2 * settings.max_prompt_tokens + settings.max_response_tokens
    for parallel in TENSOR_PARALLEL:
        memory, evaluated = (
            teacher_memory(base, rank=rank, dtype=settings.dtype, tensor_parallel=parallel, length=length)
            for base in (shape, target)
        )
        if parallel <= gpus and max(memory.total, evaluated.total) <= USABLE * kind.memory:
            break
    else:
        return None
    engines = gpus // parallel
    shard = min(settings.shard_size, max(settings.samples // engines, 8))  # else some engines get none
    seconds = _synthesis_seconds(config, shape, kind, length) / (engines * parallel)
    return GpuStage(
        gpus=engines * parallel,
        settings={
            "synthesis.engines": engines,
            "synthesis.tensor_parallel": parallel,
            "synthesis.shard_size": shard,
        },
        gigabytes=memory.total / 1e9,
        hours=seconds / 3600,
        dollars=gpus * kind.dollars * seconds / 3600,
        gigabytes_sent=0.0,
    )


def _synthesis_seconds(config: Config, shape: Shape, kind: Gpu, length: int) -> float:
    """Of one GPU. Decoding reads all weights, and the cache of each sequence, for CONCURRENT tokens; reading a prompt
    and scoring an answer take two operations per weight and token."""
    settings = config.synthesis
    s = BYTES[settings.dtype]
    cache = s * 2 * shape.layers * shape.key * length
    bytes_per_token = (s * shape.parameters + CONCURRENT * cache) / CONCURRENT
    written = settings.samples * (settings.max_prompt_tokens + settings.max_response_tokens)
    decoding = written * bytes_per_token / (DECODE_SHARE * kind.bandwidth)
    reading = 2 * settings.samples * length * 2 * shape.parameters / (PREFILL_SHARE * kind.flops)
    return decoding + reading


def _fit(config: Config, shape: Shape, learned: int, kind: Gpu, gpus: int) -> GpuStage | None:
    """The fastest settings that fit; of those that are equally fast, the first."""
    batch = math.lcm(config.fit.batch_size, gpus)
    stages = [
        _fit_stage(config, shape, learned, kind, gpus, batch, *settings)
        for settings in _fit_settings(batch // gpus)
    ]
    fitting = [stage for stage in stages if 1e9 * stage.gigabytes <= USABLE * kind.memory]
    return min(fitting, key=lambda stage: stage.hours, default=None)


def _fit_stage(
    config: Config,
    shape: Shape,
    learned: int,
    kind: Gpu,
    gpus: int,
    batch: int,
    zero_stage: int,
    checkpointing: bool,
    micro_batches: int,
) -> GpuStage:
    fit = config.fit
    length = min(fit.max_tokens, config.synthesis.max_prompt_tokens + config.synthesis.max_response_tokens)
    memory = fit_memory(
        shape,
        learned=learned,
        dtype=fit.dtype,
        zero_stage=zero_stage,
        workers=gpus,
        sequences=batch // gpus // micro_batches,
        length=length,
        checkpointing=checkpointing,
        on_gpu=True,
    )
    tokens = fit.steps * batch * length
    # forward, gradients on the activations (the base is frozen), and with checkpointing forward once more
    computing = (6 if checkpointing else 4) * shape.parameters * tokens / gpus / (FIT_SHARE * kind.flops)
    sent = _sent(shape, fit.dtype, zero_stage, gpus, learned, micro_batches) * fit.steps
    # a ring is as fast as its slowest link; what is sent while the GPU computes costs no time
    seconds = max(computing, sent / (kind.link if gpus <= NODE else kind.network))
    return GpuStage(
        gpus=gpus,
        settings={
            "fit.workers": gpus,
            "fit.batch_size": batch,
            "fit.zero_stage": zero_stage,
            "fit.gradient_checkpointing": checkpointing,
            "fit.micro_batches": micro_batches,
        },
        gigabytes=(memory.total + CONTEXT_BYTES) / 1e9,
        hours=seconds / 3600,
        dollars=gpus * kind.dollars * seconds / 3600,
        gigabytes_sent=sent / 1e9,
    )


def _fit_settings(share: int) -> Iterator[tuple[int, bool, int]]:
    """(ZeRO stage, checkpointing, micro-batches), simple ones first; `share` of the batch per worker."""
    parts = [n for n in range(1, share + 1) if share % n == 0]
    for zero_stage in (1, 3):
        for checkpointing in (False, True):
            for micro_batches in parts:
                yield zero_stage, checkpointing, micro_batches


def _sent(shape: Shape, dtype: str, zero_stage: int, gpus: int, learned: int, micro_batches: int) -> float:
    """Bytes that each GPU sends in a step: a ring moves (N - 1) / N of everything. ZeRO-3 gathers all weights for the
    forward and once more for the backward pass of every micro-batch."""
    ring = (gpus - 1) / gpus
    gradients = 2 * 4 * learned * ring
    weights = 2 * BYTES[dtype] * shape.parameters * ring * micro_batches if zero_stage == 3 else 0.0
    return gradients + weights
