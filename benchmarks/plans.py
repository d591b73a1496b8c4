"""Plans for large pairs on 80 GB GPUs, and for everyday pairs on what clouds rent; writes benchmarks/plans.json and prints
what docs/cluster.md shows of it.

    python benchmarks/plans.py

From the published configurations of the models (numbers below), with crosslora's defaults, an adapter of rank 16 on
all linears, and 4,000 samples. No weights are read and nothing is fetched; no GPU has run any of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, Qwen2Config

from crosslora.config import parse_config
from crosslora.gpu_plan import GpuPlan, GpuStage, gpu_plan
from crosslora.gpus import FIT_SHARE, GPUS
from crosslora.sizing import LEARNED_BYTES, Shape, layer_activations

HERE = Path(__file__).resolve().parent
RANK, LARGE_KIND = 16, "H100-80GB"
EVERYDAY_KINDS = ("L4-24GB", "L40S-48GB", "A100-80GB", "H100-80GB")


def llama(hidden: int, mlp: int, layers: int, heads: int, tied: bool = False) -> LlamaConfig:
    """The shape of a Llama 3."""
    return LlamaConfig(
        tie_word_embeddings=tied,
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )


def qwen(hidden: int, mlp: int, layers: int, heads: int) -> Qwen2Config:
    """The shape of a large Qwen 2.5."""
    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )


MODELS = {
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, tied=True),
    "Llama-3.1-8B": llama(4096, 14_336, 32, 32),
    "Llama-3.1-70B": llama(8192, 28_672, 80, 64),
    "Llama-3.1-405B": llama(16_384, 53_248, 126, 128),
    "Qwen2.5-14B": qwen(5120, 13_824, 48, 40),
    "Qwen2.5-72B": qwen(8192, 29_568, 80, 64),
}
LARGE_PAIRS = [
    ("Llama-3.1-70B", "Qwen2.5-72B"),
    ("Llama-3.1-8B", "Llama-3.1-70B"),
    ("Llama-3.1-70B", "Llama-3.1-8B"),
    ("Llama-3.1-405B", "Llama-3.1-405B"),
]
EVERYDAY_PAIRS = [
    ("Llama-3.2-1B", "Llama-3.2-1B"),
    ("Llama-3.1-8B", "Llama-3.1-8B"),
    ("Llama-3.1-8B", "Qwen2.5-14B"),
]
CONFIG = parse_config(
    {
        "run": "run",
        "source": {"base": "source/base"},
        "adapters": [{"name": "a", "path": "a"}],
        "target": {"base": "target/base"},
        "synthesis": {"samples": 4000, "max_response_tokens": 512},
        "fit": {"steps": 600, "batch_size": 16},
    },
    HERE,
)


def learned_numbers(source: Shape, target: Shape) -> int:
    """As plan.py counts them: maps in the span of the factors, and a residual of the adapter's rank on every linear."""
    stacked = RANK * min(source.layers, target.layers)
    roles = [("hidden", 5, 2), ("query", 1, 1), ("key", 0, 1), ("key", 0, 1), ("mlp", 1, 2)]
    learned = 0
    for width, reads, writes in roles:  # that read and write the space; values are as wide as keys
        most = getattr(source, width)
        learned += getattr(target, width) * (min(most, stacked * reads) + min(most, stacked * writes))
    return learned + RANK * target.linear_widths


class Plans:
    """Every plan that the documentation shows, by its name in the JSON."""

    def __init__(self) -> None:
        self.shapes = {name: Shape.of(config) for name, config in MODELS.items()}
        self.made: dict[str, dict[str, Any]] = {}

    def plan(self, source: str, target: str, kind: str, gpus: int | None) -> GpuPlan:
        shapes = self.shapes[source], self.shapes[target]
        learned = learned_numbers(*shapes)
        plan = gpu_plan(CONFIG, *shapes, ranks=(RANK, RANK), learned=learned, gpu=kind, gpus=gpus)
        self.made[f"{source} to {target} on {plan.gpus} x {kind}"] = {**asdict(plan), "learned": learned}
        return plan

    def large(self) -> list[str]:
        """Rows of the table of large pairs."""
        return [
            large_row(f"{source}, {target}", self.plan(source, target, LARGE_KIND, gpus))
            for source, target in LARGE_PAIRS
            for gpus in (8, 16, 64)
        ]

    def everyday(self) -> list[str]:
        """Rows of the table of everyday pairs."""
        return [
            everyday_row(
                f"{source}, {target}",
                self.plan(source, target, kind, None),
                self.plan(source, target, kind, 8),
            )
            for source, target in EVERYDAY_PAIRS
            for kind in EVERYDAY_KINDS
        ]

    def worked(self) -> list[str]:
        """One row of each with its arithmetic: memory and hours of the first large pair's fit on 8 GPUs."""
        source, target = LARGE_PAIRS[0]
        plan = self.plan(source, target, LARGE_KIND, 8)
        learned = learned_numbers(self.shapes[source], self.shapes[target])
        assert plan.fit is not None
        return [
            worked_memory(self.shapes[target], plan.memory["fit"], plan.fit, learned),
            worked_hours(self.shapes[target], plan.fit),
        ]


def large_row(pair: str, plan: GpuPlan) -> str:
    stages = plan.synthesize, plan.evaluate, plan.fit
    settings = engines_of(plan.synthesize), None, fit_of(plan.fit)
    cells = [pair, str(plan.gpus)]
    for stage, setting in zip(stages, settings, strict=True):
        cells += [] if setting is None else [setting]
        cells += [f"{stage.gigabytes:.1f}", f"{stage.hours:.2f}"] if stage else ["", ""]
    return f"| {' | '.join(cells)} |"


def everyday_row(pair: str, plan: GpuPlan, on_eight: GpuPlan) -> str:
    most = max(stage.gigabytes for stage in stages_of(plan))
    cells = [pair, plan.gpu, str(plan.gpus), engines_of(plan.synthesize), fit_of(plan.fit), f"{most:.1f}"]
    cells += [f"{sum(stage.hours for stage in stages_of(plan)):.2f}"]
    cells += [f"{sum(stage.dollars for stage in stages_of(plan)):.2f}"]
    cells += [f"{sum(stage.hours for stage in stages_of(on_eight)):.2f}"]
    return f"| {' | '.join(cells)} |"


def stages_of(plan: GpuPlan) -> list[GpuStage]:
    return [stage for stage in (plan.synthesize, plan.fit, plan.evaluate) if stage is not None]


def engines_of(stage: GpuStage | None) -> str:
    if stage is None:
        return "does not fit"
    settings = stage.settings
    spread = settings["synthesis.tensor_parallel"] * settings["synthesis.pipeline_parallel"]
    return f"{settings['synthesis.engines']} x {spread}"


def fit_of(stage: GpuStage | None) -> str:
    if stage is None:
        return "does not fit"
    settings, micro_batches = stage.settings, stage.settings["fit.micro_batches"]
    words = [f"ZeRO-{settings['fit.zero_stage']}", f"batch {settings['fit.batch_size']}"]
    words += ["checkpointing"] if settings["fit.gradient_checkpointing"] else []
    words += [f"{micro_batches} micro-batches"] if micro_batches > 1 else []
    return ", ".join(words)


def worked_memory(shape: Shape, memory: dict[str, float], fit: GpuStage, learned: int) -> str:
    """GB of a ZeRO-3 fit without checkpointing, from the formulas of crosslora/sizing.py."""
    workers, share = fit.gpus, 2 * shape.parameters / fit.gpus / 1e9
    tokens = (
        fit.settings["fit.batch_size"] // workers // fit.settings["fit.micro_batches"] * tokens_of_a_sample()
    )
    per_token = layer_activations(shape, "bfloat16", tokens, on_gpu=True)
    return (
        f"2 x {shape.parameters / 1e9:.1f} / {workers} = {share:.1f} (its share of the weights) "
        f"+ 2 x (2 x {shape.layer_parameters / 1e9:.2f} + {shape.largest / 1e9:.2f}) = {memory['weights'] - share:.1f} "
        f"(gathered: two layers and the largest weight) "
        f"+ {learned / 1e9:.3f} x ({LEARNED_BYTES - 8} + 8 / {workers}) = {memory['learned']:.1f} (learned, with Adam) "
        f"+ {shape.layers} x {tokens} x {per_token / 1e6:.3f} / 1000 + {tokens} x {shape.hidden} x 8 / 10^9 = "
        f"{memory['activations']:.1f} (activations) + {memory['working']:.1f} (logits, or a layer's gradients) + {memory['other']:.1f} (CUDA, NCCL) "
        f"= {memory['total']:.1f} GB"
    )


def worked_hours(shape: Shape, fit: GpuStage) -> str:
    """The same for time, from crosslora/gpu_plan.py."""
    kind, batch, steps = GPUS[LARGE_KIND], fit.settings["fit.batch_size"], CONFIG.fit.steps
    tokens = steps * batch * tokens_of_a_sample()
    computing = 4 * shape.parameters * tokens / fit.gpus / (FIT_SHARE * kind.flops)
    sending = 1e9 * fit.gigabytes_sent / kind.link
    return (
        f"4 x {shape.parameters / 1e9:.1f} x 10^9 x {steps} x {batch} x {tokens_of_a_sample()} / {fit.gpus} / "
        f"({FIT_SHARE} x {kind.flops / 1e12:.0f} x 10^12) = {computing:.0f} s to compute; {fit.gigabytes_sent:,.0f} GB / "
        f"{kind.link / 1e9:.0f} GB/s = {sending:.0f} s to send; the longer of the two is {fit.hours:.2f} hours"
    )


def tokens_of_a_sample() -> int:
    return CONFIG.synthesis.max_prompt_tokens + CONFIG.synthesis.max_response_tokens


def main() -> None:
    plans = Plans()
    print("\n".join([*plans.large(), "", *plans.worked(), "", *plans.everyday()]))
    (HERE / "plans.json").write_text(json.dumps(plans.made, indent=2) + "\n")


if __name__ == "__main__":
    main()
