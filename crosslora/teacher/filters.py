"""What makes a synthetic sample worth training on; every sample gets one verdict, the first reason that applies."""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from crosslora.config import Synthesis
from crosslora.teacher.corpus import FILE, Sample

KEPT = "kept"
MOST_COMPRESSION = 8.0
"""Text that zlib shrinks more than this is one phrase over and over."""
PERMUTATIONS = 64
COMMON, LEAST_COMMON = 0.05, 20
"""Share and number of prompts from which on a 5-gram is no sign of a duplicate: prompts of one adapter may all begin
with the same instruction."""


def verdicts(samples: Sequence[Sample], settings: Synthesis) -> list[dict[str, Any]]:
    """One row per sample: sample_id, verdict, held_out (only ever true for kept samples)."""
    duplicates = NearDuplicates(settings.max_similarity, common_grams([s.prompt for s in samples]))
    rows = [
        {"sample_id": s.sample_id, "verdict": _verdict(s, settings, duplicates), "held_out": False}
        for s in samples
    ]
    by_prompt = defaultdict(list)
    for sample, row in zip(samples, rows, strict=True):
        if row["verdict"] == KEPT:
            by_prompt[sample.prompt].append(row)
    _hold_out(list(by_prompt.values()), settings)
    return rows


def _hold_out(groups: list[list[dict[str, Any]]], settings: Synthesis) -> None:
    """All samples of some prompts: another answer to a prompt that is trained on tells little."""
    if len(groups) == 1:
        groups = [[row] for row in groups[0]]
    kept, held = sum(map(len, groups)), 0
    wanted = max(round(kept * settings.held_out), 1)
    shuffled = np.random.default_rng(settings.random_seed).permutation(len(groups))
    for index in sorted(
        shuffled, key=lambda i: max(len(groups[i]), wanted)
    ):  # what is more than is wanted comes last
        if held >= wanted or (held and held + len(groups[index]) > kept / 2):
            return
        for row in groups[index]:
            row["held_out"] = True
        held += len(groups[index])


def count_by_verdict(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["verdict"] for row in rows).most_common())


def _verdict(sample: Sample, settings: Synthesis, duplicates: NearDuplicates) -> str:
    if not sample.finished:
        return "unfinished"
    if sample.response is None:
        return "undecodable"
    if not sample.response.strip():
        return "empty"
    if _is_degenerate(sample.response) or _is_degenerate(sample.prompt):
        return "degenerate"
    if sample.adapter_effect < settings.min_adapter_effect:
        return "adapter_effect"
    # the user's own prompts may be few: each is answered several times
    text = f"{sample.prompt}\n{sample.response}" if sample.strategy == FILE else sample.prompt
    return "near_duplicate" if duplicates.seen(text, sample.sample_id) else KEPT


def _is_degenerate(text: str) -> bool:
    raw = text.encode()
    return len(raw) >= 64 and len(raw) / len(zlib.compress(raw)) > MOST_COMPRESSION


def common_grams(texts: Sequence[str]) -> frozenset[bytes]:
    """5-grams that many of the texts have."""
    counts = Counter(gram for text in texts for gram in grams(text))
    least = max(COMMON * len(texts), LEAST_COMMON)
    return frozenset(gram for gram, count in counts.items() if count > least)


def grams(text: str) -> set[bytes]:
    """Its 5-grams of characters, in lower case, one space for all white space."""
    folded = _folded(text)
    return {folded[i : i + 5].encode() for i in range(max(len(folded) - 4, 1))}


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


class NearDuplicates:
    """MinHash over character 5-grams, without those that are `common`; a text of common ones alone is compared whole."""

    def __init__(self, threshold: float, common: frozenset[bytes] = frozenset()) -> None:
        self._index, self._common = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS), common

    def seen(self, text: str, key: str) -> bool:
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch(list(grams(text) - self._common) or [_folded(text).encode()])
        if self._index.query(sketch):
            return True
        self._index.insert(key, sketch)
        return False
