"""Runs side by side, and the folders that cannot be compared."""

import json
from pathlib import Path

import pytest

from crosslora.compare import compare, show
from crosslora.errors import UserError


def finished(run: Path, student: float) -> str:
    """A run folder with the results of one adapter on a task and on held-out prompts."""

    def model(mean: float) -> dict[str, object]:
        return {"metrics": {"f1": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}}

    models = {"teacher": model(0.8), "target_base": model(0.2), "student": model(student)}
    rho = {"value": (student - 0.2) / 0.6, "low": 0.5, "high": 1.0, "reason": None}
    told = {"metric": "f1", "n": 9, "models": models, "rho_teacher": rho}
    held_out = {"metric": "f1", "n": 9, "models": {name: models[name] for name in ("target_base", "student")}}
    flat = {**told, "rho_teacher": {"value": None, "low": None, "high": None, "reason": "nothing to recover"}}
    (run / "evaluate/mine").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"config": {"adapters": [{"name": "mine"}]}}))
    tasks = {"told": told, "held_out": held_out, "flat": flat}
    (run / "evaluate/mine/results.json").write_text(json.dumps({"tasks": tasks}))
    return str(run)


def test_a_row_per_run_and_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare([finished(tmp_path / "a", 0.5), finished(tmp_path / "b", 0.74)])
    assert [(Path(row.run).name, row.task) for row in rows] == [
        (run, task) for run in "ab" for task in ("told", "held_out", "flat")
    ]
    assert rows[3].student == pytest.approx([0.74, 0.64, 0.84])
    assert rows[3].rho_teacher == pytest.approx([0.9, 0.5, 1.0])
    assert rows[4].teacher is None and rows[4].rho_teacher is None and rows[5].rho_teacher is None
    show(rows)
    shown = capsys.readouterr().out
    assert "0.740" in shown and "0.640-0.840" in shown, "whole, though the log has no width"


def test_unfinished_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run\.json"):
        compare([str(tmp_path)])
    run = finished(tmp_path / "a", 0.5)
    (tmp_path / "a/evaluate/mine/results.json").unlink()
    with pytest.raises(UserError, match="mine is not evaluated; run `crosslora transfer` to its end"):
        compare([run])
