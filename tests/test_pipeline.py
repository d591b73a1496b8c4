"""More of a corpus adds to what there is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from crosslora import pipeline
from crosslora.adapter import Adapter
from crosslora.config import Config, Prompts, load_config
from crosslora.errors import UserError
from crosslora.pipeline import INPUTS, _is_as_much, _to_do
from crosslora.redo import Redo
from crosslora.run_folder import RunFolder
from tests.tiny import bare_config


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


def test_stages_that_are_still_to_do(tmp_path: Path) -> None:
    """Of a run that is finished elsewhere nothing is asked of this machine but what is made again."""
    config, folder = bare_config(), RunFolder.open(str(tmp_path))
    for stage in ("synthesize", "filter", "fit"):
        folder.stage(f"{stage}/a", {}).finish({})
    none, fit = Redo.parse(None, ["a"]), Redo.parse("fit", ["a"])
    assert _to_do(config, folder, none, None) == ["export", "evaluate"]
    assert _to_do(config, folder, none, "fit") == []
    assert _to_do(config, folder, fit, None) == ["fit", "export", "evaluate"]
    assert _to_do(config, folder, fit, "filter") == []


def test_tasks_that_are_evaluated_teach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows are in no input of synthesis, filter and fit."""
    for identity in ("source_identity", "base_identity"):
        monkeypatch.setattr(pipeline, identity, lambda *_: {})
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "p", "completion": "c"}')
    bare = bare_config()
    tasks = bare_config(evaluation={"tasks": [{"name": "t", "path": str(task), "metrics": ["exact_match"]}]})
    adapter: Any = SimpleNamespace(digest="x")
    former: Any = SimpleNamespace(digest="y", manifest=dict)
    for stage in ("synthesize", "filter", "fit", "export"):
        assert INPUTS[stage](bare, adapter, former) == INPUTS[stage](tasks, adapter, former)
    assert INPUTS["evaluate"](bare, adapter, former) != INPUTS["evaluate"](tasks, adapter, former)


def test_the_demo_has_no_real_prompts() -> None:
    assert load_config(Path("examples/snips/demo.yaml")).synthesis.prompts == Prompts()
