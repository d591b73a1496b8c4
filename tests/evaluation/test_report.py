"""The reports say what results.json says, and the HTML one needs nothing beside it."""

import re
from typing import Any

import pytest

from crosslora.evaluation.report import chart, html_report, report


def score(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02}


@pytest.fixture
def results() -> dict[str, Any]:
    means = {"teacher": 0.8, "target_base": 0.1, "student": 0.7}
    models = {name: {"n": 50, "metrics": {"f1": score(mean)}, "ended": 1.0} for name, mean in means.items()}
    examples = [{"prompt": "<b>bold</b>?", "reference": "a | b", "answers": dict.fromkeys(models, "x < y")}]
    rho = {"value": 0.857, "low": 0.8, "high": 0.91, "reason": None}
    told = {
        **{"metric": "f1", "n": 50, "models": models, "examples": examples, "rho_teacher": rho},
        "nats_per_byte": {name: score(1 - mean) for name, mean in means.items()},
        "rho_teacher_nats": {**rho, "value": 0.912},
    }
    none = {
        "value": None,
        "low": None,
        "high": None,
        "reason": "nothing to recover: the teacher gains nothing",
    }
    held_out = {
        **{"metric": "f1", "n": 50, "models": {"student": models["student"]}, "examples": []},
        "nats_per_byte": {"student": score(0.25)},
    }
    speed = {"tokens_per_second": 512.0, "median_seconds": 0.25, "p95_seconds": 1.5}
    return {
        "crosslora": "0.0",
        "packages": {"torch": "2"},
        "config": {"source": {"base": "old"}, "target": {"base": "new"}},
        "tasks": {"told": told, "flat": {**told, "rho_teacher": none}, "held_out": held_out},
        "held_out_kl": {"target_base": 2.5, "student": 0.125},
        "drift": {"n": 24, "perplexity_ratio": {"mean": 1.004, "low": 0.99, "high": 1.02}},
        "speed": dict.fromkeys(means, speed),
    }


def test_the_page_says_how_much_survived(results: dict[str, Any]) -> None:
    page = " ".join(
        re.sub(r"<style>.*</style>|<[^>]+>", " ", html_report(results, "mine"), flags=re.S).split()
    )
    assert "mine: from old to new" in page
    assert "86% of the teacher's gain on told (f1) arrived 95% interval 80% to 91%, n = 50" in page
    assert "nothing to recover: the teacher gains nothing" in page
    assert "0.700 agreement with the teacher on held_out" in page
    assert "0.125 nats per token" in page
    assert "+0.4% perplexity of plain English text" in page and "interval -1.0% to +2.0%, n = 24" in page
    assert "teacher 0.200, target_base 0.900, student 0.300; 91% of the teacher's gain" in page
    assert "student 512 0.25 1.50" in page


def test_the_page_is_self_contained_and_escaped(results: dict[str, Any]) -> None:
    page = html_report(results, "mine")
    assert "<b>bold" not in page and "&lt;b&gt;bold&lt;/b&gt;?" in page and "x &lt; y" in page
    assert not re.findall(r"""(?:src|href)="(?!data:)|url\(|@import|https?:""", page)


def test_markdown_cells_stay_cells(results: dict[str, Any]) -> None:
    text = report(results)
    assert "recovers 86% of the teacher's gain" in text and "; in nats 0.912" in text
    assert "perplexity is +0.4% from the target base's" in text
    assert "| student | 512 | 0.25 | 1.50 |" in text
    assert "| reference | a \\| b |" in text


def test_a_metric_may_hold_what_a_chart_takes_for_mathematics(results: dict[str, Any]) -> None:
    metric = r"regex:^(\w+)$|^x(\w+)$"
    for task in results["tasks"].values():
        task["metric"] = metric
        for model in task["models"].values():
            model["metrics"] = {metric: score(0.5)}
    assert chart(results).startswith(b"\x89PNG")
