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
def test_the_count_is_within_a_fifth_of_the_measured_peak(row: dict[str, Any]) -> None:
    counted = count(point_of(row), row["learned"])
    assert counted == pytest.approx(row["counted"]), "the file is older than the formulas"
    assert 0.8 <= counted["total"] / row["measured"] <= 1.2


def test_the_one_measured_constant_is_from_a_point_of_its_own() -> None:
    assert point_of(MEASURED["calibration"]) == CALIBRATION not in POINTS
    assert pytest.approx(HEAP, abs=0.1) == MEASURED["heap"]
