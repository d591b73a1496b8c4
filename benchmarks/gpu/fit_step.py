"""The fit step of an 8B student on one GPU, with the settings that the plan recommends; writes benchmarks/gpu/fit_step.json.

    python -m benchmarks.gpu.fit_step --gpu H100-80GB

Needs torch, transformers, peft, pydantic, PyYAML, datasketch, pyarrow, tqdm and this checkout; no weights, no Ray, no DeepSpeed (one GPU
shards nothing). The student has the shape of Llama 3.1 8B and random weights; the adapter, of rank 16 on all linears of a base of the same shape, is
random, and so are the tokens. Every step is a real one: projection, forward, chunked loss over top-16 classes,
backward, clipping, AdamW.

`mfu` counts 4 operations per weight and token (the base is frozen: forward, and gradients on the activations), not those
that checkpointing computes again, over the data sheet's peak. `--shape small` runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.plans import CONFIG, MODELS, llama
from crosslora.adapter import LoraFactors
from crosslora.gpu_plan import gpu_plan
from crosslora.gpus import GPUS
from crosslora.projection.initial import random_map
from crosslora.projection.mapping import build_slots
from crosslora.projection.projection import Projection
from crosslora.projection.start import span_basis, start_of
from crosslora.projection.student import Student
from crosslora.sizing import Shape, fit_memory
from crosslora.topology import SPACES, Topology, discover
from crosslora.training.losses import Rows, summed_loss

HERE = Path(__file__).resolve().parent
RANK, TOP_K, WARM_UP = 16, 16, 3
GRADIENT_NORM, LEARNING_RATE = 1.0, 1e-4
SHAPES = {
    "8b": MODELS["Llama-3.1-8B"],
    "small": llama(64, 128, 2, 8),
}


@dataclass(frozen=True)
class Settings:
    sequences: int
    """Of a micro-batch."""
    length: int
    micro_batches: int
    checkpointing: bool


def recommended(shape: Shape, learned: int, gpu: str, length: int) -> Settings:
    """What `crosslora plan --gpu` prints for one of them."""
    config = CONFIG.model_copy(update={"fit": CONFIG.fit.model_copy(update={"max_tokens": length})})
    fit = gpu_plan(config, shape, shape, ranks=(RANK, RANK), learned=learned, gpu=gpu, gpus=1).fit
    assert fit is not None, f"an 8B student does not fit into {gpu}"
    parts, batch = int(fit.settings["fit.micro_batches"]), int(fit.settings["fit.batch_size"])
    return Settings(batch // parts, length, parts, bool(fit.settings["fit.gradient_checkpointing"]))


def random_projection(topology: Topology, rank: int) -> Projection:
    """From a random adapter of a base with the same topology; the output maps start away from zero, so that every
    gradient is there from the first step."""
    generator = torch.Generator().manual_seed(0)

    def factor(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    factors = {
        linear.path: LoraFactors(factor(rank, linear.d_in), 0.01 * factor(linear.d_out, rank))
        for linear in topology.linears
    }
    widths = topology.widths
    maps = {space: random_map(widths[space], widths[space], generator) for space in SPACES}
    slots = build_slots(factors, topology, topology)
    return Projection(slots, start_of(slots, widths, maps, maps, span_basis), residual=True)


def random_base(config: LlamaConfig, device: torch.device) -> PreTrainedModel:
    with device:
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.requires_grad_(False)
    return base.eval()


def random_rows(positions: int, vocabulary: int, device: torch.device) -> Rows:
    """Every position strict: the dearest case."""
    top = torch.rand(positions, TOP_K, device=device)
    return Rows(
        torch.randint(vocabulary, (positions,), device=device),
        torch.randint(vocabulary, (positions, TOP_K), device=device),
        (0.9 * top / top.sum(1, keepdim=True)).log(),
        torch.ones(positions, dtype=torch.bool, device=device),
    )


class Step:
    def __init__(self, student: Student, settings: Settings, vocabulary: int, device: torch.device) -> None:
        self.student, self.settings, self.vocabulary, self.device = student, settings, vocabulary, device
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=0.0)

    @property
    def tokens(self) -> int:
        return self.settings.micro_batches * self.settings.sequences * self.settings.length

    def seconds(self) -> float:
        started = time.perf_counter()
        for _ in range(self.settings.micro_batches):
            size = (self.settings.sequences, self.settings.length)
            ids = torch.randint(self.vocabulary, size, device=self.device)
            hidden = self.student(ids).flatten(0, 1)
            rows = random_rows(len(hidden), self.vocabulary, self.device)
            loss = summed_loss(hidden, rows, self.student.logits, self.vocabulary)
            (loss / self.tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def measure(
    config: LlamaConfig, device: torch.device, gpu: str, length: int, steps: int, given: dict[str, Any]
) -> dict[str, Any]:
    """One point. `given` overrides what the plan recommends."""
    shape, topology = Shape.of(config), discover(config)
    projection = random_projection(topology, min(RANK, config.hidden_size // 4))
    learned = sum(p.numel() for p in projection.parameters())
    settings = replace(recommended(shape, learned, gpu, length), **given)
    base = random_base(config, device)
    if settings.checkpointing:
        base.train()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = Step(Student(base, projection.to(device)), settings, config.vocab_size, device)
    seconds = [step.seconds() for _ in range(WARM_UP + steps)][WARM_UP:]
    counted = fit_memory(
        shape,
        learned=learned,
        dtype="bfloat16",
        zero_stage=1,
        workers=1,
        sequences=settings.sequences,
        length=length,
        checkpointing=settings.checkpointing,
        on_gpu=device.type == "cuda",
    )
    speed = step.tokens / statistics.median(seconds)
    return {
        **vars(settings),
        "learned": learned,
        "seconds": seconds,
        "tokens_per_second": speed,
        "mfu": 4 * shape.parameters * speed / GPUS[gpu].flops if device.type == "cuda" else None,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "counted_gigabytes": counted.total / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--gpu", choices=GPUS, default="H200-141GB")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="JSON; in place of the recommended ones"
    )
    parser.add_argument("--out", type=Path, default=HERE / "fit_step.json")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    point = measure(SHAPES[given.shape], device, given.gpu, given.length, given.steps, given.settings)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result = {
        "device": name,
        "shape": given.shape,
        "versions": {package: version(package) for package in ("torch", "transformers")},
        **point,
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
