"""What the source base is shown, what of its writing is taken for a prompt, and which of these are used."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from crosslora.config import Synthesis
from crosslora.teacher.prompts import GENERAL, SelfPrompts
from crosslora.teacher.seeds import EXAMPLES, FEW, MARKS, OF_FEW, SAME_SHOTS, SHOTS, WRITTEN, SeedPrompts
from tests.teacher.by_hand import CHAT, WORDS, ByHand

ENDLESS = "on and on " * 200


class Writer(ByHand):
    """Keeps the lists that it was shown."""

    def __init__(
        self, write: Callable[[str], str], reply: Callable[[str], str] = "a reply to {}".format
    ) -> None:
        super().__init__([], reply, self._write)
        self._written = write
        self.shown: list[str] = []

    def _write(self, text: str) -> str:
        self.shown.append(text)
        return self._written(text)


def _prompts(writer: Writer, seeds: list[str], wanted: int = 4, shard: int = 0) -> list[str]:
    return SeedPrompts(writer, WORDS, CHAT, Synthesis(), seeds).prompts(wanted, shard)


def _numbered(text: str) -> Callable[[str], str]:
    numbers = count()
    return lambda shown: f" {text} {next(numbers)}\n- and"


def _entries(shown: str) -> list[str]:
    return [line.removeprefix("- ") for line in shown.split("\n")[1:-1]]


def test_the_next_entry_of_the_list_is_a_prompt() -> None:
    writer = Writer(_numbered("light lamp"))
    prompts = _prompts(writer, ["play some jazz"])
    assert len(set(prompts)) == 4 and all(prompt.startswith("light lamp ") for prompt in prompts)
    assert len(writer.shown) == 4 * WRITTEN
    assert all(
        text.startswith("Things that people ask:\n- ") and text.endswith("\n-") for text in writer.shown
    )


@pytest.mark.parametrize(("seeds", "own"), [(0, 0), (1, 1), (5, OF_FEW), (FEW - 1, OF_FEW), (FEW, SHOTS)])
def test_few_seeds_are_shown_among_general_examples(seeds: int, own: int) -> None:
    writer = Writer(_numbered("go"))
    _prompts(writer, [f"seed number {n}" for n in range(seeds)])
    entries = _entries(writer.shown[0])
    assert len(set(entries)) == SHOTS
    assert sum(entry.startswith("seed number ") for entry in entries) == own
    assert len(set(entries) & set(EXAMPLES)) == SHOTS - own


def test_the_lists_differ() -> None:
    writer, seeds = Writer(_numbered("go")), [f"seed number {n}" for n in range(40)]
    _prompts(writer, seeds, 2 * SAME_SHOTS)
    first = writer.shown
    assert len(first) == 2 * SAME_SHOTS * WRITTEN
    assert len(set(first[:SAME_SHOTS])) == 1 and len(set(first)) == 2 * WRITTEN
    writer.shown = []
    _prompts(writer, seeds, 2 * SAME_SHOTS, shard=1)
    assert not set(first) & set(writer.shown), "another shard shows others"


def test_what_does_not_end_is_no_prompt() -> None:
    assert _prompts(Writer(lambda text: " go on"), ["stop"]) == ["go on"], "the base ended by itself"
    assert _prompts(Writer(lambda text: ENDLESS), ["stop"]) == []
    assert _prompts(Writer(lambda text: " \n"), ["stop"]) == []


@pytest.mark.parametrize("mark", MARKS)
def test_seeds_of_several_lines_stay_whole(mark: str) -> None:
    """Also where they hold what would stand between others."""
    seed = "Read this." + "".join(MARKS[: MARKS.index(mark)])
    writer = Writer(lambda text: f" {seed}again{mark}- Read")
    assert _prompts(writer, [seed]) == [f"{seed}again"]
    assert f"- {seed}{mark}" in writer.shown[0]


def test_rare_replies_are_wanted_as_much_as_common_ones() -> None:
    number = count()

    def write(text: str) -> str:
        n = next(number)
        return f" {'a poem' if n % 4 == 0 else 'a song'} number {n}\n"

    def reply(prompt: str) -> str:
        return '{"do": "write", "what": "poem"}' if "poem" in prompt else '{"do": "sing", "what": "song"}'

    prompts = _prompts(Writer(write, reply), [], 20)
    assert len(prompts) == 20
    assert sum("poem" in prompt for prompt in prompts) >= 8, "of 10 among the 40 that are written"


def test_what_the_teacher_does_not_answer_is_left_out() -> None:
    def reply(prompt: str) -> str:
        return "yes" if "request 3" in prompt else ENDLESS

    assert _prompts(Writer(_numbered("request"), reply), []) == ["request 3"]
    assert _prompts(Writer(_numbered("request"), lambda prompt: ENDLESS), []) == []
    assert _prompts(Writer(_numbered("request"), lambda prompt: " "), []) == []


def test_the_same_prompt_is_used_once() -> None:
    assert _prompts(Writer(lambda text: " sing\n"), []) == ["sing"]


@pytest.mark.real
def test_a_small_base_goes_on_with_the_list(demo_source: Any) -> None:
    """Most of what it writes is as short as what it was shown."""
    engine, words, chat, settings = demo_source
    seeds = ["play some jazz", "find me a cheap flight to Oslo", "how warm is it in Rome?", "wake me at six"]
    prompts = SeedPrompts(engine, words, chat, settings, seeds).prompts(4, 0)
    assert 3 <= len(set(prompts)) == len(prompts) <= 4
    assert all("\n" not in prompt and not prompt.startswith("-") for prompt in prompts)
    assert sorted(map(len, prompts))[1] < 100


@pytest.mark.real
def test_a_small_base_writes_what_its_teacher_answers(demo_source: Any) -> None:
    strategy = SelfPrompts(*demo_source)
    assert strategy.decide(True) and strategy.name == GENERAL
    prompts = strategy.prompts(4, 0)
    assert 3 <= len(set(prompts)) == len(prompts) <= 4
    assert all("\n" not in prompt and not prompt.startswith("-") for prompt in prompts)
