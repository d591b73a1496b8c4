"""A choice of texts that leaves nothing out: what many of them share counts less with each that is chosen."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from crosslora.teacher.filters import grams

SHARED = 5
"""Texts that have a 5-gram, from which on it belongs to a kind of text rather than to one of them."""


def varied(texts: Sequence[str], count: int) -> list[int]:
    """Indices of at most `count` texts, greedily, by novelty.

    The novelty of a text is the mean of 1 / sqrt(1 + n) over its shared 5-grams, n the chosen texts that have them: the
    gain of a sum of square roots of counts (Lin and Bilmes, "A Class of Submodular Functions for Document
    Summarization", 2011, section 4.2), per 5-gram, so that long texts are not preferred.
    """
    of_text = [grams(text) for text in texts]
    having = Counter(gram for own in of_text for gram in own)
    shared = [[gram for gram in own if having[gram] >= SHARED] for own in of_text]
    used: Counter[bytes] = Counter()

    def gain(index: int) -> float:
        own = shared[index]
        return sum((1 + used[gram]) ** -0.5 for gram in own) / len(own) if own else 1.0

    queue = [(-gain(index), index) for index in range(len(texts))]
    heapq.heapify(queue)
    chosen: list[int] = []
    while queue and len(chosen) < count:
        _, index = heapq.heappop(queue)
        now = (-gain(index), index)  # gains only fall, so the first that has not is the largest
        if queue and now > queue[0]:
            heapq.heappush(queue, now)
            continue
        chosen.append(index)
        used.update(shared[index])
    return chosen
