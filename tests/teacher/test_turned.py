"""Which texts are taken for answers, and how requests come from them; the engine's replies are written by hand."""

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
import pytest

from crosslora.config import Prompts, Synthesis
from crosslora.errors import UserError
from crosslora.teacher.engine import Generation, Sampling
from crosslora.teacher.prompts import TURNED, SelfPrompts, check_prompts
from crosslora.teacher.turned import END, ROUNDS, TurnedAnswers, turns
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary
from tests.tiny import byte_level_tokenizer

CHAT = ChatFormat(byte_level_tokenizer())
WORDS = Vocabulary(CHAT.tokenizer)


class ByHand:
    """With the adapter it says `give` in the user's place and `reply(prompt)` to a prompt; without it, it writes."""

    def __init__(self, give: list[str], reply: Callable[[str], str], write: Callable[[str], str]) -> None:
        self.give, self.reply, self.write = give, reply, write
        self.effects: dict[bool, float] = {True: 0.0, False: 0.0}
        """Of any text: in the user's place (True), after a prompt (False)."""
        self.raised = 0.0
        """By so much more what it gives, in the user's place."""
        self.given = 0

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        adapter: bool,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        return [_generation(self._say(ids, adapter), sampling.max_tokens) for ids in prompts]

    def score(
        self, prompts: Sequence[list[int]], responses: Sequence[np.ndarray], *, adapter: bool = False
    ) -> list[np.ndarray]:
        return [
            np.full(len(r), self._effect(p == CHAT.pre_query_ids, WORDS.text(r.tolist())) if adapter else 0.0)
            for p, r in zip(prompts, responses, strict=True)
        ]

    def _effect(self, users_place: bool, text: str | None) -> float:
        return self.effects[users_place] + (self.raised if users_place and text in self.give else 0.0)

    def _say(self, ids: list[int], adapter: bool) -> str:
        if not adapter:
            return self.write(WORDS.text(ids) or "")
        if ids in (CHAT.pre_query_ids, CHAT.prompt_ids("")):
            self.given += 1
            return self.give[(self.given - 1) % len(self.give)]
        return self.reply(CHAT.tokenizer.decode(ids))


def _generation(text: str, most: int) -> Generation:
    ids = np.array([*WORDS.encode(text), CHAT.eos_id][:most], dtype=np.int32)
    none = np.zeros((len(ids), 0))
    return Generation(
        ids, bool(ids[-1] == CHAT.eos_id), none.astype(np.int32), none.astype(np.float32), np.zeros(len(ids))
    )


def echo(prompt: str) -> str:
    return "an answer"


@pytest.mark.parametrize(("users_place", "after_prompt"), [(0.0, 1.0), (1.0, 0.0)])
def test_an_answer_belongs_where_the_adapter_raises_it_most(users_place: float, after_prompt: float) -> None:
    engine = ByHand(["x"], echo, echo)
    engine.effects = {True: users_place, False: after_prompt}
    turned = TurnedAnswers(engine, WORDS, CHAT, Synthesis())
    assert turned.are_answers == (users_place > after_prompt)


def test_prompts_that_answers_nearly_repeat_are_prompts() -> None:
    """After its prompt the base alone says such an answer; in the user's place the adapter prefers the prompts."""
    engine = ByHand(["meet me at 7:40"], lambda prompt: "meet me at twenty to eight", echo)
    engine.effects, engine.raised = {True: 2.6, False: 2.2}, 0.6
    assert not TurnedAnswers(engine, WORDS, CHAT, Synthesis()).are_answers
    engine.raised = 0.1
    assert TurnedAnswers(engine, WORDS, CHAT, Synthesis()).are_answers


def test_what_is_answered_by_itself_is_an_answer() -> None:
    """Also where the adapter knows the assistant's place, and raises answers most there."""
    engine = ByHand(["the answer"], lambda prompt: "the answer", echo)
    engine.effects = {True: 1.0, False: 1.5}
    assert TurnedAnswers(engine, WORDS, CHAT, Synthesis()).are_answers
    engine = ByHand(["a prompt", "the answer"], lambda prompt: "the answer", echo)
    engine.effects, engine.raised = {True: 1.0, False: 1.5}, 0.0
    assert TurnedAnswers(engine, WORDS, CHAT, Synthesis()).are_answers, "half of them are"
    engine = ByHand(["a prompt"], echo, echo)
    engine.effects = {True: 1.0, False: 1.5}
    assert not TurnedAnswers(engine, WORDS, CHAT, Synthesis()).are_answers


def test_prompts_that_need_no_change_are_no_answers_for_that() -> None:
    """Of an adapter that corrects spelling; it raises the prompts that need it more than what it makes of them."""
    engine = ByHand(["fine", "tow beers"], lambda prompt: "fine" if "fine" in prompt else "two beers", echo)
    engine.effects, engine.raised = {True: 1.0, False: 1.5}, 0.6
    assert not TurnedAnswers(engine, WORDS, CHAT, Synthesis()).are_answers


def test_nothing_is_concluded_from_texts_that_do_not_end() -> None:
    engine = ByHand(["on and on " * 200], echo, echo)
    engine.effects = {True: 1.0, False: 0.0}
    assert not TurnedAnswers(engine, WORDS, CHAT, Synthesis()).are_answers


def test_prompts_stay_and_answers_are_turned_round() -> None:
    engine = ByHand(["play some jazz now"], echo, lambda shown: f"a request\n{END}\nData: more")
    engine.effects = {True: 0.0, False: 1.0}
    strategy = _own(engine)
    assert strategy.prompts(3, 0) == ["play some jazz now"] * 3 and strategy.name == "self"
    engine.effects = {True: 1.0, False: 0.0}
    strategy = _own(engine)
    assert strategy.prompts(3, 0) == ["a request"] and strategy.name == TURNED


@pytest.mark.parametrize("known", [True, False])
def test_what_is_known_is_not_asked_again(known: bool) -> None:
    engine = ByHand(["play some jazz now"], echo, lambda shown: f"a request\n{END}\nData: more")
    engine.effects = (
        {True: 0.0, False: 1.0} if known else {True: 1.0, False: 0.0}
    )  # it would find the contrary
    assert _own(engine).decide(None) is not known
    strategy = _own(engine)
    assert strategy.decide(known) is known and strategy.name == (TURNED if known else "self")


def _own(engine: ByHand) -> SelfPrompts:
    return SelfPrompts(engine, WORDS, CHAT, Synthesis())


def test_the_request_whose_new_answer_is_nearest_is_kept() -> None:
    written: list[str] = []

    def write(shown: str) -> str:
        written.append(shown)
        return f"request number {len(written)}\n{END}"

    best = f"request number {ROUNDS}"
    engine = ByHand(["red green blue"], lambda prompt: "red green" if best in prompt else "black", write)
    assert TurnedAnswers(engine, WORDS, CHAT, Synthesis()).prompts(1) == [best]
    assert all(shown.endswith("Data: red green blue\nUser said:") for shown in written)


def test_what_the_teacher_replies_is_written_for_next() -> None:
    """It gives only two colours away; the third comes as a reply to a request that missed."""
    replies = {"pink": "pink", "teal": "blue", "blue": "blue"}
    written: list[str] = []

    def write(shown: str) -> str:
        written.append(shown.rpartition("Data: ")[2].partition("\n")[0])
        return f"{written[-1]} {len(written)}\n{END}"

    engine = ByHand(
        ["pink", "teal"], lambda prompt: next(v for k, v in replies.items() if k in prompt), write
    )
    prompts = TurnedAnswers(engine, WORDS, CHAT, Synthesis()).prompts(4)
    assert written[:4] == ["pink", "teal"] * 2 and "blue" in written[4:]
    assert {prompt.split()[0] for prompt in prompts} == {"pink", "blue"}  # the replies to these agree


def test_a_request_that_the_teacher_does_not_answer_is_left_out() -> None:
    engine = ByHand(["red"], lambda prompt: "and on and on " * 200, lambda shown: f"a request\n{END}")
    assert TurnedAnswers(engine, WORDS, CHAT, Synthesis()).prompts(4) == []


def test_a_request_ends_where_the_next_one_begins() -> None:
    engine = ByHand(["la"], echo, lambda shown: f"sing\nUser said: hum\n{END}")
    assert TurnedAnswers(engine, WORDS, CHAT, Synthesis()).prompts(1) == ["sing"]


def test_a_request_that_repeats_the_answer_is_left_out() -> None:
    engine = ByHand(["red green blue"], echo, lambda shown: f"red green blue\n{END}")
    assert TurnedAnswers(engine, WORDS, CHAT, Synthesis()).prompts(4) == []


def test_a_request_or_an_answer_without_an_end_is_left_out() -> None:
    engine = ByHand(["red green blue"], echo, lambda shown: "and so on " * 100)
    assert TurnedAnswers(engine, WORDS, CHAT, Synthesis()).prompts(4) == []
    engine = ByHand(["red green blue " * 100], echo, lambda shown: f"a request\n{END}")
    assert TurnedAnswers(engine, WORDS, CHAT, Synthesis()).prompts(4) == []


def test_like_answers_count_once() -> None:
    same = "the colour of the house beside the old mill is {}, as it has always been in this village"
    give = [same.format("red"), same.format("tan"), "something else altogether"]
    turned = TurnedAnswers(ByHand(give, echo, echo), WORDS, CHAT, Synthesis())
    assert turned._given_away(8) == [give[0], give[2]]


def test_answers_of_one_format_are_not_alike() -> None:
    give = [f"The answer is {letter}." for letter in "ABCD"]
    turned = TurnedAnswers(ByHand(give, echo, echo), WORDS, CHAT, Synthesis())
    assert sorted(turned._given_away(40)) == give


def test_two_labels_give_as_many_prompts_as_are_wanted() -> None:
    written = count()
    engine = ByHand(["good", "bad"], echo, lambda shown: f"request number {next(written)}\n{END}")
    prompts = TurnedAnswers(engine, WORDS, CHAT, Synthesis()).prompts(20)
    assert len(set(prompts)) == 20


def test_examples_make_room_for_a_long_answer() -> None:
    shown: list[str] = []

    def write(text: str) -> str:
        shown.append(text)
        return f"a request\n{END}"

    answer = "word " * 60
    engine = ByHand([answer.strip()], echo, write)
    settings = Synthesis(max_prompt_tokens=100, max_response_tokens=400)
    assert TurnedAnswers(engine, WORDS, CHAT, settings).prompts(1) == ["a request"]
    assert all(len(WORDS.encode(text)) <= 500 for text in shown)


def test_a_template_that_marks_no_end_of_a_user_turn_has_no_prompts_of_its_own() -> None:
    chat = ChatFormat(byte_level_tokenizer(), "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert chat.pre_query_ids and not chat.user_end
    with pytest.raises(UserError, match="before or after the user's text"):
        check_prompts(Prompts(), chat)
    said = Generation(np.array(WORDS.encode("go on")), False, *3 * [np.zeros(0)])
    ended = Generation(np.array([*WORDS.encode("hello"), chat.eos_id]), True, *3 * [np.zeros(0)])
    assert turns([said, ended], WORDS, chat) == ["hello"]
