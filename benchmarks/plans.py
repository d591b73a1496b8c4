"""Plans for large pairs on 80 GB GPUs, as in docs/cluster.md; writes benchmarks/plans.json and prints the table.

    python benchmarks/plans.py

From the published configurations of the models (numbers below), with crosslora's defaults, an adapter of rank 16 on
all linears, and 4,000 samples. No weights are read and nothing is fetched; no GPU has run any of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from transformers import LlamaConfig, Qwen2Config

from crosslora.config import parse_config
from crosslora.gpu_plan import GpuPlan, gpu_plan
from crosslora.sizing import Shape

HERE = Path(__file__).resolve().parent
RANK, KIND = 16, "H100-80GB"


def llama(hidden: int, mlp: int, layers: int, heads: int) -> LlamaConfig:
    """The shape of a Llama 3.1."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )


MODELS = {
    "Llama-3.1-8B": llama(4096, 14_336, 32, 32),
    "Llama-3.1-70B": llama(8192, 28_672, 80, 64),
    "Llama-3.1-405B": llama(16_384, 53_248, 126, 128),
    "Qwen2.5-72B": Qwen2Config(
        vocab_size=152_064,
        hidden_size=8192,
        intermediate_size=29_568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
PAIRS = [
    ("Llama-3.1-70B", "Qwen2.5-72B"),
    ("Llama-3.1-8B", "Llama-3.1-70B"),
    ("Llama-3.1-70B", "Llama-3.1-8B"),
    ("Llama-3.1-405B", "Llama-3.1-405B"),
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
    layers = min(source.layers, target.layers)
    spans = [  # width of a space, roles that read it, roles that write it; values are as wide as keys
        ("hidden", 5, 2),
        ("query", 1, 1),
        ("key", 0, 1),
        ("key", 0, 1),
        ("mlp", 1, 2),
    ]
    learned = 0
    for width, reads, writes in spans:
        most, stacked = getattr(source, width), RANK * layers
        learned += getattr(target, width) * (min(most, stacked * reads) + min(most, stacked * writes))
    per_layer = 5 * target.hidden + 2 * target.query + 2 * target.key + 2 * target.hidden + 3 * target.mlp
    return learned + RANK * target.layers * per_layer


def row(pair: str, plan: GpuPlan) -> str:
    cells = [pair]
    for stage in (plan.synthesize, plan.fit):
        if stage is None:
            cells += ["does not fit", "", ""]
            continue
        settings = ", ".join(
            f"{name.partition('.')[2]} {str(value).lower()}" for name, value in stage.settings.items()
        )
        cells += [settings, f"{stage.gigabytes:g}", f"{stage.hours:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    shapes = {name: Shape.of(config) for name, config in MODELS.items()}
    plans = {}
    print("| pair, GPUs | synthesize | GB | hours | fit | GB | hours |\n|---|---|---|---|---|---|---|")
    for source, target in PAIRS:
        learned = learned_numbers(shapes[source], shapes[target])
        for gpus in (8, 16, 64):
            plan = gpu_plan(
                CONFIG, shapes[source], shapes[target], rank=RANK, learned=learned, gpu=KIND, gpus=gpus
            )
            plans[f"{source} to {target} on {gpus}"] = {**asdict(plan), "learned": learned}
            print(row(f"{source} to {target}, {gpus}", plan))
    (HERE / "plans.json").write_text(json.dumps(plans, indent=2) + "\n")


if __name__ == "__main__":
    main()
