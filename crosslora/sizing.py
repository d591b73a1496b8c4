"""How much memory and time a model of a given shape takes, from its configuration alone.

Every figure is counted from what the code keeps, and none is fitted to a measurement but HEAP; benchmarks/memory.py
compares.
Bytes, seconds and numbers of parameters, all per GPU (or per process on CPU) where not said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from crosslora.models import caps_scores
from crosslora.topology import decoder_layers, discover, meta_model, space_widths
from crosslora.training import rehearsal
from crosslora.training.losses import LOGITS_BYTES

BYTES = {"float32": 4, "bfloat16": 2}
LEARNED_BYTES = 4 * 5
"""Per learned number, float32: value, gradient, two moments, and the best values so far."""
CONTEXT_BYTES = 1.5e9
"""CUDA's context, kernels, buffers of NCCL and DeepSpeed; on CPU the libraries of a process."""
LONGEST_PLAIN_ATTENTION = 256
"""Up to here fitting on CPU leaves fused attention out: its backward pass takes several times as long as that of the
plain products."""
HEAP = 2.205
"""Bytes of glibc's heap for each byte of activations that lives there: freed tensors leave holes that the next ones do not
fit into. (Chunks of logits are of one size, and each takes the place of the one before.) From the calibration point of
benchmarks/memory.py, which is none of those it tests."""
CONCURRENT = 64
"""Sequences that an engine should hold at once, to be worth its GPU."""


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer: what its memory and its time depend on."""

    parameters: int
    layers: int
    layer_parameters: int
    largest: int
    """Parameters of the largest single weight: the embedding, or a projection of the MLP."""
    hidden: int
    query: int
    key: int
    mlp: int
    heads: int
    vocabulary: int
    normed: int
    """Sum of the widths that the norms of one layer act on."""
    linears: int
    """That an adapter may change, in all layers."""
    linear_widths: int
    """Sum of the input and output widths of these: a LoRA of rank r on all of them has r times so many numbers."""
    capped: bool
    """Attention scores are."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        model, text = meta_model(config), config.get_text_config()
        widths = space_widths(text)
        prefix = decoder_layers(model, text.num_hidden_layers)
        layer = model.get_submodule(f"{prefix}.0")
        weights = [p.numel() for p in {id(p): p for p in model.parameters()}.values()]
        linears = discover(config).linears
        return cls(
            parameters=sum(weights),
            layers=text.num_hidden_layers,
            layer_parameters=sum(p.numel() for p in layer.parameters()),
            largest=max(weights),
            hidden=widths["residual"],
            query=widths["query"],
            key=widths["key"],
            mlp=widths["mlp"],
            heads=text.num_attention_heads,
            vocabulary=text.vocab_size,
            normed=sum(_normed(name, widths) for name, m in layer.named_modules() if _is_norm(m)),
            linears=len(linears),
            linear_widths=sum(linear.d_in + linear.d_out for linear in linears),
            capped=caps_scores(config),
        )


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _normed(name: str, widths: dict[str, int]) -> int:
    """Width that a norm acts on: all heads of queries or keys, or the residual stream."""
    leaf = name.rpartition(".")[2]
    return widths["query" if leaf.startswith("q") else "key" if leaf.startswith("k") else "residual"]


def layer_activations(shape: Shape, dtype: str, length: int, on_gpu: bool) -> float:
    """Bytes per token that one layer keeps for its backward pass, base frozen and every linear adapted.

    A frozen linear keeps nothing, its adapter keeps the input. A norm keeps its input in float32. The gated MLP keeps
    gate, its activation, and up. Attention keeps queries, keys, values (repeated to all heads) and, where it is not
    fused, in float32, beside a row of probabilities per head (with a cap also what it makes of the scores).
    """
    s = BYTES[dtype]
    inputs = s * (2 * shape.hidden + shape.query + shape.mlp)
    mlp = s * 3 * shape.mlp
    norms = 4 * shape.normed
    if shape.capped:  # not fused anywhere
        attention: float = 4 * (3 * shape.query + 2 * shape.heads * length)
    elif on_gpu or length > LONGEST_PLAIN_ATTENTION:
        attention = s * (2 * shape.query + 2 * shape.key) + 4 * shape.heads
    else:
        attention = 4 * (3 * shape.query + shape.heads * length)
    return inputs + mlp + norms + attention


@dataclass(frozen=True)
class FitMemory:
    """Bytes of one fit worker at its peak, beside what the process takes before it loads a model."""

    weights: float
    learned: float
    activations: float
    """That are kept for the backward pass."""
    working: float
    """What comes and goes beside them: first the logits, then the gradients of one layer after the other."""
    rehearsal: float
    """While the base writes its own texts, before the first step."""

    @property
    def total(self) -> float:
        return self.weights + self.learned + max(self.activations + self.working, self.rehearsal)


def fit_memory(
    shape: Shape,
    *,
    learned: int,
    dtype: str,
    zero_stage: int,
    workers: int,
    sequences: int,
    length: int,
    checkpointing: bool,
    on_gpu: bool,
) -> FitMemory:
    """`learned` numbers, `sequences` of `length` tokens per worker and micro-batch."""
    s = BYTES[dtype]
    tokens = sequences * length
    weights = float(s * shape.parameters)
    if zero_stage == 3:  # a share of all, and what is gathered for the layer at work and the next one
        weights = weights / workers + s * (2 * shape.layer_parameters + shape.largest)
        if workers > 1 and not on_gpu:  # gloo gathers into a buffer of its own first
            weights += s * shape.largest
    # values, gradients and, on one of them, the best so far are whole on every worker, the moments a share from ZeRO-1 on
    shares = workers if zero_stage else 1
    per_layer = tokens * layer_activations(shape, dtype, length, on_gpu)
    activations, layer = (
        shape.layers * per_layer,
        per_layer,
    )  # a layer's gradients are as large as what it keeps
    if checkpointing:  # the input of every layer; what one keeps is there while it is computed again
        activations, layer = shape.layers * tokens * s * shape.hidden, 2 * per_layer
    activations += tokens * shape.hidden * (4 + 2 * s)  # the last norm and its gradient
    chunk = min(LOGITS_BYTES, 4 * tokens * shape.vocabulary)
    logits = chunk * (1 + 2 * s / 4)  # float32, as the model gives them, and as its gradient
    heap = (
        1.0 if on_gpu or zero_stage == 3 or checkpointing else HEAP
    )  # large blocks: cluster.fit_environment
    return FitMemory(
        weights=weights,
        learned=learned * (LEARNED_BYTES - 8 + 8 / shares),
        activations=heap * activations,
        working=max(logits, heap * layer),
        rehearsal=_rehearsal(shape, s),
    )


def _rehearsal(shape: Shape, number_bytes: int) -> float:
    """Keys and values of the texts that are written together, and three rows of the vocabulary in float32 for each."""
    cached = 2 * shape.layers * shape.key * number_bytes * (rehearsal.TOKENS + 1)
    return float(rehearsal.BATCH * (cached + 3 * 4 * shape.vocabulary))


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one GPU of a vLLM engine, at the least that is worth running."""

    weights: float
    lora: float
    kv_cache: float

    @property
    def total(self) -> float:
        return self.weights + self.lora + self.kv_cache + CONTEXT_BYTES


def engine_memory(
    shape: Shape, *, rank: int, slots: int, dtype: str, tensor_parallel: int, nodes: int, length: int
) -> EngineMemory:
    """`slots` adapters of `rank` on all linears; CONCURRENT sequences of `length` tokens in the cache. The layers are
    spread over `nodes`, each of them over `tensor_parallel` GPUs.

    vLLM shares a LoRA as it shares its linear, whose side on the residual stream every rank has whole
    (vllm/lora/layers, fully_sharded_loras left off).
    """
    s = BYTES[dtype]
    whole = shape.linears * shape.hidden
    return EngineMemory(
        weights=s * shape.parameters / tensor_parallel / nodes,
        lora=s * rank * slots * (whole + (shape.linear_widths - whole) / tensor_parallel) / nodes,
        kv_cache=s * 2 * shape.layers * shape.key * length * CONCURRENT / tensor_parallel / nodes,
    )
