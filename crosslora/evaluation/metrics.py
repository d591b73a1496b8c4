"""Scores of one answer, and what may be said of many: intervals, paired differences, recovered gain."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosslora.errors import UserError

Pairs = frozenset[tuple[str, str]]
TAILS = (0.025, 0.975)
"""Of all intervals."""
RESAMPLES = 2000


def exact_match(pred: str, ref: str) -> float:
    """1 where both texts are the same but for white space at their ends."""
    return float(pred.strip() == ref.strip())


def json_slots(pred: str, ref: str) -> float:
    """F1 between the sets of (key, lower-cased value) of all fields of both JSON objects; 0 if pred is none.

    The whole of `pred` must be one JSON object. A nested object counts by dotted keys, a list as one field for
    each item under the same key, and a number, true, false or null as its JSON text: 5 and "5" are the same.
    Raises UserError where `ref` is no JSON object.
    """
    predicted, wanted = _pairs(pred), _reference(ref)
    if predicted is None:
        return 0.0
    if not predicted and not wanted:
        return 1.0
    return 2 * len(predicted & wanted) / (len(predicted) + len(wanted))


def json_field(pred: str, ref: str, field: str) -> float:
    """1 where one field has the same lower-cased value in both objects (say, the intent), as json_slots reads them."""
    predicted, wanted = _pairs(pred), _reference(ref)
    return float(predicted is not None and _values(predicted, field) == _values(wanted, field))


def has_field(ref: str, field: str) -> bool:
    return bool(_values(_reference(ref), field))


def _values(pairs: Pairs, field: str) -> set[str]:
    return {value for key, value in pairs if key == field}


def _reference(ref: str) -> Pairs:
    pairs = _pairs(ref)
    if pairs is None:
        raise UserError(
            f"reference {ref[:80]!r}: not a JSON object; use exact_match or rouge_l for this task"
        )
    return pairs


def _pairs(text: str) -> Pairs | None:
    try:
        value = json.loads(text)
        return frozenset(_flatten("", value)) if isinstance(value, dict) else None
    except (ValueError, RecursionError):  # a degenerate answer can open thousands of brackets
        return None


def _flatten(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten(f"{key}.{name}" if key else name, inner)
    elif isinstance(value, list):
        for item in value:
            yield from _flatten(key, item)
    else:
        yield key, (value if isinstance(value, str) else json.dumps(value)).lower()


def f1(pred: str, ref: str) -> float:
    """F1 of the words that both texts have, each as often as both have it; lower-cased (SQuAD, Rajpurkar et al. 2016,
    which also drops articles)."""
    predicted, wanted = (Counter(_words(text)) for text in (pred, ref))
    common = (predicted & wanted).total()
    return 2 * common / (predicted.total() + wanted.total()) if common else 0.0


def regex(pred: str, ref: str, pattern: str) -> float:
    """1 where the last match in both texts is the same: its first group, or all of it where there is none.

    Raises UserError where the reference has no match.
    """
    wanted = _last_match(pattern, ref)
    if wanted is None:
        raise UserError(f"reference {ref[:80]!r}: has no match for {pattern!r}; mend the pattern or the line")
    return float(_last_match(pattern, pred) == wanted)


def _last_match(pattern: str, text: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    return None if not matches else matches[-1][1 if matches[-1].re.groups else 0]


def rouge_l(pred: str, ref: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), lower-cased and not stemmed.

    Words hold letters of any alphabet. On ASCII text it equals the package rouge_score, which drops all others.
    """
    predicted, wanted = _words(pred), _words(ref)
    if not predicted or not wanted:
        return 0.0
    return 2 * _common_subsequence(predicted, wanted) / (len(predicted) + len(wanted))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a row of the table held in the bits of one number (Hyyro 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    rest = full = (1 << len(a)) - 1  # a zero bit: the length grows at this place of a
    for word in b:
        hits = rest & places.get(word, 0)
        rest = ((rest + hits) | (rest - hits)) & full
    return len(a) - rest.bit_count()


@dataclass(frozen=True)
class RecoveredGain:
    """rho = (student - base) / (reference - base) and its interval; None, with a reason, if it means nothing."""

    value: float | None
    low: float | None
    high: float | None
    reason: str | None = None


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95% percentile bootstrap interval (Efron 1979) of the mean of `values` [n]; ValueError where n is 0.

    Without width where all values are alike, however few they are.
    """
    return _interval(_resampled_means(values)[:, 0])


def paired_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Mean of a - b over the same items [n], with its bootstrap interval: (mean, low, high)."""
    _check_paired(a, b)
    low, high = bootstrap_interval(a - b)
    return float(np.mean(a - b)), low, high


def recovered_gain(student: np.ndarray, base: np.ndarray, reference: np.ndarray) -> RecoveredGain:
    """Share of the reference's gain over the base that the student has; scores of the same items [n].

    The interval draws items for all three at once. Draws in which the reference gains nothing have no ratio and
    are left out: at most 2.5% of them, because a gain whose own interval reaches 0 gives no value.
    """
    _check_paired(student, base, reference)
    gain, low, high = paired_difference(reference, base)
    if low <= 0:
        reason = (
            f"nothing to recover: the reference gains {gain:.3f} over the base, in [{low:.3f}, {high:.3f}]"
        )
        return RecoveredGain(None, None, None, reason)
    means = _resampled_means(student - base, reference - base)
    means = means[means[:, 1] > 0]
    return RecoveredGain(float(np.mean(student - base)) / gain, *_interval(means[:, 0] / means[:, 1]))


def _check_paired(*series: np.ndarray) -> None:
    if len({values.shape for values in series}) > 1:
        raise ValueError(f"scores are not of the same items: shapes {[values.shape for values in series]}")


def _resampled_means(*series: np.ndarray) -> np.ndarray:
    """Means [RESAMPLES, len(series)] of items drawn with replacement, the same items for every series."""
    stacked = np.stack(series)
    if stacked.ndim != 2 or stacked.shape[1] == 0:
        raise ValueError(
            f"scores are one number for each of at least one item, not of shape {series[0].shape}"
        )
    rng, items = np.random.default_rng(0), stacked.shape[1]
    return np.array([stacked[:, rng.integers(items, size=items)].mean(axis=1) for _ in range(RESAMPLES)])


def _interval(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, TAILS)
    return float(low), float(high)
