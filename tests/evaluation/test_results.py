"""What answers and likelihoods come to, without an endpoint."""

from pathlib import Path

import numpy as np
import pytest

from crosslora.config import HELD_OUT, Config, Task
from crosslora.evaluation.report import html_report, report
from crosslora.evaluation.results import PLAIN_TEXT, Answers, Nats, collect
from crosslora.evaluation.tasks import Answer, Item

MODELS = ("teacher", "target_base", "student")


def config() -> Config:
    return Config.model_validate(
        {
            "run": "run",
            "source": {"base": "old"},
            "adapters": [{"name": "a", "path": "adapter"}],
            "target": {"base": "new"},
        }
    )


def answers(right: int) -> list[Answer]:
    """Ten, a second apart, three tokens and half a second each."""
    return [Answer("yes" if row < right else "no", True, 3, float(row), row + 0.5) for row in range(10)]


@pytest.mark.parametrize("reference", ["yes", ""])
def test_collected_results_fill_both_reports(reference: str) -> None:
    tasks = [
        (Task(name="own", path=Path("own.jsonl")), [Item("p", reference)] * 10),
        (Task(name=HELD_OUT, path=Path("held")), [Item("q", "yes")] * 10),
    ]
    given: Answers = {
        m: {"own": answers(right), HELD_OUT: answers(right)}
        for m, right in zip(MODELS, (9, 1, 8), strict=True)
    }
    nats: Nats = {
        "teacher": {"own": np.full(10, 0.2), PLAIN_TEXT: np.full(4, 2.5)},
        "target_base": {"own": np.full(10, 1.2), HELD_OUT: np.full(10, 1.0), PLAIN_TEXT: np.full(4, 2.0)},
        "student": {"own": np.full(10, 0.4), HELD_OUT: np.full(10, 0.5), PLAIN_TEXT: np.full(4, 2.01)},
    }
    results = collect(config(), tasks, given, nats, {"target_base": 1.0, "student": 0.1})
    assert results["tasks"]["own"]["rho_teacher_nats"]["value"] == pytest.approx(0.8)
    assert "rho_teacher_nats" not in results["tasks"][HELD_OUT]
    assert results["drift"]["perplexity_ratio"]["mean"] == pytest.approx(np.exp(0.01))
    assert results["speed"]["student"]["tokens_per_second"] == pytest.approx(30 / 9.5)
    assert results["speed"]["student"]["median_seconds"] == pytest.approx(0.5)
    assert (results["tasks"]["own"]["rho_teacher"]["value"] is None) == (reference == "")
    assert "in nats 0.800" in report(results)
    assert "+1.0%" in html_report(results, "a")
