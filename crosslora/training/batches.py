"""From corpus samples to padded tensors: the student's ids and what each scored position is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from crosslora.teacher.corpus import Sample
from crosslora.text.alignment import Targets, build_targets
from crosslora.text.pair import TokenizerPair
from crosslora.training.losses import Rows

HELD_OUT_BATCH = 16
WINDOW = 8
"""Batches among which examples are sorted by length."""


@dataclass(frozen=True)
class Example:
    """One sample as the student sees it."""

    prompt_ids: list[int]
    targets: Targets

    @property
    def length(self) -> int:
        """Tokens that go in: the prompt and the response without its end (nothing follows the end)."""
        return len(self.prompt_ids) + len(self.targets.student_ids) - 1


@dataclass
class Batch:
    """Padded input and the rows that are scored, in the order in which the flat positions are taken."""

    ids: torch.Tensor  # int64 [B, T]
    positions: torch.Tensor  # int64 [N], into the flattened [B * T]
    rows: Rows

    def to(self, device: torch.device) -> Batch:
        rows = Rows(*(tensor.to(device) for tensor in vars(self.rows).values()))
        return Batch(self.ids.to(device), self.positions.to(device), rows)


def build_examples(samples: Sequence[Sample], pair: TokenizerPair, max_tokens: int) -> list[Example]:
    """Align every sample; left out are those longer than `max_tokens` and those the student cannot spell."""
    examples = []
    for sample in samples:
        try:
            example = Example(pair.student.prompt_ids(sample.prompt), _targets(sample, pair))
        except ValueError:  # a byte that the student's vocabulary has no token for
            continue
        if example.length <= max_tokens:
            examples.append(example)
    return examples


def _targets(sample: Sample, pair: TokenizerPair) -> Targets:
    return build_targets(
        sample.response_ids,
        sample.top_ids,
        sample.top_logprobs,
        teacher=pair.teacher_words,
        student=pair.student_words,
        table=pair.table,
        teacher_stop_ids=pair.teacher.stop_ids,
        student_eos=pair.student.eos_id,
    )


def collate(examples: Sequence[Example]) -> Batch:
    """Pad on the right. The row for response token j is scored at the position before it."""
    width = max(example.length for example in examples)
    ids = np.zeros((len(examples), width), dtype=np.int64)
    positions = []
    for row, example in enumerate(examples):
        sequence = [*example.prompt_ids, *example.targets.student_ids[:-1]]
        ids[row, : len(sequence)] = sequence
        first = row * width + len(example.prompt_ids) - 1
        positions.append(np.arange(first, first + len(example.targets.student_ids)))

    def joined(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(example.targets, name) for example in examples]))

    rows = Rows(
        joined("student_ids").long(), joined("top_ids").long(), joined("top_logprobs"), joined("strict")
    )
    return Batch(torch.from_numpy(ids), torch.from_numpy(np.concatenate(positions)), rows)


def batch_indices(examples: Sequence[Example], batch_size: int, random_seed: int) -> Iterator[list[int]]:
    """Endless batches of examples of like length, so that little is spent on padding.

    Every epoch has a new order that depends on the random seed and the epoch alone. It is sorted by length within
    every WINDOW batches; their order is then random again.
    """
    lengths = np.array([example.length for example in examples])
    left = np.empty(0, dtype=np.int64)
    for epoch in count():
        generator = np.random.default_rng([random_seed, epoch])
        order = np.concatenate([left, generator.permutation(len(lengths))])
        while batches := min(len(order) // batch_size, WINDOW):
            window, order = np.split(order, [batches * batch_size])
            alike = window[np.argsort(lengths[window], kind="stable")].reshape(batches, batch_size)
            yield from generator.permutation(alike).tolist()
        left = order


def micro_batches(examples: Sequence[Example], parts: int) -> list[list[Example]]:
    """Cut a batch into parts of examples of like length, so that little is spent on padding."""
    ordered = sorted(examples, key=lambda example: example.length)
    return [list(part) for part in np.array_split(np.array(ordered, dtype=object), parts) if len(part)]


def held_out_batches(
    examples: Sequence[Example], rank: int, world: int
) -> Iterator[tuple[list[Example], bool]]:
    """This rank's share of the batches, and whether each counts: the last is there again where other ranks have one more,
    because with ZeRO-3 all must take part in every forward pass."""
    ordered = sorted(examples, key=lambda example: example.length)
    batches = [ordered[start : start + HELD_OUT_BATCH] for start in range(0, len(ordered), HELD_OUT_BATCH)]
    for index in range(rank, rank + len(batches), world):
        counts = index < len(batches)
        yield batches[index if counts else -1], counts
