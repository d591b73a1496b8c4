"""Training of the methods that are no transfer: the same student, corpus and batches, with another set of parameters or
another loss. One process, on the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from crosslora.adapter import LoraFactors, read_adapter
from crosslora.config import Config
from crosslora.models import load_model, resolve
from crosslora.progress import progress
from crosslora.projection.build import Transfer, build_transfer
from crosslora.projection.projection import Factors
from crosslora.projection.student import Student
from crosslora.run_folder import RunFolder
from crosslora.teacher.corpus import read_corpus
from crosslora.text.pair import TokenizerPair
from crosslora.training.batches import Example, batch_indices, build_examples, collate
from crosslora.training.loop import GRADIENT_NORM, learning_rate, use_plain_attention
from crosslora.training.losses import summed_loss


class PlainLora(nn.Module):
    """The target's own LoRA, as PEFT starts it; stands where a projection would."""

    def __init__(self, transfer: Transfer, random_seed: int) -> None:
        super().__init__()
        self.slots = transfer.slots
        generator = torch.Generator().manual_seed(random_seed)
        linears = transfer.target.by_path()
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for slot in self.slots:
            d_in = linears[slot.path].d_in
            bound = d_in**-0.5  # kaiming_uniform_(a=sqrt(5))
            self.A.append(torch.empty(slot.rank, d_in).uniform_(-bound, bound, generator=generator))
            self.B.append(torch.zeros(slot.d_out, slot.rank))

    def forward(self) -> Factors:
        return {slot.path: (A, B) for slot, A, B in zip(self.slots, self.A, self.B, strict=True)}


@dataclass(frozen=True)
class Distilled:
    factors: dict[str, LoraFactors]
    minutes: float
    """Of the steps alone."""
    tokens_per_second: float


def distil(
    config: Config, corpus: tuple[str, str], build: Callable[[Transfer], Any], cross_entropy: bool
) -> Distilled:
    """Fit what `build` makes; with cross_entropy, to the teacher's text alone."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pair = TokenizerPair.load(config.source, config.target)
    train, _ = read_corpus(RunFolder.open(config.run), *corpus)
    examples = build_examples(train, pair, config.fit.max_tokens)
    if cross_entropy:
        examples = [_text_alone(example) for example in examples]
    use_plain_attention(examples)
    transfer = build_transfer(
        read_adapter(config.adapters[0].path), config.source, config.target, pair, config.fit.random_seed
    )
    module = build(transfer)
    student = Student(load_model(resolve(config.target), config.fit.dtype), module)
    started, tokens = time.monotonic(), _train(student, module, examples, config)
    seconds = time.monotonic() - started
    with torch.no_grad():
        factors = {path: LoraFactors(A.contiguous(), B.contiguous()) for path, (A, B) in module().items()}
    return Distilled(factors, seconds / 60, tokens / seconds)


def _text_alone(example: Example) -> Example:
    targets = example.targets
    return replace(example, targets=replace(targets, strict=targets.strict & False))


def _train(student: Student, module: nn.Module, examples: list[Example], config: Config) -> int:
    """Every step as crosslora.training.loop takes it; returns the tokens that went in."""
    fit, tokens = config.fit, 0
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=fit.learning_rate, weight_decay=0.0)
    vocabulary = student.base.get_output_embeddings().weight.shape[0]
    with progress("distil", fit.steps, "steps") as meter:
        for step, indices in enumerate(
            islice(batch_indices(examples, fit.batch_size, fit.random_seed), fit.steps)
        ):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(fit, step)
            batch = collate([examples[i] for i in indices])
            hidden = student(batch.ids).flatten(0, 1)[batch.positions]
            loss = summed_loss(hidden, batch.rows, student.logits, vocabulary) / len(batch.rows)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(examples[i].length for i in indices)
            meter.advance(1, f"loss {float(loss.detach()):.3f}")
    return tokens
