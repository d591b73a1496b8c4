"""Training of the methods that are no transfer: the same student, corpus and batches, with another set of parameters or
another loss. One process, on the CPU."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from crosslora.adapter import LoraFactors, read_adapter
from crosslora.config import Config, Fit
from crosslora.models import load_model, resolve
from crosslora.precision import chosen
from crosslora.progress import progress
from crosslora.projection.build import Transfer, build_transfer
from crosslora.projection.projection import Factors
from crosslora.projection.student import Student
from crosslora.run_folder import RunFolder
from crosslora.teacher.corpus import Sample, read_corpus
from crosslora.text.pair import TokenizerPair
from crosslora.training.batches import (
    Batch,
    Example,
    batch_indices,
    build_examples,
    collate,
    held_out_batches,
)
from crosslora.training.loop import GRADIENT_NORM, learning_rate, use_plain_attention
from crosslora.training.losses import losses_of, summed_loss
from crosslora.training.rate import relative_rate
from crosslora.training.rehearsal import rehearsal


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
    """Of the steps, the looks at the held-out samples, and the writing of what is rehearsed; without loading."""
    tokens_per_second: float
    held_out: dict[int, float]
    """Step -> loss on the held-out samples, nats."""

    @property
    def best_step(self) -> int:
        return min(self.held_out, key=lambda step: self.held_out[step])


def distil(
    config: Config,
    corpus: tuple[str, str],
    build: Callable[[Transfer, int], Any],
    cross_entropy: bool,
    most: int | None = None,
) -> Distilled:
    """Fit what `build` makes; with cross_entropy, to the teacher's text alone; with `most`, on no more samples than
    that. The best look at the held-out samples is kept, as a fit keeps it."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pair = TokenizerPair.load(config.source, config.target)
    samples = read_corpus(RunFolder.open(config.run), *corpus)
    train, held_out = (build_examples(part, pair, config.fit.max_tokens) for part in samples)
    train = train[:most]
    if cross_entropy:
        train, held_out = ([_text_alone(example) for example in part] for part in (train, held_out))
    use_plain_attention(example.length for example in [*train, *held_out])
    seed = config.fit.random_seed
    adapter = read_adapter(config.adapters[0].path)
    module = build(build_transfer(adapter, config.source, config.target, pair, seed), seed)
    student = Student(load_model(resolve(config.target), chosen(config.fit.dtype, on_gpu=False)), module)
    started = time.monotonic()
    if config.fit.rehearsal and not cross_entropy:  # on text alone its own text would teach it nothing
        train += rehearsal(student.base, pair, train, config.fit.rehearsal, seed)
    batches = ([train[i] for i in indices] for indices in batch_indices(train, config.fit.batch_size, seed))
    fit = relative_rate(config.fit, config.target)
    rate, looks = train_student(student, batches, held_out, fit)
    minutes = (time.monotonic() - started) / 60
    with torch.no_grad():
        factors = {path: LoraFactors(A.contiguous(), B.contiguous()) for path, (A, B) in module().items()}
    return Distilled(factors, minutes, rate, looks)


def _text_alone(example: Example) -> Example:
    targets = example.targets
    return replace(example, targets=replace(targets, strict=targets.strict & False))


def train_student(
    student: Student, batches: Iterator[list[Example]], held_out: list[Example], fit: Fit
) -> tuple[float, dict[int, float]]:
    """Every step as crosslora.training.loop takes it; returns the tokens per second of the steps alone, and the looks at the
    held-out samples. The best look is kept; without such samples, the last step."""
    module = student.projection
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=fit.learning_rate, weight_decay=0.0)
    looks: dict[int, float] = {}
    best: dict[str, Any] = {}
    tokens, seconds = 0, 0.0
    with progress("distil", fit.steps, "steps") as meter:
        for step, examples in enumerate(islice(batches, fit.steps), 1):
            started = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(fit, step - 1)
            batch = collate(examples)
            loss = _loss(student, batch, summed_loss) / len(batch.rows)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(example.length for example in examples)
            seconds += time.monotonic() - started
            meter.advance(1, f"loss {float(loss.detach()):.3f}")
            if held_out and (step % fit.evaluate_every == 0 or step == fit.steps):
                looks[step] = _held_out_loss(student, held_out)
                if looks[step] == min(looks.values()):
                    best = copy.deepcopy(module.state_dict())
    if best:
        module.load_state_dict(best)
    return tokens / seconds, looks


def _loss(student: Student, batch: Batch, loss: Callable[..., torch.Tensor]) -> torch.Tensor:
    hidden = student(batch.ids).flatten(0, 1)[batch.positions]
    vocabulary = student.base.get_output_embeddings().weight.shape[0]
    return loss(hidden, batch.rows, student.logits, vocabulary)


def _held_out_loss(student: Student, held_out: list[Example]) -> float:
    """Mean over all their rows, nats."""
    return float(_row_losses(student, held_out)[0].mean())


@torch.no_grad()
def _row_losses(student: Student, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every row in nats [N], and which of them are a KL [N]."""
    batches = [collate(batch) for batch, _ in held_out_batches(examples, rank=0, world=1)]
    losses = torch.cat([_loss(student, batch, losses_of) for batch in batches])
    return losses, torch.cat([batch.rows.strict for batch in batches])


class _Given(nn.Module):
    """Factors that are not learned, in the place of a projection."""

    def __init__(self, transfer: Transfer, factors: dict[str, LoraFactors]) -> None:
        super().__init__()
        self.slots = transfer.slots
        self.factors = {path: (given.A, given.B) for path, given in factors.items()}

    def forward(self) -> Factors:
        return self.factors


def teacher_kl(config: Config, factors: dict[str, LoraFactors], samples: list[Sample]) -> float:
    """KL(teacher || target base with these factors), nats per strict position."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pair = TokenizerPair.load(config.source, config.target)
    adapter = read_adapter(config.adapters[0].path)
    transfer = build_transfer(adapter, config.source, config.target, pair, config.fit.random_seed)
    base = load_model(resolve(config.target), chosen(config.fit.dtype, on_gpu=False))
    student: Any = Student(base, _Given(transfer, factors))  # type: ignore[arg-type]
    losses, strict = _row_losses(student, build_examples(samples, pair, config.fit.max_tokens))
    return float(losses[strict].mean())
