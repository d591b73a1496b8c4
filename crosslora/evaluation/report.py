"""report.html, report.md and its chart, from results.json alone."""

from __future__ import annotations

import io
from typing import Any

import jinja2
import matplotlib
import yaml

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from crosslora.run_folder import Stage

LONGEST_CELL = 160
COLOURS = {"teacher": "#4c566a", "student": "#2a9d8f"}
OTHERS = "#c9ced6"


def write_report(stage: Stage, results: dict[str, Any]) -> None:
    adapter = stage.name.rpartition("/")[2]
    stage.folder.write_bytes(f"{stage.name}/chart.png", chart(results))
    stage.folder.write_bytes(f"{stage.name}/report.md", report(results).encode())
    stage.folder.write_bytes(f"{stage.name}/report.html", html_report(results, adapter).encode())


def report(results: dict[str, Any]) -> str:
    """Markdown: how much survived, the table, the chart, answers side by side."""
    lines = ["# Transfer report", ""]
    lines += [f"- **{name}**: {_headline(task)}" for name, task in results["tasks"].items()]
    lines += [_distance(results["held_out_kl"]), _drift(results["drift"]), "", "![scores](chart.png)", ""]
    for name, task in results["tasks"].items():
        lines += [f"## {name} (n = {task['n']})", "", *_table(task), "", *_examples(task), ""]
    lines += ["## Speed", "", *_speed(results["speed"]), ""]
    packages = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    source, target = results["config"]["source"]["base"], results["config"]["target"]["base"]
    lines += ["## Provenance", "", f"crosslora {results['crosslora']}; {packages}.", ""]
    lines += [f"From `{source}` to `{target}`. Intervals: 95%, bootstrap over items.", ""]
    return "\n".join(lines)


def html_report(results: dict[str, Any], adapter: str) -> str:
    """One page that needs nothing beside it: report.html.j2, filled."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crosslora.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = lambda value: f"{value:.3f}"
    environment.filters["percent"] = lambda value, digits=0: f"{value:.{digits}%}"
    environment.filters["change"] = lambda ratio: f"{ratio - 1:+.1%}"
    config = results["config"]
    page: str = environment.get_template("report.html.j2").render(
        {**results, "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True)},
        adapter=adapter,
        source=config["source"]["base"],
        target=config["target"]["base"],
    )
    return page


def _distance(kl: dict[str, float]) -> str:
    """KL(teacher || model), as fitting measured it."""
    return (
        "- **distance to the teacher** on held-out synthetic samples, KL in nats per token: "
        f"target base {kl['target_base']:.3f}, student {kl['student']:.3f}"
    )


def _drift(drift: dict[str, Any]) -> str:
    change = {name: value - 1 for name, value in drift["perplexity_ratio"].items()}
    return (
        f"- **plain text** (n = {drift['n']}): the student's perplexity is {change['mean']:+.1%} from the target base's "
        f"(95% interval {change['low']:+.1%} to {change['high']:+.1%})"
    )


def _speed(speed: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| model | tokens/s | median seconds | 95% within |", "|---|---|---|---|"]
    return lines + [
        f"| {model} | {row['tokens_per_second']:.0f} | {row['median_seconds']:.2f} | {row['p95_seconds']:.2f} |"
        for model, row in speed.items()
    ]


def _headline(task: dict[str, Any]) -> str:
    student = task["models"]["student"]["metrics"][task["metric"]]["mean"]
    gain = task.get("rho_teacher")
    if gain is None:
        return f"the student agrees with the teacher: {task['metric']} {student:.3f}"
    if gain["value"] is None:
        return f"{task['metric']} {student:.3f}; {gain['reason']}{_in_nats(task['rho_teacher_nats'])}"
    return (
        f"the student recovers {gain['value']:.0%} of the teacher's gain "
        f"(rho_teacher {gain['value']:.3f}, 95% interval {gain['low']:.3f} to {gain['high']:.3f})"
        f"{_in_nats(task['rho_teacher_nats'])}"
    )


def _in_nats(gain: dict[str, Any]) -> str:
    """The same gain by the likelihood of the reference answers."""
    return "" if gain["value"] is None else f"; in nats {gain['value']:.3f}"


def _table(task: dict[str, Any]) -> list[str]:
    metrics = list(task["models"]["student"]["metrics"])
    lines = [
        "| model | n | " + " | ".join(metrics) + " | ended by itself | nats per byte of the reference |",
        "|---" * (len(metrics) + 4) + "|",
    ]
    for model, result in task["models"].items():
        cells = [_interval(summary) for summary in result["metrics"].values()]
        cells += [f"{result['ended']:.3f}", _interval(task["nats_per_byte"].get(model))]
        lines.append(f"| {model} | {result['n']} | " + " | ".join(cells) + " |")
    return lines


def _interval(summary: dict[str, float] | None) -> str:
    return f"{summary['mean']:.3f} [{summary['low']:.3f}, {summary['high']:.3f}]" if summary else ""


def _examples(task: dict[str, Any]) -> list[str]:
    lines = []
    for example in task["examples"]:
        lines += [f"**{_cell(example['prompt'])}**", "", "| | answer |", "|---|---|"]
        lines += [f"| reference | {_cell(example['reference'])} |"] if example["reference"] else []
        lines += [f"| {model} | {_cell(text)} |" for model, text in example["answers"].items()] + [""]
    return lines


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
    return flat if len(flat) <= LONGEST_CELL else flat[: LONGEST_CELL - 3] + "..."


def chart(results: dict[str, Any]) -> bytes:
    """PNG: one panel per task, one bar per model, with intervals."""
    tasks = results["tasks"]
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(5.5 * len(tasks), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (name, task) in zip(axes[0], tasks.items(), strict=True):
        models = list(task["models"])
        scores = [task["models"][model]["metrics"][task["metric"]] for model in models]
        means = [s["mean"] for s in scores]
        errors = [[s["mean"] - s["low"] for s in scores], [s["high"] - s["mean"] for s in scores]]
        axis.barh(
            models, means, xerr=errors, color=[COLOURS.get(m, OTHERS) for m in models], ecolor="#555555"
        )
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_title(
            f"{name}: {task['metric']} (n = {task['n']})", loc="left", fontsize=10, parse_math=False
        )
        axis.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, dpi=150)
    plt.close(figure)
    return content.getvalue()
