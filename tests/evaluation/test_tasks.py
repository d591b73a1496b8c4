"""Tasks are read, and refused, before any work."""

import json
from pathlib import Path

import pytest

from crosslora.config import Task
from crosslora.errors import UserError
from crosslora.evaluation.tasks import Answer, answer_tokens, read_items, score
from crosslora.text.templates import ChatFormat
from tests.tiny import byte_level_tokenizer

CHAT = ChatFormat(byte_level_tokenizer())


def task(tmp_path: Path, completion: object, metric: str) -> Task:
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "p", "completion": completion}) + "\n")
    return Task(name="t", path=tmp_path / "t.jsonl", metrics=[metric])


def test_an_object_as_completion_stands_for_its_json(tmp_path: Path) -> None:
    items = read_items(task(tmp_path, {"city": "Zürich", "n": 5}, "json_slots"))
    assert score("json_slots", [Answer('{"n": "5", "city": "zürich"}', ended=True)], items) == [1.0]


@pytest.mark.parametrize("metric", ["json_slots", "json_field:intent"])
def test_a_reference_that_the_metric_cannot_read_is_refused(tmp_path: Path, metric: str) -> None:
    with pytest.raises(UserError, match="not a JSON object"):
        read_items(task(tmp_path, "no JSON", metric))


@pytest.mark.parametrize(
    "line", ['{"prompt": "p", "completion": null}', '{"prompt": "p", "completion": "\\ud83d"}']
)
def test_what_is_no_text_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is no object with the text fields"):
        read_items(Task(name="t", path=tmp_path / "t.jsonl"))


def test_a_field_that_no_reference_has_is_refused(tmp_path: Path) -> None:
    assert read_items(task(tmp_path, {"intent": "x"}, "json_field:intent"))
    with pytest.raises(UserError, match="no completion has the field 'intnet'"):
        read_items(task(tmp_path, {"intent": "x"}, "json_field:intnet"))


def test_an_answer_that_did_not_end_scores_nothing(tmp_path: Path) -> None:
    items = read_items(task(tmp_path, "yes", "exact_match"))
    assert score("exact_match", [Answer("yes", ended=False)], items) == [0.0]


def test_answers_have_room_for_the_longest_reference(tmp_path: Path) -> None:
    long = task(tmp_path, "字" * 100, "exact_match")  # three bytes and three tokens each
    assert answer_tokens(long, read_items(long), CHAT) == 2 * 301
    short = task(tmp_path, "yes", "exact_match")
    assert answer_tokens(short, read_items(short), CHAT) == 96
    assert answer_tokens(short.model_copy(update={"max_tokens": 3}), read_items(short), CHAT) == 3
    longer = task(tmp_path, "字" * 700, "exact_match")
    assert answer_tokens(longer, read_items(longer), CHAT) == 2101
