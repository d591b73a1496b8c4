"""Answers turned round into prompts: for an adapter that was trained on completions only.

Such a teacher writes answers where a user's text should stand. They show what it was trained to say, not what it was
asked. The source base alone writes requests for them, a few examples before its eyes, and the teacher's replies tell
which of these to keep.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, cycle, islice

import numpy as np

from crosslora.config import Synthesis
from crosslora.evaluation.metrics import rouge_l
from crosslora.teacher.engine import Engine, Generation, Sampling
from crosslora.teacher.filters import NearDuplicates, common_grams
from crosslora.teacher.seeds import SAME_SHOTS
from crosslora.teacher.variety import varied
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary

Pair = tuple[str, str]
"""A request and its answer."""
EXAMPLES: list[Pair] = [
    ("What is the capital of France?", "Paris"),
    ("Pack my bag: 2 shirts, a towel and the blue hat", '{"pack": ["2 shirts", "towel", "blue hat"]}'),
    ("I would buy these shoes again.", "sentiment: good"),
    ("A storm closed the airport on Monday.", "Storm Shuts Airport"),
    ("turn off the lamp in the hall at nine", 'lamp(room="hall", state="off", time="9:00")'),
    ("Who has the keys to room 12, Maria or Tom?", '{"type": "question", "object": "keys", "room": "12"}'),
    (
        "send Ada 50 euros for the tickets",
        '{"action": "pay", "to": "Ada", "amount": "50 euros", "for": "tickets"}',
    ),
    ("Say it in plain words: the vehicle was inoperable.", "The car did not work."),
    ("How many days are there in a leap year?", "There are 366 days in a leap year."),
    (
        "find me a cheap flight to Oslo on Friday",
        "SEARCH flight WHERE to = Oslo AND day = Friday SORT BY price",
    ),
]
"""Texts of many kinds, each with what somebody made of it. What an answer says stands in its request too."""
END = "###"
"""Between two examples."""
SAID = "User said:"
TEMPERATURE = 0.7
"""Of the writer; at 1 a small one loses its way."""
CLEARLY = -0.2
"""Nats per token below which it is no accident that the adapter raises an answer less after its prompt."""
ABOVE = 0.1
"""Of what the adapter raises a text by in the user's place: the answer to a prompt falls short of it by more than that."""
OFTEN = 0.125
"""Share of the texts that are repeated."""
SHOTS = 4
PROBES = 64
"""Texts by which it is decided what the teacher writes in the user's place."""
LEAST_PROBES = 8
MOST_ALIKE = 0.7
"""Similarity of two answers above which one of them is left out: a teacher repeats what is likeliest."""
ROUNDS = 3
"""So many requests are written for every one that is kept."""
MOST_COPIED = 0.8
"""Overlap with the answer above which a request only repeats it."""


class TurnedAnswers:
    """Requests for answers that the teacher gave away."""

    def __init__(self, engine: Engine, words: Vocabulary, chat: ChatFormat, settings: Synthesis) -> None:
        self._engine, self._words, self._chat = engine, words, chat
        self._giving = Sampling(1.0, settings.max_response_tokens, chat.user_stop_ids, top_k=0)
        self._probing = Sampling(0.0, settings.max_prompt_tokens, chat.stop_ids, top_k=0)
        self._answering = Sampling(0.0, settings.max_response_tokens, chat.stop_ids, top_k=0)
        self._writing = Sampling(
            TEMPERATURE, settings.max_prompt_tokens, chat.stop_ids | words.ids_with(END), top_k=0
        )
        self._room = settings.max_prompt_tokens + settings.max_response_tokens
        self._chooser = random.Random(settings.random_seed)

    @cached_property
    def are_answers(self) -> bool:
        """Whether what the teacher writes in the user's place are answers, not prompts.

        An adapter that never saw a user's turn raises what it writes there no more than what it replies to that: both are
        answers. One that did raises its prompts more. That alone is a narrow choice, so one of two more signs is asked for.
        It raises the reply less after the text than in the user's place; so it does too where a reply repeats much of its
        prompt, since the base alone nearly says it there. Or it often replies with the text itself, as one does to an
        answer; then it is the other texts that it must not raise more.
        """
        users = self._chat.pre_query_ids
        texts = self._in_places([users] * PROBES) if users else []
        if not texts:
            return False
        prompts = [self._chat.prompt_ids(text) for text in texts]
        replies = self._engine.generate(prompts, self._probing, adapter=True)
        answers = [reply.ids[:-1] if reply.finished else reply.ids for reply in replies]
        answered = [i for i, ids in enumerate(answers) if len(ids)]
        if len(answered) < LEAST_PROBES:
            return False
        answers = [answers[i] for i in answered]
        written = [np.array(self._words.encode(texts[i]), dtype=np.int32) for i in answered]
        after = self._effects([prompts[i] for i in answered], answers)
        beside = self._effects([users] * len(answered), answers)
        own = self._effects([users] * len(answered), written)
        said = [(self._words.text(ids.tolist()) or "").strip() for ids in answers]
        repeated = np.array([reply == texts[i] for reply, i in zip(said, answered, strict=True)])
        bound = ABOVE * np.median(own)
        if np.median(after - beside) < CLEARLY and np.median(own - beside) < bound:
            return True
        others = (own - beside)[~repeated]  # of those that are repeated it is 0
        return bool(np.mean(repeated) >= OFTEN and (len(others) < LEAST_PROBES or np.median(others) < bound))

    def prompts(self, count: int) -> list[str]:
        """At most `count` requests, whose replies are as like what they were written for, and as unlike each other, as can
        be. The replies of one round are written for in the next: some kinds of answers are never given away."""
        answers = self._given_away(count)
        turned: dict[str, tuple[str, float]] = {}  # request -> reply, its agreement with the answer
        for _ in range(ROUNDS if answers else 0):
            shown = [answers[i] for i in varied(answers, [1.0] * len(answers), count)]
            for request, reply, agreement in self._turn(list(islice(cycle(shown), count))):
                turned.setdefault(request, (reply, agreement))
            answers = list(dict.fromkeys([*answers, *(reply for reply, _ in turned.values())]))
        replies, agreements = zip(*turned.values(), strict=True) if turned else ((), ())
        requests = list(turned)
        return [requests[i] for i in varied(replies, agreements, count)]

    def _given_away(self, count: int) -> list[str]:
        """At most `count` answers, unlike each other: what the teacher says in the user's place and to nothing."""
        texts = self._in_places([self._chat.pre_query_ids, self._chat.prompt_ids("")] * count)
        # what most answers say is the format: "The answer is A." and "The answer is B." are not alike
        seen = NearDuplicates(MOST_ALIKE, common_grams(texts))
        return [text for row, text in enumerate(texts) if not seen.seen(text, str(row))][:count]

    def _in_places(self, places: list[list[int]]) -> list[str]:
        """What the teacher writes there, where it ends by itself."""
        return turns(self._engine.generate(places, self._giving, adapter=True), self._words, self._chat)

    def _turn(self, answers: list[str]) -> list[tuple[str, str, float]]:
        """(request, the teacher's reply, its agreement with the answer) for every answer that got both."""
        pairs = [pair for pair in zip(self._write(answers), answers, strict=True) if self._is_request(*pair)]
        replies = self._replies([request for request, _ in pairs])
        return [
            (request, reply, rouge_l(reply, answer))
            for (request, answer), reply in zip(pairs, replies, strict=True)
            if reply
        ]

    def _replies(self, requests: Sequence[str]) -> list[str]:
        """The teacher's likeliest answers, "" where one does not end."""
        prompts = [self._chat.prompt_ids(request) for request in requests]
        replies = self._engine.generate(prompts, self._answering, adapter=True)
        return [self._text(reply) if reply.finished else "" for reply in replies]

    def _text(self, generation: Generation) -> str:
        return (self._words.text(generation.ids[:-1].tolist()) or "").strip()

    def _write(self, answers: list[str]) -> list[str]:
        """A request for each answer, "" where none came out."""
        shown: list[list[int]] = []
        for row, answer in enumerate(answers):
            if row % SAME_SHOTS == 0:
                chosen = self._chooser.sample(EXAMPLES, SHOTS)
            shown.append(self._shown(chosen, answer))
        generations = self._engine.generate(shown, self._writing, adapter=False)
        return [self._request(generation.ids.tolist()) for generation in generations]

    def _shown(self, examples: list[Pair], answer: str) -> list[int]:
        """What the writer goes on from: as many of the examples as there is room for."""
        parts = [self._words.encode(f"Data: {a}\n{SAID} {request}\n{END}\n") for request, a in examples]
        last = self._words.encode(f"Data: {answer}\n{SAID}")
        while parts and sum(map(len, parts)) + len(last) > self._room:
            parts.pop()
        return [*self._chat.bos_ids, *chain.from_iterable(parts), *last]

    def _request(self, ids: list[int]) -> str:
        text = self._words.text([i for i in ids if i not in self._chat.stop_ids]) or ""
        text, ended, _ = text.partition(END)
        # a small writer may begin the next request without the mark
        return text.partition(f"\n{SAID}")[0].strip() if ended or ids[-1] in self._chat.stop_ids else ""

    def _effects(self, prompts: list[list[int]], ids: list[np.ndarray]) -> np.ndarray:
        """Adapter effect of each response after its prompt, nats per token, [n]."""
        on, off = (self._engine.score(prompts, ids, adapter=adapter) for adapter in (True, False))
        return np.array([float(np.mean(a - b)) for a, b in zip(on, off, strict=True)])

    def _is_request(self, request: str, answer: str) -> bool:
        return bool(request) and request != answer and rouge_l(request, answer) <= MOST_COPIED


def turns(generations: Sequence[Generation], words: Vocabulary, chat: ChatFormat) -> list[str]:
    """What was written before the end of the user turn: a stop id, or the template's text where it has no such id."""
    found = []
    for generation in generations:
        ids = generation.ids.tolist()
        text, ended = words.text(ids[:-1] if generation.finished else ids) or "", ""
        if chat.user_end:
            text, ended, _ = text.partition(chat.user_end)
        if text.strip() and (ended or generation.finished):
            found.append(text.strip())
    return found
