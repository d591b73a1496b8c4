"""MMLU and GSM8K with their data from a local folder, defined as lm-evaluation-harness 0.4 defines them.

DIR/mmlu/test/SUBJECT_test.csv     question, four choices, answer as an index or a letter; with or without a header
DIR/gsm8k_train.jsonl, DIR/gsm8k_test.jsonl    prompt (or question) and completion (or answer, ending in `#### N`)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from crosslora.errors import UserError

LETTERS = "ABCD"
GSM8K_SHOTS = 5
Row = dict[str, Any]
T = TypeVar("T")


def local_tasks(names: Sequence[str], folder: Path, items: int | None) -> list[dict[str, Any]]:
    """Task configurations for the harness. `items`: use so many rows, evenly spread over the test part.

    Raises UserError for a task that is not defined here and for data that is missing or unreadable.
    """
    unknown = next((name for name in names if name not in DEFINED), None)
    if unknown is not None:
        raise UserError(
            f"--tasks {unknown}: only {' and '.join(DEFINED)} are defined for --task-data; leave --task-data out "
            "to have the harness fetch it"
        )
    return [DEFINED[name](folder, items) for name in names]


def _mmlu(folder: Path, items: int | None) -> dict[str, Any]:
    files = sorted((folder / "mmlu/test").glob("*_test.csv"))
    if not files:
        raise UserError(
            f"--task-data {folder}: holds no mmlu/test/SUBJECT_test.csv; give the folder that does"
        )
    rows = [row for file in files for row in _questions(file)]
    choices = "".join(f"{letter}. {{{{choices[{i}]}}}}\n" for i, letter in enumerate(LETTERS))
    return {
        "task": "mmlu",
        "custom_dataset": _dataset(test=spread(rows, items)),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "The following are multiple choice questions (with answers) about {{subject}}.\n\n"
        "{{question.strip()}}\n" + choices + "Answer:",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
    }


def _questions(file: Path) -> list[Row]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as CSV ({error}); mend the file") from error
    if rows and rows[0][0] == "question":
        del rows[0]
    subject = file.name.removesuffix("_test.csv").replace("_", " ")
    return [
        {"subject": subject, "question": row[0], "choices": row[1:5], "answer": _index(file, number, row)}
        for number, row in enumerate(rows, 1)
    ]


def _index(file: Path, number: int, row: list[str]) -> int:
    answer = row[5].strip() if len(row) == 6 else ""
    if len(answer) != 1 or answer not in LETTERS + "0123":
        raise UserError(
            f"{file} question {number}: needs a question, four choices and an answer (A-D or 0-3); mend the line"
        )
    return LETTERS.index(answer) if answer in LETTERS else int(answer)


def _gsm8k(folder: Path, items: int | None) -> dict[str, Any]:
    train, test = (_problems(folder / f"gsm8k_{part}.jsonl") for part in ("train", "test"))
    if len(train) < GSM8K_SHOTS:
        raise UserError(
            f"{folder}/gsm8k_train.jsonl: {len(train)} problems, {GSM8K_SHOTS} stand before every question; add some"
        )
    remove = [",", "\\$", "(?s).*#### ", "\\.$"]
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    number = {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}
    return {
        "task": "gsm8k",
        "custom_dataset": _dataset(train=train, test=spread(test, items)),
        "fewshot_split": "train",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [{**exact, "ignore_punctuation": False, "regexes_to_ignore": remove}],
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
        },
        "filter_list": [{"name": "strict-match", "filter": [number, {"function": "take_first"}]}],
        "num_fewshot": GSM8K_SHOTS,
    }


def _problems(file: Path) -> list[Row]:
    rows = []
    try:
        for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n"):  # JSON may hold U+2028
            row = json.loads(line)
            rows.append(
                {
                    "question": row.get("question") or row["prompt"],
                    "answer": row.get("answer") or row["completion"],
                }
            )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file}: is missing, or line {len(rows) + 1} holds no prompt and completion ({error})"
        ) from error
    return rows


def spread(rows: Sequence[T], items: int | None) -> list[T]:
    """So many of them, evenly spread; all where there are fewer."""
    count = min(items or len(rows), len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _dataset(**splits: list[Row]) -> Callable[..., Any]:
    """What the harness calls to get the data."""

    def load(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})

    return load


DEFINED = {"mmlu": _mmlu, "gsm8k": _gsm8k}
