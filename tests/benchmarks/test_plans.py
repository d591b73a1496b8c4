"""The tables of docs/cluster.md are what the plan counts."""

import json
from pathlib import Path

from benchmarks.plans import Plans

ROOT = Path(__file__).parent.parent.parent


def test_the_documentation_shows_what_is_counted() -> None:
    plans = Plans()
    shown = [*plans.large(), *plans.worked(), *plans.everyday()]
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert [line for line in shown if line not in text] == []
    assert json.loads((ROOT / "benchmarks" / "plans.json").read_text()) == json.loads(json.dumps(plans.made))
