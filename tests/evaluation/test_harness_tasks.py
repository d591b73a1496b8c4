"""Standard tasks from local files: both forms of MMLU, GSM8K, and files that cannot be used."""

import json
from pathlib import Path

import pytest

from crosslora.errors import UserError
from crosslora.evaluation.harness_tasks import local_tasks

QUESTION = ["2 + 2?", "3", "4", "5", "6"]


def write_mmlu(folder: Path, subject: str, lines: list[list[str]]) -> None:
    (folder / "mmlu/test").mkdir(parents=True, exist_ok=True)
    text = "\n".join(",".join(line) for line in lines)
    (folder / f"mmlu/test/{subject}_test.csv").write_text(text + "\n")


def test_mmlu_with_indices_and_with_letters(tmp_path: Path) -> None:
    header = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]
    write_mmlu(tmp_path, "abstract_algebra", [header, [*QUESTION, "1"], [*QUESTION, "3"]])
    write_mmlu(tmp_path, "zoology", [[*QUESTION, "B"], []])
    (task,) = local_tasks(["mmlu"], tmp_path, None)
    rows = task["custom_dataset"]()["test"].to_list()
    assert [(row["subject"], row["answer"]) for row in rows] == [
        ("abstract algebra", 1),
        ("abstract algebra", 3),
        ("zoology", 1),
    ]
    assert rows[0]["question"] == "2 + 2?" and rows[0]["choices"] == ["3", "4", "5", "6"]


def test_items_are_spread_evenly(tmp_path: Path) -> None:
    write_mmlu(tmp_path, "a", [[f"{i}?", "1", "2", "3", "4", "A"] for i in range(100)])
    (task,) = local_tasks(["mmlu"], tmp_path, 5)
    assert task["custom_dataset"]()["test"]["question"][:] == ["0?", "20?", "40?", "60?", "80?"]


def test_gsm8k_in_both_spellings(tmp_path: Path) -> None:
    for part, keys in (("train", ("question", "answer")), ("test", ("prompt", "completion"))):
        row = dict(zip(keys, ("How many?", "#### 7"), strict=True))
        (tmp_path / f"gsm8k_{part}.jsonl").write_text(5 * (json.dumps(row) + "\n"))
    (task,) = local_tasks(["gsm8k"], tmp_path, None)
    data = task["custom_dataset"]()
    assert data["train"][0] == data["test"][0] == {"question": "How many?", "answer": "#### 7"}


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tasks arc: only mmlu and gsm8k"):
        local_tasks(["arc"], tmp_path, None)
    with pytest.raises(UserError, match=r"holds no mmlu/test/SUBJECT_test\.csv"):
        local_tasks(["mmlu"], tmp_path, None)
    with pytest.raises(UserError, match=r"gsm8k_train\.jsonl: is missing"):
        local_tasks(["gsm8k"], tmp_path, None)
    (tmp_path / "gsm8k_train.jsonl").write_text('{"prompt": "1?", "completion": "#### 1"}\n')
    (tmp_path / "gsm8k_test.jsonl").write_text('{"prompt": "1?", "completion": "#### 1"}\n')
    with pytest.raises(UserError, match="1 problems, 5 stand before every question"):
        local_tasks(["gsm8k"], tmp_path, None)
    write_mmlu(tmp_path, "a", [[*QUESTION, "E"]])
    with pytest.raises(UserError, match=r"a_test\.csv question 1: needs a question, four choices"):
        local_tasks(["mmlu"], tmp_path, None)
