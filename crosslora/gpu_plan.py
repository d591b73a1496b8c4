"""What a transfer takes on GPUs: settings that fit, memory, hours and cost, from the two bases' configurations alone.

Memory is counted in sizing.py. Times are upper bounds in tokens (every prompt and answer as long as allowed) at the
shares of a GPU's peak that gpus.py names; nothing here was measured on a GPU by this project.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from crosslora.config import Config
from crosslora.errors import UserError
from crosslora.evaluation.tasks import read_items, roomy
from crosslora.gpus import DECODE_SHARE, FIT_SHARE, GPUS, NODE, PREFILL_SHARE, USABLE, Gpu
from crosslora.precision import decided
from crosslora.sizing import (
    BYTES,
    CONCURRENT,
    CONTEXT_BYTES,
    EngineMemory,
    FitMemory,
    Shape,
    engine_memory,
    fit_memory,
)
from crosslora.teacher.prompts import read_prompts
from crosslora.vllm_settings import allowed_rank, slots

BYTES_PER_TOKEN = 4
"""Of most text, about."""
Settings = dict[str, int | bool]
"""Of the configuration."""


@dataclass(frozen=True)
class GpuStage:
    """A stage on a number of GPUs."""

    gpus: int
    settings: Settings
    """With which it fits."""
    gigabytes: float
    """Per GPU."""
    hours: float
    dollars: float
    gigabytes_sent: float
    """By each GPU over the whole stage, for ZeRO."""


@dataclass(frozen=True)
class GpuPlan:
    gpu: str
    gpus: int
    """That were asked for, or the smallest number."""
    smallest: int | None
    """Fewest GPUs on which all stages fit; None where 1024 are too few."""
    synthesize: GpuStage | None
    fit: GpuStage | None
    evaluate: GpuStage | None
    """None where a stage does not fit."""
    memory: dict[str, dict[str, float]]
    """GB per GPU and what takes them, also of a stage that does not fit: of the source's engine that synthesizes, of
    the base that takes more to evaluate, and of a fit worker without and with gradient checkpointing. `other` is CUDA,
    NCCL and their buffers, and what the base's own texts take beyond a step."""
    gigabytes_loaded: float
    """By every node, at least once: both bases in 16 bits."""
    advice: str


@dataclass(frozen=True)
class _Case:
    """What is planned, whatever the number of GPUs."""

    config: Config
    source: Shape
    target: Shape
    ranks: tuple[int, int]
    """The largest of the adapter, on the source and on the target."""
    learned: int
    gpu: str
    questions: list[tuple[int, int, int]]
    """(Items, tokens of the longest prompt, most tokens of an answer) of every task."""
    longest: int
    """Tokens of a text of synthesis."""
    fitted: int
    """Tokens of a sample."""

    @property
    def kind(self) -> Gpu:
        return GPUS[self.gpu]

    @property
    def usable(self) -> float:
        """Bytes of a GPU."""
        return USABLE * self.kind.memory

    def stage(
        self, held: int, used: int, seconds: float, gigabytes: float, settings: Settings, sent: float = 0.0
    ) -> GpuStage:
        """Of `held` GPUs, all of which are paid for, `used` have work."""
        hours = seconds / 3600
        return GpuStage(used, settings, gigabytes, hours, held * self.kind.dollars * hours, sent / 1e9)


class _Parallel(NamedTuple):
    """How an engine is spread: over GPUs of a node, and over nodes."""

    tensor: int
    nodes: int

    @property
    def gpus(self) -> int:
        return self.tensor * self.nodes


PARALLEL = [_Parallel(1, 1), _Parallel(2, 1), _Parallel(4, 1), *(_Parallel(NODE, n) for n in (1, 2, 4))]


class _FitSettings(NamedTuple):
    workers: int
    batch: int
    zero_stage: int
    checkpointing: bool
    micro_batches: int


def gpu_plan(
    config: Config,
    source: Shape,
    target: Shape,
    *,
    ranks: tuple[int, int],
    learned: int,
    gpu: str,
    gpus: int | None,
) -> GpuPlan:
    """The plan on `gpus` GPUs of the kind `gpu`, or on as few as will do; raises UserError for a kind not in GPUS, and
    for a task that cannot be read."""
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu}: not known here; one of {', '.join(GPUS)}")
    lengths = _questions(config), longest_text(config), fit_length(config)
    case = _Case(decided(config, on_gpus=True), source, target, ranks, learned, gpu, *lengths)
    counts = [2**n for n in range(11)]
    smallest = next((count for count in counts if all(_stages(case, count).values())), None)
    chosen = gpus or smallest or counts[-1]
    stages = _stages(case, chosen)
    return GpuPlan(
        gpu=gpu,
        gpus=chosen,
        smallest=smallest,
        **stages,
        memory=_memory(case, chosen),
        gigabytes_loaded=2 * (source.parameters + target.parameters) / 1e9,
        advice=_advice(case, chosen, smallest, stages),
    )


def _stages(case: _Case, gpus: int) -> dict[str, GpuStage | None]:
    parallel = _parallel(case, gpus)
    engines_fit = _engines_fit(case, parallel)
    return {
        "synthesize": _synthesize(case, gpus, parallel) if engines_fit else None,
        "fit": _fit(case, gpus),
        "evaluate": _evaluate(case, gpus, parallel) if engines_fit else None,
    }


def _memory(case: _Case, gpus: int) -> dict[str, dict[str, float]]:
    parallel = _parallel(case, gpus)
    base, engines = _larger_base(case, parallel), _engines(case, parallel)
    rows = {
        name: _row(memory.total, weights=memory.weights, kv_cache=memory.kv_cache, lora=memory.lora)
        for name, memory in (
            ("synthesize, source", engines["synthesize"]),
            (f"evaluate, {base}", engines[base]),
        )
    }
    for name, checkpointing in (("fit", False), ("fit, checkpointing", True)):
        memory = _fit_memory(case, _fit_settings(case, gpus)._replace(checkpointing=checkpointing))
        rows[name] = _row(
            memory.total + CONTEXT_BYTES,
            weights=memory.weights,
            learned=memory.learned,
            activations=memory.activations,
            working=memory.working,
        )
    return rows


def _row(total: float, **parts: float) -> dict[str, float]:
    """GB from bytes, to the megabyte."""
    amounts = {**parts, "other": total - sum(parts.values()), "total": total}
    return {name: round(amount / 1e9, 3) for name, amount in amounts.items()}


def _advice(case: _Case, gpus: int, smallest: int | None, stages: dict[str, GpuStage | None]) -> str:
    """Settings that fit; else what is missing, and what would change it."""
    missing = [name for name in ("synthesize", "fit") if stages[name] is None]
    if missing:
        more = f"{smallest} would do" if smallest else "no number of them will do as it is set"
        causes = {"synthesize": _engine_cause, "fit": _fit_cause}
        said = [f"{' and '.join(missing)} cannot run on {gpus} x {case.gpu}", more]
        return "; ".join([*said, *(causes[name](case, gpus) for name in missing)])
    settings: Settings = {"cluster.gpus_per_engine": 1, "cluster.gpus_per_worker": 1}
    for stage in stages.values():
        settings |= stage.settings if stage else {}
    return " ".join(f"-s {name}={str(value).lower()}" for name, value in settings.items())


def _engine_cause(case: _Case, gpus: int) -> str:
    parallel = _parallel(case, gpus)
    name, memory = max(_engines(case, parallel).items(), key=lambda engine: engine[1].total)
    base = "source" if name == "synthesize" else name
    fixed = memory.total - memory.kv_cache
    way = "lower synthesis.max_prompt_tokens or synthesis.max_response_tokens"
    if fixed > case.usable:
        way = "take a kind with more memory" + (
            ", or more GPUs per engine" if parallel != PARALLEL[-1] else ""
        )
    return (
        f"an engine of {parallel.gpus} for the {base} takes {fixed / 1e9:.1f} GB per GPU and "
        f"{memory.kv_cache / 1e9:.1f} of KV cache, {case.usable / 1e9:.1f} are usable: {way}"
    )


def _fit_cause(case: _Case, gpus: int) -> str:
    memory = _fit_memory(case, _fit_settings(case, gpus))
    fixed = memory.weights + memory.learned + CONTEXT_BYTES
    way = "lower fit.max_tokens"
    if fixed + memory.rehearsal > case.usable:
        way = "take more GPUs, or a kind with more memory"
    return (
        f"a fit worker takes {fixed / 1e9:.1f} GB and {(memory.total + CONTEXT_BYTES - fixed) / 1e9:.1f} of activations "
        f"and what comes and goes beside them, {case.usable / 1e9:.1f} are usable: {way}"
    )


def _engines(case: _Case, parallel: _Parallel) -> dict[str, EngineMemory]:
    """One GPU of every engine. Evaluation serves both bases on as many GPUs as an engine of synthesis has, the source
    with the teacher's adapter and the target with the student and the baselines."""
    synthesis, evaluation = case.config.synthesis, case.config.evaluation
    on_source, on_target = map(allowed_rank, case.ranks)
    engines = {
        "synthesize": (case.source, on_source, synthesis.dtype, 1),
        "source": (case.source, on_source, evaluation.dtype, slots(1)),
        "target": (case.target, on_target, evaluation.dtype, slots(len(evaluation.baselines) + 1)),
    }
    return {
        name: engine_memory(
            shape,
            rank=rank,
            slots=adapters,
            dtype=dtype,
            tensor_parallel=parallel.tensor,
            nodes=parallel.nodes,
            length=case.longest,
        )
        for name, (shape, rank, dtype, adapters) in engines.items()
    }


def longest_text(config: Config) -> int:
    """Tokens of the longest text that an engine of synthesis holds: what the teacher wrote may take more tokens when it
    is read again."""
    return config.synthesis.max_prompt_tokens + _prompt_tokens(config) + config.synthesis.max_response_tokens


def _prompt_tokens(config: Config) -> int:
    """Of the longest prompt."""
    prompts, longest = config.synthesis.prompts, config.synthesis.max_prompt_tokens
    if prompts.file > 0 and prompts.prompts_file:
        given = read_prompts(prompts.prompts_file, "prompts_file")
        longest = max(longest, math.ceil(max(len(text.encode()) for text in given) / BYTES_PER_TOKEN))
    return longest


def _engines_fit(case: _Case, parallel: _Parallel) -> bool:
    return max(memory.total for memory in _engines(case, parallel).values()) <= case.usable


def _parallel(case: _Case, gpus: int) -> _Parallel:
    """Fewest GPUs per engine on which all engines fit; the most there can be where they never do. vLLM gives every GPU
    of a node equally many heads."""
    heads = math.gcd(case.source.heads, case.target.heads)
    possible = [parallel for parallel in PARALLEL if parallel.gpus <= gpus and heads % parallel.tensor == 0]
    return next((n for n in possible if _engines_fit(case, n)), possible[-1])


def _larger_base(case: _Case, parallel: _Parallel) -> str:
    engines = _engines(case, parallel)
    return max(("target", "source"), key=lambda base: engines[base].total)


def _synthesize(case: _Case, gpus: int, parallel: _Parallel) -> GpuStage:
    settings = case.config.synthesis
    engines = gpus // parallel.gpus
    shard = min(settings.shard_size, max(settings.samples // engines, 8))  # else some engines get none
    written = settings.samples * (settings.max_prompt_tokens + settings.max_response_tokens)
    read = 2 * settings.samples * case.longest  # to answer, and to score the answer
    seconds = _engine_seconds(case.kind, case.source, settings.dtype, case.longest, written, read)
    return case.stage(
        gpus,
        engines * parallel.gpus,
        seconds / (engines * parallel.gpus),
        _engines(case, parallel)["synthesize"].total / 1e9,
        {
            "synthesis.engines": engines,
            "synthesis.tensor_parallel": parallel.tensor,
            "synthesis.pipeline_parallel": parallel.nodes,
            "synthesis.shard_size": shard,
        },
    )


def _evaluate(case: _Case, gpus: int, parallel: _Parallel) -> GpuStage:
    """One engine, first with the source and then with the target; every model writes all the tokens it may, and every
    prompt is read twice: to be answered, and to score the reference."""
    settings, seconds = case.config.evaluation, 0.0
    for items, prompt, answer in case.questions:
        baselines = len(settings.baselines) * min(items, settings.baseline_items)
        for shape, asked in ((case.source, items), (case.target, 2 * items + baselines)):
            length = prompt + answer
            seconds += _engine_seconds(
                case.kind, shape, settings.dtype, length, asked * answer, 2 * asked * length
            )
    memory = _engines(case, parallel)[_larger_base(case, parallel)]
    return case.stage(gpus, parallel.gpus, seconds / parallel.gpus, memory.total / 1e9, {})


def _questions(config: Config) -> list[tuple[int, int, int]]:
    """Of the held-out prompts, and of the tasks as their files are."""
    synthesis, evaluation = config.synthesis, config.evaluation
    questions = [(evaluation.held_out_items, synthesis.max_prompt_tokens, synthesis.max_response_tokens)]
    for task in evaluation.tasks:
        items = read_items(task)
        prompt = max(_tokens(item.prompt) for item in items)
        answer = task.max_tokens or roomy(max(_tokens(item.reference) for item in items))
        questions.append((len(items), prompt, answer))
    return questions


def _tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def _engine_seconds(kind: Gpu, shape: Shape, dtype: str, length: int, written: int, read: int) -> float:
    """Of one GPU, for tokens that are `written` and `read` in texts of `length`. Writing one reads all weights, and the
    cache of each sequence, for CONCURRENT tokens; reading one takes two operations per weight."""
    s = BYTES[dtype]
    cache = s * 2 * shape.layers * shape.key * length
    bytes_per_token = (s * shape.parameters + CONCURRENT * cache) / CONCURRENT
    writing = written * bytes_per_token / (DECODE_SHARE * kind.bandwidth)
    reading = read * 2 * shape.parameters / (PREFILL_SHARE * kind.flops)
    return writing + reading


def _fit(case: _Case, gpus: int) -> GpuStage | None:
    settings = _fit_settings(case, gpus)
    memory = _fit_memory(case, settings).total + CONTEXT_BYTES
    if memory > case.usable:
        return None
    sent = case.config.fit.steps * _sent(case, settings)
    return case.stage(
        gpus,
        gpus,
        _fit_seconds(case, settings),
        memory / 1e9,
        {
            "fit.workers": gpus,
            "fit.batch_size": settings.batch,
            "fit.zero_stage": settings.zero_stage,
            "fit.gradient_checkpointing": settings.checkpointing,
            "fit.micro_batches": settings.micro_batches,
        },
        sent,
    )


def _fit_settings(case: _Case, gpus: int) -> _FitSettings:
    """The fastest that fit, simple ones first; where none fits, those that take least memory."""
    batch = math.lcm(case.config.fit.batch_size, gpus)
    parts = [n for n in range(1, batch // gpus + 1) if batch // gpus % n == 0]
    choices = [_FitSettings(gpus, batch, *choice) for choice in product((1, 3), (False, True), parts)]
    taken = {choice: _fit_memory(case, choice).total + CONTEXT_BYTES for choice in choices}
    fitting = [choice for choice in choices if taken[choice] <= case.usable]
    if not fitting:
        return min(choices, key=lambda choice: taken[choice])
    return min(fitting, key=lambda choice: _fit_seconds(case, choice))


def fit_length(config: Config) -> int:
    """Tokens of the longest sample."""
    return min(config.fit.max_tokens, _prompt_tokens(config) + config.synthesis.max_response_tokens)


def _fit_memory(case: _Case, settings: _FitSettings) -> FitMemory:
    return fit_memory(
        case.target,
        learned=case.learned,
        dtype=case.config.fit.dtype,
        zero_stage=settings.zero_stage,
        workers=settings.workers,
        sequences=settings.batch // settings.workers // settings.micro_batches,
        length=case.fitted,
        checkpointing=settings.checkpointing,
        on_gpu=True,
    )


def _fit_seconds(case: _Case, settings: _FitSettings) -> float:
    fit, kind = case.config.fit, case.kind
    tokens = fit.steps * settings.batch * case.fitted / settings.workers
    # forward, gradients on the activations (the base is frozen), and with checkpointing forward once more
    operations = (6 if settings.checkpointing else 4) * case.target.parameters * tokens
    # a ring is as fast as its slowest link; what is sent while the GPU computes costs no time
    link = kind.link if settings.workers <= NODE else kind.network
    return max(operations / (FIT_SHARE * kind.flops), fit.steps * _sent(case, settings) / link)


def _sent(case: _Case, settings: _FitSettings) -> float:
    """Bytes that each GPU sends in a step: a ring moves (N - 1) / N of everything. ZeRO-3 gathers all weights for the
    forward and once more for the backward pass of every micro-batch."""
    ring = (settings.workers - 1) / settings.workers
    gradients = 2 * 4 * case.learned * ring
    weights = 2 * BYTES[case.config.fit.dtype] * case.target.parameters * ring * settings.micro_batches
    return gradients + (weights if settings.zero_stage == 3 else 0.0)
