"""Tasks: prompts with reference answers, and how an answer is scored."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from crosslora.config import Task
from crosslora.errors import UserError
from crosslora.evaluation.metrics import exact_match, f1, has_field, json_field, json_slots, regex, rouge_l
from crosslora.text.templates import ChatFormat

LEAST_TOKENS, MOST_TOKENS = 96, 1024
"""Of an answer, where a task does not say how many; it may always be as long as the longest reference."""


@dataclass(frozen=True)
class Item:
    prompt: str
    reference: str


@dataclass(frozen=True)
class Answer:
    """The whole output of a model; `ended` where it stopped by itself."""

    text: str
    ended: bool
    tokens: int = 0
    begun: float = 0.0
    done: float = 0.0
    """Seconds of one clock, the same for all answers of a model: when it was asked, and when the answer was there."""


def read_items(task: Task, field: str = "evaluation.tasks") -> list[Item]:
    """Raises UserError that names the line, and `field` as the place where the task was asked for."""
    items = []
    try:
        text = task.path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {task.path} cannot be read ({error}); give a JSON-lines file") from error
    if not text:
        raise UserError(f"{field}: {task.path} is empty; give at least one line")
    for number, line in enumerate(
        text.split("\n")[: task.items], 1
    ):  # not splitlines(): JSON may hold U+2028
        try:
            row = json.loads(line)
            items.append(Item(_text(row["prompt"]), _text(row["completion"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{field}: {task.path} line {number} is no object with the text fields `prompt` and `completion`; "
                "mend the line"
            ) from error
    for metric in task.metrics:  # a metric refuses a reference that it cannot read: before hours of work
        for number, item in enumerate(items, 1):
            try:
                _one(metric, "", item.reference)
            except UserError as error:
                raise UserError(f"{field}: {task.path} line {number}: {error}") from None
        key = metric.removeprefix("json_field:")
        if key != metric and not any(has_field(item.reference, key) for item in items):
            raise UserError(f"{field}: {task.path}: no completion has the field {key!r} of {metric}")
    return items


def answer_tokens(task: Task, items: list[Item], chat: ChatFormat) -> int:
    """Tokens that an answer may have."""
    return task.max_tokens or roomy(max(len(chat.answer_ids(item.reference)) for item in items))


def roomy(longest: int) -> int:
    """Tokens for an answer where the longest reference takes `longest`: twice as many, up to MOST_TOKENS."""
    return max(longest, min(2 * longest, MOST_TOKENS), LEAST_TOKENS)


def _text(completion: object) -> str:
    """Objects, lists and numbers stand for their JSON. Raises ValueError for what is no text."""
    if completion is None:
        raise ValueError("null")
    text = completion if isinstance(completion, str) else json.dumps(completion, ensure_ascii=False)
    text.encode()  # half of a surrogate pair is no text
    return text


def score(metric: str, answers: list[Answer], items: list[Item]) -> np.ndarray:
    """Score of each answer, float [n]; an answer that did not end by itself scores 0."""
    values = [
        _one(metric, a.text, i.reference) if a.ended else 0.0 for a, i in zip(answers, items, strict=True)
    ]
    return np.array(values, dtype=float)


def _one(metric: str, text: str, reference: str) -> float:
    name, _, argument = metric.partition(":")
    if argument:
        return {"json_field": json_field, "regex": regex}[name](text, reference, argument)
    plain = {"exact_match": exact_match, "f1": f1, "json_slots": json_slots, "rouge_l": rouge_l}
    return plain[name](text, reference)
