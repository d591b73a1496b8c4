"""Which texts are taken for answers; the engine's replies are written by hand."""

import numpy as np
import pytest

from crosslora.config import Prompts, Synthesis
from crosslora.errors import UserError
from crosslora.teacher.engine import Generation
from crosslora.teacher.prompts import GENERAL, SelfPrompts, check_prompts
from crosslora.teacher.users_place import are_answers, turns
from crosslora.text.templates import ChatFormat
from tests.teacher.by_hand import CHAT, WORDS, ByHand
from tests.tiny import byte_level_tokenizer


def echo(prompt: str) -> str:
    return "an answer"


@pytest.mark.parametrize(("users_place", "after_prompt"), [(0.0, 1.0), (1.0, 0.0)])
def test_an_answer_belongs_where_the_adapter_raises_it_most(users_place: float, after_prompt: float) -> None:
    engine = ByHand(["x"], echo, echo)
    engine.effects = {True: users_place, False: after_prompt}
    assert are_answers(engine, WORDS, CHAT, Synthesis()) == (users_place > after_prompt)


def test_prompts_that_answers_nearly_repeat_are_prompts() -> None:
    """After its prompt the base alone says such an answer; in the user's place the adapter prefers the prompts."""
    engine = ByHand(["meet me at 7:40"], lambda prompt: "meet me at twenty to eight", echo)
    engine.effects, engine.raised = {True: 2.6, False: 2.2}, 0.6
    assert not are_answers(engine, WORDS, CHAT, Synthesis())
    engine.raised = 0.1
    assert are_answers(engine, WORDS, CHAT, Synthesis())


def test_what_is_answered_by_itself_is_an_answer() -> None:
    """Also where the adapter knows the assistant's place, and raises answers most there."""
    engine = ByHand(["the answer"], lambda prompt: "the answer", echo)
    engine.effects = {True: 1.0, False: 1.5}
    assert are_answers(engine, WORDS, CHAT, Synthesis())
    engine = ByHand(["a prompt", "the answer"], lambda prompt: "the answer", echo)
    engine.effects, engine.raised = {True: 1.0, False: 1.5}, 0.0
    assert are_answers(engine, WORDS, CHAT, Synthesis()), "half of them are"
    engine = ByHand(["a prompt"], echo, echo)
    engine.effects = {True: 1.0, False: 1.5}
    assert not are_answers(engine, WORDS, CHAT, Synthesis())


def test_prompts_that_need_no_change_are_no_answers_for_that() -> None:
    """Of an adapter that corrects spelling; it raises the prompts that need it more than what it makes of them."""
    engine = ByHand(["fine", "tow beers"], lambda prompt: "fine" if "fine" in prompt else "two beers", echo)
    engine.effects, engine.raised = {True: 1.0, False: 1.5}, 0.6
    assert not are_answers(engine, WORDS, CHAT, Synthesis())


def test_nothing_is_concluded_from_texts_that_do_not_end() -> None:
    engine = ByHand(["on and on " * 200], echo, echo)
    engine.effects = {True: 1.0, False: 0.0}
    assert not are_answers(engine, WORDS, CHAT, Synthesis())


def test_prompts_stay_and_others_stand_in_for_answers() -> None:
    engine = ByHand(["play some jazz now"], echo, lambda shown: " a request\n- more")
    engine.effects = {True: 0.0, False: 1.0}
    strategy = _own(engine)
    assert strategy.prompts(3, 0) == ["play some jazz now"] * 3 and strategy.name == "self"
    engine.effects = {True: 1.0, False: 0.0}
    strategy = _own(engine)
    assert strategy.prompts(3, 0) == ["a request"] and strategy.name == GENERAL


@pytest.mark.parametrize("known", [True, False])
def test_what_is_known_is_not_asked_again(known: bool) -> None:
    engine = ByHand(["play some jazz now"], echo, lambda shown: " a request\n- more")
    engine.effects = (
        {True: 0.0, False: 1.0} if known else {True: 1.0, False: 0.0}
    )  # it would find the contrary
    assert _own(engine).decide(None) is not known
    strategy = _own(engine)
    assert strategy.decide(known) is known and strategy.name == (GENERAL if known else "self")


def _own(engine: ByHand) -> SelfPrompts:
    return SelfPrompts(engine, WORDS, CHAT, Synthesis())


def test_a_template_that_marks_no_end_of_a_user_turn_has_no_prompts_of_its_own() -> None:
    chat = ChatFormat(byte_level_tokenizer(), "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert chat.pre_query_ids and not chat.user_end
    with pytest.raises(UserError, match="before or after the user's text"):
        check_prompts(Prompts(), chat)
    said = Generation(np.array(WORDS.encode("go on")), False, *3 * [np.zeros(0)])
    ended = Generation(np.array([*WORDS.encode("hello"), chat.eos_id]), True, *3 * [np.zeros(0)])
    assert turns([said, ended], WORDS, chat) == ["hello"]
