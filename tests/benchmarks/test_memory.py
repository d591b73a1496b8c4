"""What the plan counts for a fit, against the committed measurement."""

import json
from typing import Any

import pytest

from benchmarks.memory import CALIBRATION, FILE, POINTS, compared, point_of, settings
from crosslora.models import load_model_config, resolve
from crosslora.sizing import HEAP, Shape

MEASURED: dict[str, Any] = json.loads(FILE.read_text())


def test_every_point_was_measured_on_a_base_of_100m_and_more() -> None:
    assert [point_of(row) for row in MEASURED["points"]] == POINTS and len(POINTS) >= 12
    for point in POINTS:
        assert Shape.of(load_model_config(resolve(settings(point).target))).parameters >= 100e6


@pytest.mark.parametrize("row", MEASURED["points"], ids=lambda row: str(point_of(row)))
def test_the_file_is_as_new_as_the_formulas(row: dict[str, Any]) -> None:
    assert compared(row)["counted"] == pytest.approx(row["counted"])


@pytest.mark.parametrize("row", MEASURED["points"], ids=lambda row: str(point_of(row)))
def test_what_is_counted_is_within_a_fifth_of_what_it_takes(row: dict[str, Any]) -> None:
    assert 0.8 <= row["counted"]["total"] / row["measured"] <= 1.2


def test_the_one_measured_constant_is_from_a_point_of_its_own() -> None:
    assert point_of(MEASURED["calibration"]) == CALIBRATION not in POINTS
    assert pytest.approx(HEAP, abs=0.005) == MEASURED["heap"]
