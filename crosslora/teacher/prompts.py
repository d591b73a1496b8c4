"""Where prompts come from: small classes with one method, mixed by weight."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from crosslora.config import Prompts, Synthesis
from crosslora.errors import UserError
from crosslora.teacher.corpus import FILE
from crosslora.teacher.engine import Engine
from crosslora.teacher.seeds import SeedPrompts
from crosslora.teacher.users_place import are_answers, written
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary

SELF = "self"
GENERAL = "general"
"""Marks of samples whose prompts the teacher wrote, and of those that stand in for these where it writes answers."""


class Strategy(Protocol):
    @property
    def name(self) -> str:
        """What its samples are marked with."""

    def prompts(self, count: int, shard: int) -> list[str]:
        """At most `count` prompts; fewer where the teacher wrote something that is no prompt."""


class SelfPrompts:
    """The teacher continues what its template writes before a user turn, and so writes the user's prompt itself.

    Xu et al., "Magpie: Alignment Data Synthesis from Scratch" (2024), here with the adapter on. Where it writes answers in
    that place, prompts of no domain instead.
    """

    def __init__(self, engine: Engine, words: Vocabulary, chat: ChatFormat, settings: Synthesis) -> None:
        self._engine, self._words, self._chat, self._settings = engine, words, chat, settings
        self._general = SeedPrompts(engine, words, chat, settings, [])
        self._known: bool | None = None

    def decide(self, known: bool | None) -> bool:
        """Whether it writes answers there: as is known from other engines or shards, else as this engine finds it."""
        if known is not None:
            self._known = known
        elif self._known is None:
            self._known = are_answers(self._engine, self._words, self._chat, self._settings)
        return self._known

    @property
    def name(self) -> str:
        return GENERAL if self.decide(None) else SELF

    def prompts(self, count: int, shard: int) -> list[str]:
        if self.decide(None):
            return self._general.prompts(count, shard)
        temperature, most = self._settings.prompt_temperature, self._settings.max_prompt_tokens
        return written(self._engine, self._words, self._chat, count, temperature, most)


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
    if wanted.self > 0:
        chosen.append((wanted.self, SelfPrompts(engine, words, chat, settings)))
    if wanted.seeds > 0 and wanted.seeds_file:
        seeds = read_prompts(wanted.seeds_file, "seeds_file")
        chosen.append((wanted.seeds, SeedPrompts(engine, words, chat, settings, seeds)))
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
