"""The benchmark for a GPU, at a shape that needs none."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_it_runs_at_a_small_shape(tmp_path: Path) -> None:
    out = tmp_path / "fit_step.json"
    settings = json.dumps({"sequences": 2, "micro_batches": 2, "checkpointing": True})
    command = [sys.executable, "-m", "benchmarks.gpu.fit_step", "--shape=small", "--length=16", "--steps=2"]
    subprocess.run([*command, f"--settings={settings}", f"--out={out}"], cwd=ROOT, check=True)
    result = json.loads(out.read_text())
    assert (result["sequences"], result["micro_batches"], result["checkpointing"]) == (2, 2, True)
    assert len(result["seconds"]) == 2 and result["tokens_per_second"] > 0
    assert result["counted_gigabytes"] > 0
