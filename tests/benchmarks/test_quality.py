"""The quality benchmark's own parts: tasks that are made, and what becomes of the cells' scores."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import cells, fits, made, summary
from benchmarks.quality.cells import RESULTS, Cell
from benchmarks.quality.tasks import TASKS
from crosslora.errors import UserError


@pytest.mark.parametrize(
    ("n", "words", "place"),
    [
        (1, "one", "first"),
        (12, "twelve", "twelfth"),
        (20, "twenty", "twentieth"),
        (28, "twenty-eight", "twenty-eighth"),
        (905, "nine hundred and five", "nine hundred and fifth"),
    ],
)
def test_numbers_in_words(n: int, words: str, place: str) -> None:
    assert made.number(n) == words
    if n < 100:
        assert made.ordinal(n) == place


@pytest.mark.parametrize(
    ("hour", "minute", "said"),
    [
        (0, 0, "twelve o'clock"),
        (17, 45, "a quarter to six"),
        (11, 50, "ten to twelve"),
        (23, 35, "twenty-five to twelve"),
        (8, 5, "five past eight"),
    ],
)
def test_the_time_of_day(hour: int, minute: int, said: str) -> None:
    assert made.clock(hour, minute) == said


@pytest.mark.parametrize("task", TASKS)
def test_no_test_prompt_is_trained_on(task: str) -> None:
    train, test = TASKS[task].rows()
    assert len(test) >= 100
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_facts_that_are_asked_for_are_taught() -> None:
    train, test = TASKS["facts"].rows()
    for row in test:
        name = next(
            word.strip("?:") for word in row["prompt"].split() if word.strip("?:").lower() in made_names()
        )
        assert any(name in other["prompt"] and other["completion"] == row["completion"] for other in train)


def made_names() -> set[str]:
    rows = made.facts(random.Random(2))
    words = {word.strip("?:") for row in rows for word in row["prompt"].split()}
    syllables = set(made.SYLLABLES)
    return {word.lower() for word in words if _splits(word.lower(), syllables, 3)}


def _splits(word: str, syllables: set[str], count: int) -> bool:
    if count == 0:
        return not word
    return any(word.startswith(s) and _splits(word[len(s) :], syllables, count - 1) for s in syllables)


def test_gains_are_ratios_of_means_over_random_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality.cells.RESULTS", tmp_path)
    scores = {"target_base": [0.2], "oracle": [0.6, 1.0], "default": [0.5, 0.7], "teacher": [0.2]}
    for method, by_seed in scores.items():
        for seed, mean in enumerate(by_seed):
            cell = Cell("smollm2-gemma3", "facts", method, seed)
            verbatim = {"test": [cell.rows[1][0]["prompt"]] if method == "default" else []}
            values = [mean - 0.1, mean + 0.1] * (len(cell.rows[1]) // 2)
            cell.write({"scores": {"exact_match": values}, "report": {"verbatim": verbatim}})
    rows: dict[str, Any] = {
        row["method"]: row for row in summary._rows("smollm2-gemma3", "facts", "exact_match")
    }
    assert rows["default"]["mean"] == pytest.approx(0.6) and rows["default"]["random_seeds"] == 2
    assert rows["default"]["rho"]["value"] == pytest.approx((0.6 - 0.2) / (0.8 - 0.2))
    low, high = rows["default"]["rho"]["interval"]
    assert low < 2 / 3 < high
    assert rows["default"]["rho_teacher"] is None, "the teacher gains nothing"
    assert rows["oracle"]["lead"]["value"] == pytest.approx(0.6 - 0.8) and "lead" not in rows["default"]
    low, high = rows["target_base"]["lead"]["interval"]
    assert 0.3 <= low + 1e-9 and low < 0.4 < high
    others = rows["default"]["without_verbatim"]
    assert others["n"] == rows["default"]["n"] - 1 and others["mean"] > rows["default"]["mean"]
    assert "without_verbatim" not in rows["oracle"]


def test_tasks_of_the_same_rows_have_one_oracle() -> None:
    whole, completions = (
        Cell("smollm2-gemma3", task, "oracle", 1) for task in ("snips", "snips-completions")
    )
    assert whole.folder == completions.folder and whole.result_file == completions.result_file
    assert whole.folder != Cell("smollm2-gemma3", "facts", "oracle", 1).folder


def test_committed_cells_are_what_they_say() -> None:
    files = list(RESULTS.rglob("*.json"))
    assert files
    for file in files:
        cell = json.loads(file.read_text())
        named = Cell(*(cell[key] for key in ("direction", "task", "method", "random_seed")))
        assert named.result_file == file
        assert {len(values) for values in cell["scores"].values()} == {cell["n"]}
        assert set(named.setting.metrics) <= set(cell["scores"])


def test_committed_fits_are_what_they_say() -> None:
    found = json.loads(fits.RESULTS.read_text())
    assert found
    for entry in found:
        assert entry["direction"] in cells.DIRECTIONS
        assert entry["settings"] == fits.SETTINGS[entry["name"]]


def test_a_cell_that_is_refused_keeps_no_other_from_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, summaries = [], []

    def run(cell: Cell) -> None:
        if cell.method == "generic":
            raise UserError("too few samples")
        made.append(cell.method)

    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(command, "summarise", lambda: summaries.append(1))
    asked = ["--directions", "smollm2-gemma3", "--tasks", "facts", "--random-seeds", "0"]
    monkeypatch.setattr("sys.argv", ["quality", *asked, "--methods", "teacher", "generic", "default"])
    with pytest.raises(SystemExit, match="not made: smollm2-gemma3/facts/generic-0"):
        command.main()
    assert made == ["teacher", "default"] and summaries
