"""What the teacher writes in the user's place: prompts, or answers where it was trained on completions only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crosslora.config import Synthesis
from crosslora.teacher.engine import Engine, Generation, Sampling
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary

PROBES = 64
"""Texts by which it is decided which of the two they are."""
LEAST_PROBES = 8
CLEARLY = -0.2
"""Nats per token below which it is no accident that the adapter raises an answer less after its prompt."""
ABOVE = 0.1
"""Of what the adapter raises a text by in the user's place: the answer to a prompt falls short of it by more than that."""
OFTEN = 0.125
"""Share of the texts that are repeated."""


def written(
    engine: Engine, words: Vocabulary, chat: ChatFormat, count: int, temperature: float, max_tokens: int
) -> list[str]:
    """At most `count` texts that the teacher wrote in the user's place, as many as ended by themselves."""
    sampling = Sampling(temperature, max_tokens, chat.user_stop_ids, top_k=0)
    return turns(engine.generate([chat.pre_query_ids] * count, sampling, adapter=True), words, chat)


def are_answers(engine: Engine, words: Vocabulary, chat: ChatFormat, settings: Synthesis) -> bool:
    """Whether what the teacher writes in the user's place are answers, not prompts.

    An adapter that never saw a user's turn raises what it writes there no more than what it replies to that: both are
    answers. One that did raises its prompts more. That alone is a narrow choice, so one of two more signs is asked for.
    It raises the reply less after the text than in the user's place; so it does too where a reply repeats much of its
    prompt, since the base alone nearly says it there. Or it often replies with the text itself, as one does to an
    answer; then it is the other texts that it must not raise more.
    """
    users = chat.pre_query_ids
    texts = written(engine, words, chat, PROBES, 1.0, settings.max_response_tokens) if users else []
    if not texts:
        return False
    prompts = [chat.prompt_ids(text) for text in texts]
    replying = Sampling(0.0, settings.max_prompt_tokens, chat.stop_ids, top_k=0)
    replies = engine.generate(prompts, replying, adapter=True)
    answers = [reply.ids[:-1] if reply.finished else reply.ids for reply in replies]
    answered = [i for i, ids in enumerate(answers) if len(ids)]
    if len(answered) < LEAST_PROBES:
        return False
    answers = [answers[i] for i in answered]
    texts_ids = [np.array(words.encode(texts[i]), dtype=np.int32) for i in answered]
    after = _effects(engine, [prompts[i] for i in answered], answers)
    beside = _effects(engine, [users] * len(answered), answers)
    own = _effects(engine, [users] * len(answered), texts_ids)
    said = [(words.text(ids.tolist()) or "").strip() for ids in answers]
    repeated = np.array([reply == texts[i] for reply, i in zip(said, answered, strict=True)])
    bound = ABOVE * np.median(own)
    if np.median(after - beside) < CLEARLY and np.median(own - beside) < bound:
        return True
    others = (own - beside)[~repeated]  # of those that are repeated it is 0
    return bool(np.mean(repeated) >= OFTEN and (len(others) < LEAST_PROBES or np.median(others) < bound))


def _effects(engine: Engine, prompts: list[list[int]], ids: list[np.ndarray]) -> np.ndarray:
    """Adapter effect of each response after its prompt, nats per token, [n]."""
    on, off = (engine.score(prompts, ids, adapter=adapter) for adapter in (True, False))
    return np.array([float(np.mean(a - b)) for a, b in zip(on, off, strict=True)])


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
