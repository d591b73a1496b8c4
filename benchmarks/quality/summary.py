"""Table and chart of the cells that there are: benchmarks/quality/summary.json, .md and .png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.cells import DIRECTIONS, SOURCELESS, Cell
from benchmarks.quality.methods import METHODS
from benchmarks.quality.tasks import TASKS

HERE = Path(__file__).parent
RESAMPLES = 2000
SAME_CORPUS = ("default", "long_fit", "plain_kl", "plain_ce", "projection_only", "full_projection")
Scores = list[np.ndarray]
"""Scores of each random seed, [n] each."""


def summarise() -> None:
    rows = [
        row
        for direction in DIRECTIONS
        for task, setting in TASKS.items()
        for row in _rows(direction, task, setting.metrics[0])
    ]
    (HERE / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "summary.md").write_text(_table(rows))
    _chart(rows)


def _rows(direction: str, task: str, metric: str) -> list[dict[str, Any]]:
    """One for every method that has a cell, in the order of METHODS."""
    cells = [
        json.loads(path.read_text())
        for method in METHODS
        for path in sorted(Cell(direction, task, method, 0).result_file.parent.glob(f"{method}-*.json"))
    ]
    sources = {cell["source_steps"] for cell in cells if cell["method"] not in SOURCELESS}
    assert len(sources) <= 1, (
        f"{direction}/{task}: source adapters of {sources} steps; make the older cells again"
    )
    scores = {
        method: [np.array(cell["scores"][metric]) for cell in cells if cell["method"] == method]
        for method in METHODS
    }
    scores = {method: values for method, values in scores.items() if values}
    sizes = {len(values) for by_seed in scores.values() for values in by_seed}
    assert len(sizes) <= 1, f"{direction}/{task}: cells of {sizes} items; make the older ones again"
    rows = []
    for method in scores:
        row: dict[str, Any] = {"direction": direction, "task": task, "method": method, "metric": metric}
        row |= _figures(method, scores)
        if written := {prompt for cell in cells if cell["method"] == method for prompt in _verbatim(cell)}:
            new = np.array([test["prompt"].strip() not in written for test in TASKS[task].rows()[1]])
            others = {name: [values[new] for values in by_seed] for name, by_seed in scores.items()}
            row["without_verbatim"] = _figures(method, others) if new.any() else {"n": 0}
        rows.append(row)
    return rows


def _verbatim(cell: dict[str, Any]) -> list[str]:
    """Prompts of the test that the teacher wrote word for word."""
    found: list[str] = cell["report"].get("verbatim", {}).get("test", [])
    return found


def _figures(method: str, scores: dict[str, Scores]) -> dict[str, Any]:
    draws = {name: _means(name, values) for name, values in scores.items()}
    figures: dict[str, Any] = {
        "random_seeds": len(scores[method]),
        "n": len(scores[method][0]),
        "mean": float(np.mean(scores[method])),
        "interval": np.quantile(draws[method], [0.025, 0.975]).tolist(),
    }
    for name, reference in (("rho", "oracle"), ("rho_teacher", "teacher")):
        if "target_base" in scores and reference in scores and method not in ("target_base", reference):
            figures[name] = _rho(method, reference, scores, draws)
    if "default" in scores and method != "default":
        lead = np.mean(scores["default"]) - np.mean(scores[method])
        between = np.quantile(draws["default"] - draws[method], [0.025, 0.975])
        figures["lead"] = {"value": float(lead), "interval": between.tolist()}  # of the default
    return figures


def _rho(
    method: str, reference: str, scores: dict[str, Scores], draws: dict[str, np.ndarray]
) -> dict[str, Any] | None:
    """Ratio of the means over random seeds; None where the reference's gain may be none."""
    gains = draws[reference] - draws["target_base"]
    if np.quantile(gains, 0.025) <= 0:
        return None
    ratios = ((draws[method] - draws["target_base"]) / gains)[gains > 0]
    base = np.mean(scores["target_base"])
    value = (np.mean(scores[method]) - base) / (np.mean(scores[reference]) - base)
    return {"value": float(value), "interval": np.quantile(ratios, [0.025, 0.975]).tolist()}


def _means(method: str, seeds: Scores) -> np.ndarray:
    """Bootstrap means [RESAMPLES] over items and random seeds together: the same items for every method, and the same
    random seeds for those that share a corpus. With one random seed it is over items alone."""
    stream = "default" if method in SAME_CORPUS else method
    items, chooser = np.random.default_rng(0), np.random.default_rng([1, list(METHODS).index(stream)])
    stacked = np.stack(seeds)  # [seeds, n]
    count, n = stacked.shape
    means = np.empty(RESAMPLES)
    for draw in range(RESAMPLES):
        drawn = items.integers(n, size=n)
        means[draw] = stacked[chooser.integers(count, size=count)][:, drawn].mean()
    return means


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| direction | task | method | random seeds | metric | mean | 95% | rho | 95% | rho_teacher | default's lead | 95% | verbatim test rows | rho_teacher without |",
        "|" + 14 * "---|",
    ]
    for row in rows:
        cells = [row["direction"], row["task"], row["method"], str(row["random_seeds"]), row["metric"]]
        cells += [f"{row['mean']:.3f}", _span(row["interval"]), *_recovered(row, "rho")]
        cells += _recovered(row, "rho_teacher")[:1]
        cells += [f"{lead['value']:.3f}", _span(lead["interval"])] if (lead := row.get("lead")) else ["", ""]
        others = row.get("without_verbatim")
        cells += [str(row["n"] - others["n"]), *_recovered(others, "rho_teacher")[:1]] if others else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _recovered(figures: dict[str, Any], name: str) -> list[str]:
    rho = figures.get(name)
    return [f"{rho['value']:.2f}", _span(rho["interval"])] if rho else ["", ""]


def _span(interval: list[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _is_of(row: dict[str, Any], group: tuple[str, str], method: str) -> bool:
    return (row["direction"], row["task"]) == group and row["method"] == method


def _chart(rows: list[dict[str, Any]]) -> None:
    """rho of every method that has one, a group of bars for each direction and task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = [row for row in rows if row.get("rho")]
    if not known:
        return
    groups = list(dict.fromkeys((row["direction"], row["task"]) for row in known))
    methods = [method for method in METHODS if any(row["method"] == method for row in known)]
    of_group = [[m for m in methods if any(_is_of(row, group, m) for row in known)] for group in groups]
    width = 0.8 / max(map(len, of_group))
    colours = pyplot.get_cmap("tab20").colors
    figure, axes = pyplot.subplots(figsize=(2 + 2 * len(groups), 4), layout="constrained")
    for method in methods:
        own = [row for row in known if row["method"] == method]
        places = [groups.index((row["direction"], row["task"])) for row in own]
        # side by side around the group's middle, without room for methods that it lacks
        at = [i + width * (of_group[i].index(method) - (len(of_group[i]) - 1) / 2) for i in places]
        values = [row["rho"]["value"] for row in own]
        low, high = zip(*(row["rho"]["interval"] for row in own), strict=True)
        errors = [np.subtract(values, low).clip(0), np.subtract(high, values).clip(0)]
        colour = colours[list(METHODS).index(method)]
        bars = axes.bar(at, values, width, yerr=errors, label=method, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize="x-small", padding=2)  # a bar of 0 cannot be seen
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(groups)), ["\n".join(group) for group in groups])
    axes.set_ylabel("rho: recovered share of the oracle's gain")
    figure.legend(loc="outside upper center", ncols=min(len(methods), 6), fontsize="small")
    figure.savefig(HERE / "summary.png", dpi=110)
