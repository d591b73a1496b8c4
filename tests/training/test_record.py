"""Ray Train's record of checkpoints, cut short as by a full disk."""

import json
from pathlib import Path

import pytest
import torch
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from crosslora.run_folder import RunFolder
from crosslora.training.checkpoint import Progress, save
from crosslora.training.record import RECORD, mend_record


@pytest.fixture
def experiment(tmp_path: Path) -> RunFolder:
    """Three checkpoints, the last of which is not whole."""
    for step in (10, 20, 30):
        folder = tmp_path / f"checkpoint_2026-01-01_00-00-{step}.000000"
        folder.mkdir()
        tensors = {"P": torch.ones(2)}
        save(folder, tensors, tensors, tensors, Progress(step=step, best_loss=0.5))
    weights = folder / "best.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    return RunFolder.open(str(tmp_path))


def _recorded(experiment: RunFolder) -> _CheckpointManagerState:
    return _CheckpointManagerState.parse_obj(experiment.read_json(RECORD))


@pytest.mark.parametrize("cut", ["", '{"ray_version": "2.6'])
def test_a_record_that_was_cut_short_names_the_newest_whole_checkpoint(
    experiment: RunFolder, cut: str
) -> None:
    experiment.write_bytes(RECORD, cut.encode())
    mend_record(experiment)
    state = _recorded(experiment)
    assert state.latest_checkpoint_result == state.checkpoint_results[0]
    assert state.latest_checkpoint_result.checkpoint_dir_name == "checkpoint_2026-01-01_00-00-20.000000"
    assert state.latest_checkpoint_result.metrics == {"step": 20, "held_out": 0.5}


def test_without_a_whole_checkpoint_the_fit_begins_anew(tmp_path: Path) -> None:
    experiment = RunFolder.open(str(tmp_path))
    experiment.write_bytes(RECORD, b"{")
    mend_record(experiment)
    assert _recorded(experiment).latest_checkpoint_result is None


def test_a_record_that_is_whole_stays_and_none_is_made(experiment: RunFolder) -> None:
    mend_record(experiment)
    assert not experiment.exists(RECORD)
    experiment.write_bytes(RECORD, json.dumps({"ray_version": "x"}).encode())
    mend_record(experiment)
    assert experiment.read_json(RECORD) == {"ray_version": "x"}
