"""Several finished runs side by side, from their results.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from crosslora.errors import UserError
from crosslora.progress import output
from crosslora.run_folder import RunFolder, adapter_names


@dataclass(frozen=True)
class Row:
    """One task of one adapter of one run. Scores are [mean, low, high] of the task's headline metric."""

    run: str
    adapter: str
    task: str
    metric: str
    n: int
    target_base: list[float]
    student: list[float]
    teacher: list[float] | None
    rho_teacher: list[float] | None
    """None where the teacher is the reference, or where there is nothing to recover."""


def compare(runs: Sequence[str], adapters: Sequence[str] | None = None) -> list[Row]:
    """A row per run, adapter (all, or those that are named) and task; raises UserError for a folder that is no run or not
    evaluated yet."""
    rows = []
    for run in runs:
        folder = RunFolder.open(run)
        of_run = adapter_names(folder)
        for name in of_run if adapters is None else adapters:
            file = f"evaluate/{name}/results.json"
            if not folder.exists(file):
                raise UserError(f"{run}: {name} is not evaluated; run `crosslora transfer` to its end")
            tasks = folder.read_json(file)["tasks"]
            rows += [_row(run, name, task, result) for task, result in tasks.items()]
    return rows


def _row(run: str, adapter: str, task: str, result: dict[str, Any]) -> Row:
    metric = result["metric"]

    def score(model: str) -> list[float]:
        return _three(result["models"][model]["metrics"][metric], "mean")

    rho = result.get("rho_teacher")
    return Row(
        run=run,
        adapter=adapter,
        task=task,
        metric=metric,
        n=result["n"],
        target_base=score("target_base"),
        student=score("student"),
        teacher=score("teacher") if "teacher" in result["models"] else None,
        rho_teacher=_three(rho, "value") if rho and rho["value"] is not None else None,
    )


def _three(summary: dict[str, float], centre: str) -> list[float]:
    return [summary[centre], summary["low"], summary["high"]]


def show(rows: Sequence[Row]) -> None:
    table = Table()
    for column in ("run", "adapter", "task", "metric"):
        table.add_column(column, overflow="fold")
    for column in ("n", "target base", "student", "teacher", "rho_teacher"):
        table.add_column(column, justify="right")
    for row in rows:
        scores = (row.target_base, row.student, row.teacher, row.rho_teacher)
        names = map(escape, (row.run, row.adapter, row.task, row.metric))
        table.add_row(*names, str(row.n), *map(_cell, scores))
    output().print(table)


def _cell(score: list[float] | None) -> str:
    return "" if score is None else f"{score[0]:.3f}\n[dim]{score[1]:.3f}-{score[2]:.3f}[/dim]"
