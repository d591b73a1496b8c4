"""Prompts like a few that are given: the source base goes on with a list of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from crosslora.config import Synthesis
from crosslora.teacher.engine import Engine, Generation, Sampling
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary

SHOTS = 5
"""Seed examples shown at a time."""
SAME_SHOTS = 16
"""Prompts in a row for which the same ones are shown, in the same order: an engine reads these once."""
INTRODUCTION = "Things that people ask:\n"
MARKS = ("\n", "\n###\n", "\n=====\n")
"""After a seed example, the first that stands in none; what is written after the next one is cut off."""


class SeedPrompts:
    """The source base alone goes on with a list of seed examples.

    Not in the user's place of its chat format, where a small base goes on to talk about what it was shown.
    """

    name = "seeds"

    def __init__(
        self, engine: Engine, words: Vocabulary, chat: ChatFormat, settings: Synthesis, seeds: Sequence[str]
    ) -> None:
        self._engine, self._words, self._chat = engine, words, chat
        self._seeds = seeds
        self._mark = mark_between(seeds)
        stop_ids = chat.stop_ids | words.ids_with(self._mark)
        self._sampling = Sampling(settings.prompt_temperature, settings.max_prompt_tokens, stop_ids, top_k=0)
        self._random_seed = settings.random_seed

    def prompts(self, count: int, shard: int) -> list[str]:
        chooser = random.Random(f"{self._random_seed}/{shard}")
        groups = range(-(-count // SAME_SHOTS))
        lists = [chooser.sample(self._seeds, min(SHOTS, len(self._seeds))) for _ in groups]
        shown = [[*self._chat.bos_ids, *self._words.encode(listed(seeds, self._mark))] for seeds in lists]
        rows = [shown[row // SAME_SHOTS] for row in range(count)]
        written = [self._first(g) for g in self._engine.generate(rows, self._sampling, adapter=False)]
        return [prompt for prompt in written if prompt]

    def _first(self, generation: Generation) -> str:
        """What was written up to the mark, "" where it did not end."""
        text = self._words.text([i for i in generation.ids.tolist() if i not in self._chat.stop_ids]) or ""
        first, ended, _ = text.partition(self._mark)
        return first.strip() if ended or generation.finished else ""


def mark_between(seeds: Sequence[str]) -> str:
    return next((mark for mark in MARKS if not any(mark in seed for seed in seeds)), MARKS[-1])


def listed(seeds: Sequence[str], mark: str) -> str:
    """What the source base goes on with."""
    return INTRODUCTION + "".join(f"- {seed}{mark}" for seed in seeds) + "-"
