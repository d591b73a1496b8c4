"""What the source base is shown of seed examples, and what of its writing is taken for a prompt."""

from typing import Any

import numpy as np
import pytest

from crosslora.config import Synthesis
from crosslora.teacher.engine import Generation, Sampling
from crosslora.teacher.seeds import MARKS, SAME_SHOTS, SHOTS, SeedPrompts
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary
from tests.tiny import byte_level_tokenizer

CHAT = ChatFormat(byte_level_tokenizer())
WORDS = Vocabulary(CHAT.tokenizer)


class Writer:
    """An engine that writes the same to every list of seed examples, and keeps what it was shown."""

    def __init__(self, text: str, finished: bool = False) -> None:
        ids = np.array(WORDS.encode(text), dtype=np.int32)
        self.written = Generation(ids, finished, ids[:, None], ids[:, None], ids)
        self.shown: list[str | None] = []
        self.stop_ids: frozenset[int] = frozenset()

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, *, adapter: bool, **_: object
    ) -> list[Generation]:
        assert not adapter, "the source base alone goes on; the teacher might answer"
        self.shown = [WORDS.text(ids[len(CHAT.bos_ids) :]) for ids in prompts]
        self.stop_ids = sampling.stop_ids
        return [self.written] * len(prompts)


def _seeded(writer: Writer, seeds: list[str]) -> SeedPrompts:
    return SeedPrompts(writer, WORDS, CHAT, Synthesis(), seeds)  # type: ignore[arg-type]


def test_seeds_are_shown_as_a_list_and_the_next_entry_is_a_prompt() -> None:
    writer = Writer(" light the lamp\n- and")
    assert _seeded(writer, ["play some jazz"]).prompts(2, 0) == ["light the lamp"] * 2
    assert writer.shown == ["Things that people ask:\n- play some jazz\n-"] * 2
    assert set(WORDS.encode("\n")) <= writer.stop_ids


def test_every_list_shows_few_of_many_seeds_and_not_always_the_same() -> None:
    writer = Writer(" go\n")
    seeds = [f"seed number {n}" for n in range(40)]
    strategy = _seeded(writer, seeds)
    assert len(strategy.prompts(3 * SAME_SHOTS + 1, 0)) == 3 * SAME_SHOTS + 1
    first = writer.shown
    assert len(set(first[:SAME_SHOTS])) == 1 and len(set(first)) == 4
    assert all(text and text.count("- seed number") == SHOTS for text in first)
    strategy.prompts(3 * SAME_SHOTS + 1, 1)
    assert not set(first) & set(writer.shown), "another shard shows others"


@pytest.mark.parametrize(("finished", "prompts"), [(True, ["go on"]), (False, [])])
def test_what_does_not_end_is_no_prompt(finished: bool, prompts: list[str]) -> None:
    assert _seeded(Writer(" go on", finished), ["stop"]).prompts(1, 0) == prompts
    assert _seeded(Writer(" \n"), ["stop"]).prompts(1, 0) == []


@pytest.mark.parametrize("mark", MARKS)
def test_seeds_of_several_lines_stay_whole(mark: str) -> None:
    """Also where they hold what would stand between others."""
    seed = "Read this." + "".join(MARKS[: MARKS.index(mark)])
    writer = Writer(f" {seed}again{mark}- Read")
    assert _seeded(writer, [seed]).prompts(1, 0) == [f"{seed}again"]


@pytest.mark.real
def test_a_small_base_goes_on_with_the_list(demo_source: Any) -> None:
    """Most of what it writes ends, is one line, and is as short as what it was shown."""
    engine, words, chat, settings = demo_source
    seeds = ["play some jazz", "find me a cheap flight to Oslo", "how warm is it in Rome?", "wake me at six"]
    prompts = SeedPrompts(engine, words, chat, settings, seeds).prompts(4, 0)
    assert len(set(prompts)) >= 3
    assert all("\n" not in prompt and not prompt.startswith("-") for prompt in prompts)
    assert sorted(map(len, prompts))[1] < 100
