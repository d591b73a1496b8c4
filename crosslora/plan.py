"""What a transfer will do and need, from configurations and adapter headers alone: no weights are read."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

import torch

from crosslora.adapter_header import AdapterHeader, read_header
from crosslora.config import AdapterSource, Config
from crosslora.errors import UserError
from crosslora.gpu_plan import GpuPlan, fit_length, gpu_plan, longest_text
from crosslora.models import load_model_config, resolve, trainable_config
from crosslora.precision import decided
from crosslora.projection.mapping import check_shape, layer_map
from crosslora.sizing import BYTES, CONTEXT_BYTES, Shape, engine_memory, fit_memory
from crosslora.text.pair import TokenizerPair
from crosslora.topology import READS, SPACES, WRITES, Linear, Topology, discover
from crosslora.vllm_settings import LORA_RANKS, cpu_cache, refuse_cpu_with_gpu_build


@dataclass(frozen=True)
class SpacePlan:
    """One space: its widths on both sides and the most that the factors in it can span."""

    source_width: int
    target_width: int
    input_span: int
    output_span: int


@dataclass(frozen=True)
class AdapterPlan:
    name: str
    rank: int
    target_rank: int
    """Of the target's linears the largest: one that is fused takes the ranks of all that feed it."""
    modules: int
    roles: list[str]
    """What the adapter changes inside a layer."""
    target_modules: int
    lost_roles: list[str]
    """Of `roles`, those that no linear of the target has."""
    spaces: dict[str, SpacePlan]
    learned_numbers: int


@dataclass(frozen=True)
class Plan:
    layer_map: list[int]
    """Source layer of each target layer."""
    unused_source_layers: list[int]
    unmapped_modules: list[str]
    """Linears of the target that fit no role and get no update."""
    shared_tokens: int
    teacher_vocabulary: int
    student_vocabulary: int
    corpus_megabytes: float
    memory_gigabytes: dict[str, float]
    adapters: list[AdapterPlan]
    on_gpus: GpuPlan | None
    """Where a kind of GPU was named."""
    warnings: list[str]
    """What looks wrong and is not refused."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(config: Config, gpu: str | None = None, gpus: int | None = None) -> Plan:
    """The plan; with `gpu`, a key of gpus.GPUS, also for `gpus` of that kind, or for as few as will do.

    Raises UserError for a missing model, an adapter of another base, tokenizers that lose text, too little memory."""
    source_config = load_model_config(resolve(config.source, weights=False))
    target_config = trainable_config(resolve(config.target, weights=False))
    source, target = discover(source_config), discover(target_config)
    adapters = [_adapter_plan(adapter, source, target, config) for adapter in config.adapters]
    pair = TokenizerPair.load(config.source, config.target)
    shapes = Shape.of(source_config), Shape.of(target_config)
    pi = layer_map(source.num_layers, target.num_layers)
    plan = Plan(
        layer_map=pi,
        unused_source_layers=sorted(set(range(source.num_layers)) - set(pi)),
        unmapped_modules=list(target.unknown),
        shared_tokens=int((pair.table >= 0).sum()),
        teacher_vocabulary=len(pair.teacher_words.token_bytes),
        student_vocabulary=len(pair.student_words.token_bytes),
        corpus_megabytes=_corpus_megabytes(config),
        memory_gigabytes=_memory(decided(config), *shapes, adapters),
        adapters=adapters,
        on_gpus=None if gpu is None else _on_gpus(config, *shapes, adapters, gpu, gpus),
        warnings=[
            warning
            for adapter, its_plan in zip(config.adapters, adapters, strict=True)
            for warning in (_other_name(adapter, config), _lost(its_plan))
            if warning
        ]
        + _unused_gpus(config),
    )
    if gpu is None:
        if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
            refuse_cpu_with_gpu_build(config.cluster.gpus_per_engine, "cluster.gpus_per_engine: 1")
        _check_memory(plan, config)
    return plan


def _on_gpus(
    config: Config, source: Shape, target: Shape, adapters: list[AdapterPlan], gpu: str, gpus: int | None
) -> GpuPlan:
    ranks = max(adapter.rank for adapter in adapters), max(adapter.target_rank for adapter in adapters)
    learned = max(adapter.learned_numbers for adapter in adapters)
    return gpu_plan(config, source, target, ranks=ranks, learned=learned, gpu=gpu, gpus=gpus)


def _other_name(adapter: AdapterSource, config: Config) -> str | None:
    """Folders and hub ids that end alike are taken for the same base."""
    trained_on = read_header(adapter.path).base_model_name_or_path
    if not trained_on or PurePath(trained_on).name.lower() == PurePath(config.source.base).name.lower():
        return None
    return (
        f"adapters.{adapter.name} says that it was trained on {trained_on}, source.base is {config.source.base}: "
        "its shapes fit, but in a base with other weights it does something else"
    )


def _unused_gpus(config: Config) -> list[str]:
    if not torch.cuda.is_available() or config.cluster.gpus_per_worker:
        return []
    return [
        "cluster.gpus_per_worker is 0, and there are GPUs here: the fit would run on the CPU; 1 puts it on them"
    ]


def _lost(adapter: AdapterPlan) -> str | None:
    if not adapter.lost_roles:
        return None
    return (
        f"adapters.{adapter.name}: the target has no linear that does what {', '.join(adapter.lost_roles)} of the source "
        "do; what the adapter changes there is lost"
    )


def _adapter_plan(adapter: AdapterSource, source: Topology, target: Topology, config: Config) -> AdapterPlan:
    header = read_header(adapter.path)
    linears = source.by_path()
    modules: dict[tuple[int, str], str] = {}
    for path, shape in header.modules.items():
        if path not in linears:
            raise UserError(
                f"adapters.{adapter.name}: {path} is no linear of {config.source.base}; give its own base"
            )
        check_shape(path, linears[path], (shape.d_out, shape.d_in))
        modules |= {(linears[path].layer, role): path for role in linears[path].roles}
    roles = {role for _, role in modules}
    mapped = _mapped(adapter, header, modules, source, target)
    spaces = _spaces(header, source, target, roles)
    learned = sum(space.target_width * (space.input_span + space.output_span) for space in spaces.values())
    rank = max(shape.rank for shape in header.modules.values())
    if config.fit.residual:
        learned += sum(whole * linear.d_in + rank * linear.d_out for linear, whole in mapped)
    return AdapterPlan(
        name=adapter.name,
        rank=rank,
        target_rank=max(whole for _, whole in mapped),
        modules=len(header.modules),
        roles=sorted(roles),
        target_modules=len(mapped),
        lost_roles=sorted(roles - {role for linear in target.linears for role in linear.roles}),
        spaces=spaces,
        learned_numbers=learned,
    )


def _mapped(
    adapter: AdapterSource,
    header: AdapterHeader,
    modules: dict[tuple[int, str], str],
    source: Topology,
    target: Topology,
) -> list[tuple[Linear, int]]:
    """The target's linears that get an update and its rank, from `modules` (layer and role -> path in the source)."""
    pi = layer_map(source.num_layers, target.num_layers)
    mapped = []
    for linear in target.linears:
        places = [(pi[linear.layer], role) for role in linear.roles]
        feeding = {modules[place] for place in places if place in modules}
        rank = sum(header.modules[path].rank for path in feeding)
        if rank > LORA_RANKS[-1]:
            raise UserError(
                f"adapters.{adapter.name}: {linear.path} of the target ({', '.join(linear.roles)}) would get rank {rank}, vLLM "
                f"runs adapters up to rank {LORA_RANKS[-1]}; lower the adapter's rank"
            )
        if feeding:
            mapped.append((linear, rank))
    if not mapped:
        raise UserError(
            f"adapters.{adapter.name}: nothing of it reaches the target; it changes "
            f"{', '.join(sorted({role for _, role in modules}))} of layers "
            f"{', '.join(map(str, sorted({layer for layer, _ in modules})))}, and the target's layers are fed by "
            f"{', '.join(map(str, pi))}: another target, or an adapter of more layers or linears"
        )
    return mapped


def _spaces(
    header: AdapterHeader, source: Topology, target: Topology, roles: set[str]
) -> dict[str, SpacePlan]:
    """Span ranks: the ranks stacked over the target's layers and modules, at most the source's width."""
    rank = max(shape.rank for shape in header.modules.values())
    stacked = rank * len(set(layer_map(source.num_layers, target.num_layers)))
    inputs = {space: sum(READS[role] == space for role in roles) for space in SPACES}
    outputs = {space: sum(WRITES[role] == space for role in roles) for space in SPACES}
    return {
        space: SpacePlan(
            source.widths[space],
            target.widths[space],
            min(source.widths[space], stacked * inputs[space]),
            min(source.widths[space], stacked * outputs[space]),
        )
        for space in SPACES
        if inputs[space] or outputs[space]
    }


def _corpus_megabytes(config: Config) -> float:
    """Upper bound: every response as long as allowed; ids and logprobs of k + 1 alternatives, two more logprobs."""
    s = config.synthesis
    per_token = 8 * (s.top_k + 1) + 12
    return round(s.samples * s.max_response_tokens * per_token / 1e6, 1)


def _memory(config: Config, source: Shape, target: Shape, adapters: list[AdapterPlan]) -> dict[str, float]:
    """Per engine, or each of its GPUs, and per fit worker, in GB: what sizing.py counts, and the process itself."""
    fit, synthesis = config.fit, config.synthesis
    teacher = engine_memory(
        source,
        rank=max(adapter.rank for adapter in adapters),
        slots=1,
        dtype=synthesis.dtype,
        tensor_parallel=synthesis.tensor_parallel,
        nodes=synthesis.pipeline_parallel,
        length=longest_text(config),
    )
    student = fit_memory(
        target,
        learned=max(adapter.learned_numbers for adapter in adapters),
        dtype=fit.dtype,
        zero_stage=fit.zero_stage,
        workers=fit.workers,
        sequences=fit.batch_size // fit.workers // fit.micro_batches,
        length=fit_length(config),
        checkpointing=fit.gradient_checkpointing,
        on_gpu=config.cluster.gpus_per_worker > 0,
    )
    gpus = synthesis.tensor_parallel * synthesis.pipeline_parallel
    served = max(source.parameters, target.parameters) * BYTES[config.evaluation.dtype] / gpus
    if not config.cluster.gpus_per_engine:
        teacher = replace(teacher, kv_cache=cpu_cache())
    per = "GPU" if config.cluster.gpus_per_engine else "engine"
    return {
        f"synthesize, per {per}": round(teacher.total / 1e9, 2),
        "fit, per worker": round((student.total + CONTEXT_BYTES) / 1e9, 2),
        f"evaluate, per {per}": round((served + cpu_cache() + CONTEXT_BYTES) / 1e9, 2),
    }


def _check_memory(plan: Plan, config: Config) -> None:
    """On one machine without a GPU its memory is the limit; elsewhere what runs there finds out."""
    on_gpus = config.cluster.gpus_per_engine or config.cluster.gpus_per_worker or torch.cuda.is_available()
    if on_gpus or config.cluster.address or os.environ.get("RAY_ADDRESS"):
        return
    available = _memory_available()
    wanted = max(
        plan.memory_gigabytes["synthesize, per engine"] * config.synthesis.engines,
        plan.memory_gigabytes["fit, per worker"] * config.fit.workers,
        plan.memory_gigabytes["evaluate, per engine"],
    )
    if available is not None and wanted > available:
        raise UserError(
            f"memory: about {wanted:.1f} GB are needed at a time, {available:.1f} GB are free; lower "
            "synthesis.engines, fit.workers or fit.batch_size, or use a bigger machine"
        )


def _memory_available() -> float | None:
    """GB that could be allocated now; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            values = dict(line.split(":") for line in lines)
    except OSError:
        return None
    return int(values["MemAvailable"].split()[0]) * 1024 / 1e9
