"""Lines of progress where there is no terminal."""

import pytest

from crosslora import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr("crosslora.progress.time.monotonic", lambda: now[0])
    return now


def test_what_loads_before_the_first_piece_is_not_in_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    meter = progress.Meter("answer", 300, "answers", None)
    meter.start_at(100)
    clock[0] = 60
    meter.advance(1)
    assert capsys.readouterr().err == "answer: 101/300 answers\n"
    clock[0] = 80
    meter.advance(100, "fast")
    assert capsys.readouterr().err == "answer: 201/300 answers, 5/s, 20 s left fast\n"


def test_a_line_every_so_often_and_one_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    meter = progress.Meter("fit", 100, "steps", None)
    for step in range(100):
        clock[0] = step + 1
        meter.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "15/100",
        "30/100",
        "45/100",
        "60/100",
        "75/100",
        "90/100",
        "100/100",
    ]
