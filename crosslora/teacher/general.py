"""Prompts of no domain, for a teacher that was trained on completions only and writes none of its own."""

from __future__ import annotations

from crosslora.config import Synthesis
from crosslora.teacher.engine import Engine, Sampling
from crosslora.teacher.seeds import SeedPrompts
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
WRITTEN = 2
"""So many are written for every one that is used."""


class GeneralPrompts:
    """The source base goes on with lists of such examples; used is what the teacher has the most different replies to."""

    def __init__(self, engine: Engine, words: Vocabulary, chat: ChatFormat, settings: Synthesis) -> None:
        self._engine, self._words, self._chat = engine, words, chat
        self._writer = SeedPrompts(engine, words, chat, settings, EXAMPLES)
        self._replying = Sampling(0.0, settings.max_response_tokens, chat.stop_ids, top_k=0)

    def prompts(self, count: int, shard: int) -> list[str]:
        """At most `count`; fewer where the base goes on badly, or the teacher with its reply does not come to an end."""
        written = list(dict.fromkeys(self._writer.prompts(WRITTEN * count, shard)))
        replies = self._replies(written)
        answered = list(replies)
        return [answered[i] for i in varied(list(replies.values()), count)]

    def _replies(self, prompts: list[str]) -> dict[str, str]:
        """Prompt -> the teacher's likeliest reply, where it says something and ends."""
        ids = [self._chat.prompt_ids(prompt) for prompt in prompts]
        generations = self._engine.generate(ids, self._replying, adapter=True)
        texts = [self._words.text(g.ids[:-1].tolist()) if g.finished else None for g in generations]
        return {prompt: text for prompt, text in zip(prompts, texts, strict=True) if text and text.strip()}
