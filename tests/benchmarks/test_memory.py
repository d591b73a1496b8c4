"""What the plan counts for a fit, against the committed measurement."""

import json
from dataclasses import fields
from typing import Any

import pytest

from benchmarks.memory import CALIBRATION, HERE, POINTS, Point, count, settings
from crosslora.models import load_config, resolve
from crosslora.sizing import HEAP, Shape

MEASURED: dict[str, Any] = json.loads((HERE / "memory.json").read_text())


def point_of(row: dict[str, Any]) -> Point:
    return Point(**{field.name: row[field.name] for field in fields(Point)})


def test_every_point_was_measured_on_a_base_of_100m_and_more() -> None:
    assert [point_of(row) for row in MEASURED["points"]] == POINTS and len(POINTS) >= 12
    for point in POINTS:
        assert Shape.of(load_config(resolve(settings(point).target))).parameters >= 100e6


@pytest.mark.parametrize("row", MEASURED["points"], ids=lambda row: str(point_of(row)))
def test_the_file_is_as_new_as_the_formulas(row: dict[str, Any]) -> None:
    assert count(point_of(row), row["learned"]) == pytest.approx(row["counted"])


def test_all_but_the_smallest_point_are_counted_within_a_fifth() -> None:
    ratios = {point_of(row): row["counted"]["total"] / row["measured"] for row in MEASURED["points"]}
    outside = [point for point, ratio in ratios.items() if not 0.8 <= ratio <= 1.2]
    assert outside == [POINTS[0]] and ratios[POINTS[0]] < 1.25, "too high, by less than a quarter"


def test_the_one_measured_constant_is_from_a_point_of_its_own() -> None:
    assert point_of(MEASURED["calibration"]) == CALIBRATION not in POINTS
    assert pytest.approx(HEAP, abs=0.005) == MEASURED["heap"]
