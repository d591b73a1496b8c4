"""What is made again, and what stays."""

from pathlib import Path
from typing import cast

import pytest

from crosslora import pipeline
from crosslora.adapter import Adapter
from crosslora.config import Config
from crosslora.errors import UserError
from crosslora.pipeline import INPUTS, Redo, _forget, _is_as_much
from crosslora.run_folder import STAGES, RunFolder
from tests.tiny import bare_config

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
    _forget(folder, "fit", "b")
    assert all(folder.exists(f"{place}/a/manifest.json") for place in (*STAGES, "harness"))
    left = [place for place in (*STAGES, "harness") if folder.exists(f"{place}/b")]
    assert left == ["synthesize", "filter"]


def test_more_samples_keep_those_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the filter is made again."""
    monkeypatch.setattr(pipeline, "source_identity", lambda *_: {})
    folder, adapter, config = RunFolder.open(str(tmp_path)), cast(Adapter, None), bare_config()
    more = config.model_copy(update={"synthesis": config.synthesis.model_copy(update={"samples": 4800})})
    assert INPUTS["synthesize"](config, adapter, None) == INPUTS["synthesize"](more, adapter, None)
    corpus = folder.stage("synthesize/a", INPUTS["synthesize"](config, adapter, None))
    corpus.finish({"shards": [0], "samples": 2400, "minutes": None})
    assert _is_as_much(config, corpus) and not _is_as_much(more, corpus)
    assert _is_as_much(within(config, 5), corpus), "it had all the time"
    folder.stage("filter/a", INPUTS["filter"](config, adapter, corpus)).finish({})
    with pytest.raises(UserError, match=r"synthesis\.samples: 2400 -> 4800.*--redo filter"):
        folder.stage("filter/a", INPUTS["filter"](more, adapter, corpus))


def test_more_minutes_go_on_and_fewer_do_not(tmp_path: Path) -> None:
    config = bare_config()
    corpus = RunFolder.open(str(tmp_path)).stage("synthesize/a", {})
    corpus.finish({"shards": [0], "samples": config.synthesis.samples, "minutes": 10.0})
    enough = [_is_as_much(within(config, minutes), corpus) for minutes in (5, 10, 20, None)]
    assert enough == [True, True, False, False]
    corpus.reopen()
    assert not corpus.done and not _is_as_much(config, corpus)


def within(config: Config, minutes: float | None) -> Config:
    return config.model_copy(update={"synthesis": config.synthesis.model_copy(update={"minutes": minutes})})


def test_benchmarks_of_the_student_outlast_a_new_evaluation(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path))
    folder.write_json("harness/a/results.json", {})
    _forget(folder, "evaluate", "a")
    assert folder.exists("harness/a/results.json")
