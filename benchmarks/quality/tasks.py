"""The tasks: rows to train source adapters and oracles on, rows to test on, and how answers are scored."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality import made
from benchmarks.train_adapter import read_rows, rows_of

DATA = Path(__file__).parent / "data"
SNIPS_TEST = Path("examples/snips/test.jsonl")
Row = dict[str, str]
"""prompt, completion"""


@dataclass(frozen=True)
class BenchmarkTask:
    """One kind of adapter."""

    rows: Callable[[], tuple[list[Row], list[Row]]]
    """() -> (training rows, test rows)"""
    metrics: tuple[str, ...]
    """The first is the headline, fixed before any student was scored; "nats" is teacher-forced likelihood, negated."""
    max_tokens: int = 96
    """Of an answer."""
    completions_only: bool = False
    """How the source adapter was trained: no loss on the user's turn."""
    source_steps: int = 600
    """Of the source adapter, 4 samples each."""
    steps: int = 600
    """Of student and oracle."""
    batch: int = 4
    """Samples per step of the student; an oracle always has 4."""
    synthesis: dict[str, object] = field(default_factory=dict)
    """What differs from SYNTHESIS in cells.py."""


def snips() -> tuple[list[Row], list[Row]]:
    return packed("snips_train"), read_rows(SNIPS_TEST)


def gsm8k() -> tuple[list[Row], list[Row]]:
    return packed("gsm8k_train"), packed("gsm8k_test")[:100]


def spoken() -> tuple[list[Row], list[Row]]:
    rows = made.distinct(made.spoken, 1800, random.Random(1))
    return rows[:1500], rows[1500:]


def facts() -> tuple[list[Row], list[Row]]:
    """Facts cannot be guessed: the test asks for those of the training rows in words that were not used for them."""
    rows = made.facts(random.Random(2))
    test = rows[:: made.PHRASINGS]
    train = [row for row in rows if row not in test]
    random.Random(3).shuffle(train)
    return train, test


def packed(name: str) -> list[Row]:
    return rows_of(gzip.decompress((DATA / f"{name}.jsonl.gz").read_bytes()).decode())


SLOTS = ("json_slots", "json_field:intent", "exact_match", "nats")
TASKS = {
    "snips": BenchmarkTask(snips, SLOTS, source_steps=1875),
    # as many samples and steps as a transfer has by default: prompts of no domain teach less each
    "snips-completions": BenchmarkTask(
        snips, SLOTS, completions_only=True, source_steps=1875, batch=8, synthesis={"samples": 2400}
    ),
    "spoken": BenchmarkTask(spoken, ("rouge_l", "exact_match", "nats"), source_steps=1125),
    "facts": BenchmarkTask(facts, ("exact_match", "rouge_l", "nats"), max_tokens=32),
    "gsm8k": BenchmarkTask(
        gsm8k,
        ("nats",),
        steps=200,
        synthesis={"samples": 900, "max_prompt_tokens": 192, "max_response_tokens": 256},
    ),
}
