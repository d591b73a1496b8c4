"""An engine whose texts and likelihoods are written by hand."""

from collections.abc import Callable, Sequence

import numpy as np

from crosslora.teacher.engine import Generation, Sampling
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
        if ids == CHAT.pre_query_ids:
            self.given += 1
            return self.give[(self.given - 1) % len(self.give)]
        return self.reply(CHAT.tokenizer.decode(ids))


def _generation(text: str, most: int) -> Generation:
    ids = np.array([*WORDS.encode(text), CHAT.eos_id][:most], dtype=np.int32)
    none = np.zeros((len(ids), 0))
    return Generation(
        ids, bool(ids[-1] == CHAT.eos_id), none.astype(np.int32), none.astype(np.float32), np.zeros(len(ids))
    )
