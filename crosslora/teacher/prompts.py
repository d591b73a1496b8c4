"""Where prompts come from: small classes with one method, mixed by weight."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from crosslora.config import Prompts, Synthesis
from crosslora.errors import UserError
from crosslora.teacher.corpus import FILE
from crosslora.teacher.engine import Engine, Sampling
from crosslora.teacher.turned import TurnedAnswers, turns
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary

SHOTS = 5
"""Seed examples shown at a time."""
TURNED = "turned"
"""Mark of samples whose prompts were written for answers that the teacher gave away."""
SEPARATORS = ("\n\n", "\n\n###\n\n", "\n\n=====\n\n")
"""Between two seed examples, the first that stands in none; what is written after the next one is cut off."""


class Strategy(Protocol):
    @property
    def name(self) -> str:
        """What its samples are marked with."""

    def prompts(self, count: int, shard: int) -> list[str]:
        """At most `count` prompts; fewer where the teacher wrote something that is no prompt."""


class SelfPrompts:
    """The teacher continues what its template writes before a user turn, and so writes the user's prompt itself.

    Xu et al., "Magpie: Alignment Data Synthesis from Scratch" (2024), here with the adapter on.
    """

    name = "self"

    def __init__(self, engine: Engine, words: Vocabulary, chat: ChatFormat, settings: Synthesis) -> None:
        self._engine, self._words, self._chat = engine, words, chat
        self._sampling = _prompt_sampling(chat, settings)

    def prompts(self, count: int, shard: int) -> list[str]:
        generations = self._engine.generate([self._chat.pre_query_ids] * count, self._sampling, adapter=True)
        return turns(generations, self._words, self._chat)


class SeedPrompts:
    """The source base alone goes on after a few seed examples, each shown as a user turn."""

    name = "seeds"

    def __init__(
        self, engine: Engine, words: Vocabulary, chat: ChatFormat, settings: Synthesis, seeds: list[str]
    ) -> None:
        self._engine, self._words, self._chat = engine, words, chat
        self._seeds = seeds
        self._sampling = _prompt_sampling(chat, settings)
        self._random_seed = settings.random_seed
        free = [mark for mark in SEPARATORS if not any(mark in seed for seed in seeds)]
        self._separator = free[0] if free else SEPARATORS[-1]

    def prompts(self, count: int, shard: int) -> list[str]:
        chooser = random.Random(f"{self._random_seed}/{shard}")
        shown = [self._demonstrations(chooser) for _ in range(count)]
        generations = self._engine.generate(shown, self._sampling, adapter=False)
        texts = [
            self._words.text([i for i in g.ids.tolist() if i not in self._chat.user_stop_ids])
            for g in generations
        ]
        ended = [
            text
            for text, g in zip(texts, generations, strict=True)
            if text and (g.finished or self._separator in text)
        ]
        return [first for text in ended if (first := text.lstrip().split(self._separator)[0].strip())]

    def _demonstrations(self, chooser: random.Random) -> list[int]:
        chosen = chooser.sample(self._seeds, min(SHOTS, len(self._seeds)))
        return [
            *self._chat.pre_query_ids,
            *self._words.encode("".join(seed + self._separator for seed in chosen)),
        ]


class UnlessAnswers:
    """What a strategy writes; where the teacher gives its answers away, requests for these in its place."""

    def __init__(self, strategy: Strategy, turned: TurnedAnswers) -> None:
        self._strategy, self._turned = strategy, turned

    def decide(self, known: bool | None) -> bool:
        """Whether it gives them away: as is known from other engines or shards, else as this engine finds it."""
        if known is not None:
            self._turned.are_answers = known
        return self._turned.are_answers

    @property
    def name(self) -> str:
        return TURNED if self._turned.are_answers else self._strategy.name

    def prompts(self, count: int, shard: int) -> list[str]:
        if self._turned.are_answers:
            return self._turned.prompts(count)
        return self._strategy.prompts(count, shard)


class FilePrompts:
    """The user's unlabelled prompts as they are, in order, from the start again where there are too few."""

    name = FILE

    def __init__(self, prompts: list[str], per_shard: int) -> None:
        """per_shard: how many a whole shard takes; the last shard may be smaller."""
        self._prompts, self._per_shard = prompts, per_shard

    def prompts(self, count: int, shard: int) -> list[str]:
        first = shard * self._per_shard
        return [self._prompts[(first + i) % len(self._prompts)] for i in range(count)]


def read_prompts(path: Path, field: str) -> list[str]:
    """The `prompt` of every JSON line; raises UserError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {path} cannot be read ({error}); give a JSON-lines file") from error
    prompts = [_prompt(line, f"{field}: {path} line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise UserError(f"{field}: {path} holds no prompts; write one JSON object with a `prompt` per line")
    return prompts


def _prompt(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
        prompt.encode()  # half of a surrogate pair is no text
    except (ValueError, KeyError, TypeError, AttributeError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{place}: not an object such as {{"prompt": "..."}}; mend the line')
    return prompt


def check_prompts(wanted: Prompts, chat: ChatFormat) -> None:
    """Raise UserError where the source's chat template leaves no place in which the teacher could write prompts."""
    if wanted.self > 0 and not (chat.pre_query_ids and chat.user_end):
        raise UserError(
            "synthesis.prompts.self: the chat template writes nothing before or after the user's text, so the teacher "
            "cannot tell where one begins and ends; give prompts_file or seeds_file and its weight, and set self to 0"
        )


def build_strategies(
    engine: Engine, words: Vocabulary, chat: ChatFormat, settings: Synthesis
) -> list[tuple[float, Strategy]]:
    """(share, strategy) of those with a weight above 0; the shares add up to 1."""
    wanted: Prompts = settings.prompts
    total = wanted.self + wanted.seeds + wanted.file
    chosen: list[tuple[float, Strategy]] = []
    seeds = read_prompts(wanted.seeds_file, "seeds_file") if wanted.seeds > 0 and wanted.seeds_file else []
    turned = TurnedAnswers(engine, words, chat, settings, seeds)
    if wanted.self > 0:
        own = SelfPrompts(engine, words, chat, settings)
        chosen.append((wanted.self, UnlessAnswers(own, turned)))
    if seeds:
        continued = SeedPrompts(engine, words, chat, settings, seeds)
        chosen.append((wanted.seeds, UnlessAnswers(continued, turned)))
    if wanted.file > 0 and wanted.prompts_file:
        prompts = read_prompts(wanted.prompts_file, "prompts_file")
        per_shard = counts(
            settings.shard_size, [wanted.self / total, wanted.seeds / total, wanted.file / total]
        )[-1]
        chosen.append((wanted.file, FilePrompts(prompts, per_shard)))
    return [(weight / total, strategy) for weight, strategy in chosen]


def counts(total: int, shares: list[float]) -> list[int]:
    """Whole numbers that add up to `total`, as near to the shares as can be."""
    edges = [round(total * sum(shares[:i])) for i in range(len(shares))] + [total]
    return [after - before for before, after in pairwise(edges)]


def _prompt_sampling(chat: ChatFormat, settings: Synthesis) -> Sampling:
    return Sampling(settings.prompt_temperature, settings.max_prompt_tokens, chat.user_stop_ids, top_k=0)
