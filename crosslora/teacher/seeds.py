"""Prompts like a few that are given, or of no domain where none are: the source base goes on with a list of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from crosslora.config import Synthesis
from crosslora.teacher.engine import Engine, Generation, Sampling
from crosslora.teacher.variety import varied
from crosslora.text.templates import ChatFormat
from crosslora.text.vocabulary import Vocabulary

EXAMPLES = (
    "What is the capital of France?",
    "pack my bag: 2 shirts, a towel and the blue hat",
    "I would buy these shoes again.",
    "A storm closed the airport on Monday.",
    "turn off the lamp in the hall at nine",
    "Who has the keys to room 12, Maria or Tom?",
    "send Ada 50 euros for the tickets",
    "Say it in plain words: the vehicle was inoperable.",
    "How many days are there in a leap year?",
    "find me a cheap flight to Oslo on Friday",
    "Tom had 12 apples and gave away 5. How many are left?",
    "My order has not arrived and nobody answers the phone.",
    "translate to French: good morning",
    "list all customers who ordered more than three times",
    "write a function that adds two numbers",
    "The soup was cold and the waiter was rude.",
    "Why is the sky blue?",
    "Correct this: he go to school every day",
    "remind me to call the dentist tomorrow at four",
    "Headache and a mild fever since Tuesday, no cough.",
    "Sum up: the meeting moved to Thursday, the hall is closed.",
    "Both parties agree to settle all claims by the end of May.",
    "Is it true that bats are blind?",
    "give me three names for a small bakery",
)
"""What people ask or tell a model, of many kinds."""
SHOTS = 5
"""Examples shown at a time."""
FEW, OF_FEW = 20, 3
"""Of fewer seed examples than FEW so many are shown; the rest are EXAMPLES. They would leave out most of what the teacher
knows, were they alone."""
SAME_SHOTS = 16
"""Prompts in a row for which the same ones are shown, in the same order: an engine reads these once."""
WRITTEN = 2
"""So many are written for every one that is used."""
INTRODUCTION = "Things that people ask:\n"
MARKS = ("\n", "\n###\n", "\n=====\n")
"""After an example, the first that stands in none; what is written after the next one is cut off."""


class SeedPrompts:
    """The source base alone goes on with lists of examples; used is what the teacher has the most different replies to.

    Not in the user's place of its chat format, where a small base goes on to talk about what it was shown.
    """

    name = "seeds"

    def __init__(
        self, engine: Engine, words: Vocabulary, chat: ChatFormat, settings: Synthesis, seeds: Sequence[str]
    ) -> None:
        """seeds: the user's; without any, all that is shown are EXAMPLES."""
        self._engine, self._words, self._chat = engine, words, chat
        self._seeds = seeds
        self._mark = mark_between(seeds)
        stop_ids = chat.stop_ids | words.ids_with(self._mark)
        self._writing = Sampling(settings.prompt_temperature, settings.max_prompt_tokens, stop_ids, top_k=0)
        self._replying = Sampling(0.0, settings.max_response_tokens, chat.stop_ids, top_k=0)
        self._random_seed = settings.random_seed

    def prompts(self, count: int, shard: int) -> list[str]:
        """At most `count`; fewer where the base goes on badly, or the teacher with its reply does not come to an end."""
        replies = self._replies(list(dict.fromkeys(self._written(WRITTEN * count, shard))))
        answered = list(replies)
        return [answered[i] for i in varied(list(replies.values()), count)]

    def _written(self, count: int, shard: int) -> list[str]:
        chooser = random.Random(f"{self._random_seed}/{shard}")
        lists = [listed(self._shown(chooser), self._mark) for _ in range(-(-count // SAME_SHOTS))]
        shown = [[*self._chat.bos_ids, *self._words.encode(text)] for text in lists]
        rows = [shown[row // SAME_SHOTS] for row in range(count)]
        written = [self._first(g) for g in self._engine.generate(rows, self._writing, adapter=False)]
        return [prompt for prompt in written if prompt]

    def _shown(self, chooser: random.Random) -> list[str]:
        own = min(OF_FEW if len(self._seeds) < FEW else SHOTS, len(self._seeds))
        shown = [*chooser.sample(self._seeds, own), *chooser.sample(EXAMPLES, SHOTS - own)]
        chooser.shuffle(shown)
        return shown

    def _first(self, generation: Generation) -> str:
        """What was written up to the mark, "" where it did not end."""
        text = self._words.text([i for i in generation.ids.tolist() if i not in self._chat.stop_ids]) or ""
        first, ended, _ = text.partition(self._mark)
        return first.strip() if ended or generation.finished else ""

    def _replies(self, prompts: list[str]) -> dict[str, str]:
        """Prompt -> the teacher's likeliest reply, where it says something and ends."""
        ids = [self._chat.prompt_ids(prompt) for prompt in prompts]
        generations = self._engine.generate(ids, self._replying, adapter=True)
        texts = [self._words.text(g.ids[:-1].tolist()) if g.finished else None for g in generations]
        return {prompt: text for prompt, text in zip(prompts, texts, strict=True) if text and text.strip()}


def mark_between(seeds: Sequence[str]) -> str:
    return next((mark for mark in MARKS if not any(mark in seed for seed in seeds)), MARKS[-1])


def listed(examples: Sequence[str], mark: str) -> str:
    """What the source base goes on with."""
    return INTRODUCTION + "".join(f"- {example}{mark}" for example in examples) + "-"
