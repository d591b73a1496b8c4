"""Which of the prompts that the source base writes are used; the engine's texts are written by hand."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from crosslora.config import Synthesis
from crosslora.teacher.general import EXAMPLES, WRITTEN, GeneralPrompts
from crosslora.teacher.prompts import GENERAL, SelfPrompts
from tests.teacher.by_hand import CHAT, WORDS, ByHand

ENDLESS = "on and on " * 200


def _general(reply: Callable[[str], str], write: Callable[[str], str]) -> list[str]:
    return GeneralPrompts(ByHand([], reply, write), WORDS, CHAT, Synthesis()).prompts(4, 0)


def test_the_source_base_goes_on_with_lists_of_the_examples() -> None:
    shown: list[str] = []

    def write(text: str) -> str:
        shown.append(text)
        return f" number {len(shown)}\n- and"

    prompts = _general(lambda prompt: f"a reply to {prompt}", write)
    assert len(set(prompts)) == 4 and all(prompt.startswith("number ") for prompt in prompts)
    assert len(shown) == 4 * WRITTEN
    entries = [line.removeprefix("- ") for line in shown[0].split("\n")[1:-1]]
    assert len(entries) > 1 and set(entries) <= set(EXAMPLES)


def test_rare_replies_are_wanted_as_much_as_common_ones() -> None:
    number = count()

    def write(text: str) -> str:
        n = next(number)
        return f" {'a poem' if n % 4 == 0 else 'a song'} number {n}\n"

    def reply(prompt: str) -> str:
        return '{"do": "write", "what": "poem"}' if "poem" in prompt else '{"do": "sing", "what": "song"}'

    prompts = GeneralPrompts(ByHand([], reply, write), WORDS, CHAT, Synthesis()).prompts(20, 0)
    assert len(prompts) == 20
    assert sum("poem" in prompt for prompt in prompts) >= 8, "of 10 among the 40 that are written"


def test_what_the_teacher_does_not_answer_is_left_out() -> None:
    number = count()

    def write(text: str) -> str:
        return f" request {next(number)}\n"

    assert _general(lambda prompt: "yes" if "request 3" in prompt else ENDLESS, write) == ["request 3"]
    assert _general(lambda prompt: ENDLESS, write) == []
    assert _general(lambda prompt: " ", write) == []


def test_the_same_prompt_is_used_once() -> None:
    assert _general(lambda prompt: "yes", lambda text: " sing\n") == ["sing"]
    assert _general(lambda prompt: "yes", lambda text: ENDLESS) == []


@pytest.mark.real
def test_a_small_base_writes_what_its_teacher_answers(demo_source: Any) -> None:
    strategy = SelfPrompts(*demo_source)
    assert strategy.decide(True) and strategy.name == GENERAL
    prompts = strategy.prompts(4, 0)
    assert 3 <= len(set(prompts)) == len(prompts) <= 4
    assert all("\n" not in prompt and not prompt.startswith("-") for prompt in prompts)
