"""A short transfer of the real adapter between the two real models (`make models` makes their folders)."""

import json
from pathlib import Path

import pytest

import crosslora

ROOT = Path(__file__).parent.parent
SHORT = (
    "synthesis.samples=160",
    "synthesis.shard_size=160",
    "synthesis.min_kept=64",
    "fit.steps=90",
    "fit.evaluate_every=45",
    "evaluation.tasks.0.items=24",
    "evaluation.held_out_items=0",
    "evaluation.baselines=[]",
)


@pytest.mark.real
@pytest.mark.skipif(not (ROOT / "models").is_dir(), reason="run `make models` first")
def test_the_snips_adapter_arrives_on_gemma(tmp_path: Path) -> None:
    config = crosslora.load_config(ROOT / "examples/snips/demo.yaml", [f"run={tmp_path / 'run'}", *SHORT])
    moved = crosslora.transfer(config).adapters[0]
    models = moved.results["tasks"]["snips"]["models"]

    def intent(model: str) -> float:
        return float(models[model]["metrics"]["json_field:intent"]["mean"])

    assert intent("teacher") >= 0.9
    assert intent("target_base") == 0.0
    assert intent("student") >= 0.4 and models["student"]["ended"] >= 0.8
    fitted = json.loads((tmp_path / "run/fit/snips/manifest.json").read_text())
    assert fitted["coverage"] >= 0.85
