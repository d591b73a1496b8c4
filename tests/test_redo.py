"""What is made again, and what stays."""

from pathlib import Path

import pytest

from crosslora.errors import UserError
from crosslora.redo import Redo
from crosslora.run_folder import STAGES, RunFolder

NAMES = ["a", "b"]


def test_a_stage_is_made_again_for_all_adapters_or_for_one() -> None:
    assert [Redo.parse("fit", NAMES).first(name) for name in NAMES] == ["fit", "fit"]
    assert [Redo.parse("fit/b", NAMES).first(name) for name in NAMES] == [None, "fit"]
    assert [Redo.parse(None, NAMES).first(name) for name in NAMES] == [None, None]


@pytest.mark.parametrize(
    ("redo", "reason"),
    [("fitt", "one of synthesize"), ("fit/c", "no adapter 'c'; one of a, b"), ("fit/", "no adapter ''")],
)
def test_what_cannot_be_made_again_is_refused(redo: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"--redo {redo}: .*{reason}"):
        Redo.parse(redo, NAMES)


def test_what_is_made_again_takes_nothing_of_other_adapters(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path))
    for place in (*STAGES, "harness"):
        for name in NAMES:
            folder.write_json(f"{place}/{name}/manifest.json", {})
    Redo.parse("fit/b", NAMES).forget(folder, "b")
    assert all(folder.exists(f"{place}/a/manifest.json") for place in (*STAGES, "harness"))
    left = [place for place in (*STAGES, "harness") if folder.exists(f"{place}/b")]
    assert left == ["synthesize", "filter"]


def test_benchmarks_of_the_student_outlast_a_new_evaluation(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path))
    folder.write_json("harness/a/results.json", {})
    Redo.parse("evaluate/a", NAMES).forget(folder, "a")
    assert folder.exists("harness/a/results.json")
