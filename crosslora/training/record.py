"""Ray Train's record of a fit's checkpoints.

Ray writes it in place: a crash or a full disk may cut it short, and Ray then refuses to start.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ray
from safetensors import SafetensorError

from crosslora.run_folder import RunFolder
from crosslora.training.checkpoint import Progress, load

RECORD = "checkpoint_manager_snapshot.json"


def mend_record(experiment: RunFolder) -> None:
    """Make a record that was cut short again, of the newest checkpoint that is whole; without one the fit begins anew."""
    if not experiment.exists(RECORD) or _is_json(experiment.read_bytes(RECORD)):
        return
    whole = ((name, reached) for name in _newest_first(experiment) if (reached := _reached(experiment, name)))
    name, reached = next(whole, (None, None))
    experiment.write_json(RECORD, _record(name, reached) if name and reached else _EMPTY)


def _is_json(content: bytes) -> bool:
    try:
        return bool(json.loads(content))
    except ValueError:
        return False


def _newest_first(experiment: RunFolder) -> list[str]:
    """Their names begin with the time at which they were made."""
    names = [str(entry.base_name) for entry in experiment.entries() if not entry.is_file]
    return sorted((name for name in names if name.startswith("checkpoint_")), reverse=True)


def _reached(experiment: RunFolder, checkpoint: str) -> Progress | None:
    """Where the checkpoint stands; None where it is not whole itself."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return load(experiment.sub(checkpoint).copy(Path(temporary) / "checkpoint"))[-1]
        except (OSError, ValueError, TypeError, SafetensorError):
            return None


_EMPTY: dict[str, Any] = {
    "ray_version": ray.__version__,
    "checkpoint_results": [],
    "checkpoint_report_indices": [],
    "latest_checkpoint_result": None,
    "pending_training_results": [],
    "pending_validation_specs": [],
    "current_report_index": 0,
    "validated_checkpoint_dir_names": [],
    "timed_out_validation_checkpoint_dir_names": [],
    "failed_validation_checkpoint_dir_names": [],
}


def _record(checkpoint: str, reached: Progress) -> dict[str, Any]:
    metrics = {"step": reached.step, "held_out": reached.best_loss}
    result = {"version": 0, "checkpoint_dir_name": checkpoint, "metrics": metrics}
    return _EMPTY | {
        "checkpoint_results": [result],
        "checkpoint_report_indices": [0],
        "latest_checkpoint_result": result,
        "current_report_index": 1,
    }
