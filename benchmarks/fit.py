"""How fast a fit step is beside a plain PEFT LoRA step on the same batches; writes benchmarks/fit.json.

    python benchmarks/fit.py runs/demo --steps 20

RUN is a finished run folder. All models see the same micro-batches of its corpus, in turn, in one process on the
CPU. Ours: projection, chunked KL loss, AdamW. Plain: get_peft_model (the same rank and linears), cross-entropy with
the logits at the same scored positions only, AdamW; once as PEFT has it, with a LoRA in float32, and once with one in
the base's dtype, in which ours is computed too, though its numbers and Adam's are float32. Medians over the steps. The
figure of the run's own fit stage, with DeepSpeed and Ray Train around the step, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

import crosslora
from crosslora.adapter import read_adapter
from crosslora.adapter_config import read_settings
from crosslora.config import Config
from crosslora.evaluation.results import installed
from crosslora.models import load_model, resolve
from crosslora.precision import decided
from crosslora.projection.build import build_transfer
from crosslora.projection.student import Student
from crosslora.run_folder import RunFolder, config_of_run
from crosslora.teacher.corpus import read_corpus
from crosslora.text.pair import TokenizerPair
from crosslora.training.batches import Batch, Example, batch_indices, build_examples, collate, micro_batches
from crosslora.training.loop import GRADIENT_NORM, use_plain_attention
from crosslora.training.losses import summed_loss

HERE = Path(__file__).resolve().parent
WARM_UP = 2
PLAIN = {"peft": True, "peft_in_base_dtype": False}
"""Contestant -> whether its LoRA is computed in float32."""
Loss = Callable[[Batch], torch.Tensor]
"""Summed loss of a micro-batch."""


class Contestant:
    """A loss and the AdamW that lowers it."""

    def __init__(self, model: torch.nn.Module, loss: Loss, learning_rate: float) -> None:
        self.loss = loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)

    def seconds(self, examples: list[Example], parts: int) -> float:
        """One optimizer step, its collation included."""
        started = time.perf_counter()
        rows = sum(len(example.targets.student_ids) for example in examples)
        for part in micro_batches(examples, parts):
            (self.loss(collate(part)) / rows).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def our_student(config: Config, pair: TokenizerPair) -> tuple[Student, Loss]:
    adapter = read_adapter(config.adapters[0].path)
    transfer = build_transfer(adapter, config.source, config.target, pair, config.fit.random_seed)
    base = load_model(resolve(config.target), config.fit.dtype)
    student = Student(base, transfer.projection(residual=config.fit.residual))
    vocabulary = base.get_output_embeddings().weight.shape[0]

    def loss(batch: Batch) -> torch.Tensor:
        hidden = student(batch.ids).flatten(0, 1)[batch.positions]
        return summed_loss(hidden, batch.rows, student.logits, vocabulary)

    return student, loss


def plain_peft(config: Config, student: Student, in_float32: bool) -> tuple[torch.nn.Module, Loss]:
    """LoRA on the linears that the student adapts; `student.logits` is the frozen head, the same for all."""
    linears = [slot.path for slot in student.projection.slots]
    rank = read_settings(config.adapters[0].path).r
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=linears, task_type="CAUSAL_LM")
    base: Any = load_model(resolve(config.target), config.fit.dtype)
    model = get_peft_model(base, settings, autocast_adapter_dtype=in_float32).train()

    def loss(batch: Batch) -> torch.Tensor:
        output = model.get_base_model().base_model(input_ids=batch.ids, use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.positions]
        return cross_entropy(student.logits(hidden).float(), batch.rows.student_ids, reduction="sum")

    return model, loss


def measure(
    config: Config, examples: list[Example], pair: TokenizerPair, steps: int
) -> list[dict[str, float]]:
    """Tokens/s of each for every step after the warm-up; who goes first changes from step to step."""
    use_plain_attention(example.length for example in examples)
    student, our_loss = our_student(config, pair)
    models: dict[str, tuple[torch.nn.Module, Loss]] = {"crosslora": (student, our_loss)}
    models |= {name: plain_peft(config, student, in_float32) for name, in_float32 in PLAIN.items()}
    contestants = {name: Contestant(*model, config.fit.learning_rate) for name, model in models.items()}
    batches = batch_indices(examples, config.fit.batch_size, config.fit.random_seed)
    figures = []
    for step, indices in enumerate(islice(batches, WARM_UP + steps)):
        batch = [examples[i] for i in indices]
        tokens = sum(example.length for example in batch)
        names = list(contestants) if step % 2 else list(reversed(contestants))
        seconds = {name: contestants[name].seconds(batch, config.fit.micro_batches) for name in names}
        speed = {name: tokens / seconds[name] for name in contestants}
        if step >= WARM_UP:
            figures.append({"tokens": tokens, **speed})
            print("  ".join(f"{name} {rate:8.1f}" for name, rate in speed.items()), "tokens/s", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="a finished run folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "fit.json")
    given = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    torch.set_num_threads(cpus)
    folder = RunFolder.open(given.run)
    config = decided(config_of_run(given.run))
    name = config.adapters[0].name
    pair = TokenizerPair.load(config.source, config.target)
    train, _ = read_corpus(folder, f"synthesize/{name}", f"filter/{name}")
    figures = measure(config, build_examples(train, pair, config.fit.max_tokens), pair, given.steps)
    result: dict[str, Any] = {
        "crosslora": crosslora.__version__,
        "versions": installed(),
        "cpus": cpus,
        "dtype": config.fit.dtype,
        "batch": {"samples": config.fit.batch_size, "micro_batches": config.fit.micro_batches},
        "tokens_per_second": {n: statistics.median(f[n] for f in figures) for n in ("crosslora", *PLAIN)},
        "ratios": {n: statistics.median(f["crosslora"] / f[n] for f in figures) for n in PLAIN},
        "fit_stage_tokens_per_second": folder.read_json(f"fit/{name}/manifest.json")["tokens_per_second"],
        "figures": figures,
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    print("\n" + "\n".join(f"{key:30s} {value}" for key, value in result.items() if key != "figures"))


if __name__ == "__main__":
    main()
