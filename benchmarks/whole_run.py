"""How good whole runs are over random seeds, served and judged as users do; writes benchmarks/quality-NAME.json.

    python benchmarks/whole_run.py examples/snips/demo.yaml --random-seeds 0 1 2

Runs the configuration with each random seed (of synthesis, fit and evaluation alike) into runs/quality/NAME-SEED.
Finished stages are kept, so the same command goes on after a stop. `low` and `high` of a mean are its 95% bootstrap
interval over the random seeds alone; with three of them that is nearly their range. Each one's own interval, over
the items, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

import crosslora
from crosslora.config import Config, load_config
from crosslora.evaluation.metrics import bootstrap_interval
from crosslora.run_folder import STAGES, RunFolder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECTIONS = ("synthesis", "fit", "evaluation")


def seeded(config: Config, name: str, seed: int) -> Config:
    sections = {name: getattr(config, name).model_copy(update={"random_seed": seed}) for name in SECTIONS}
    return config.model_copy(update={"run": str(ROOT / "runs" / "quality" / f"{name}-{seed}"), **sections})


def minutes(config: Config, name: str, seed: int) -> dict[str, float]:
    """Of each stage."""
    folder = RunFolder.open(seeded(config, name, seed).run)
    return {stage: stage_minutes(folder, f"{stage}/{config.adapters[0].name}") for stage in STAGES}


def stage_minutes(run: RunFolder, stage: str) -> float:
    """Wall time by the last start and end; a stage that was interrupted took longer."""
    lines = run.read_bytes(f"{stage}/events.jsonl").decode().splitlines()
    times = {event["event"]: event["time"] for event in map(json.loads, lines)}
    return round((times["done"] - times["start"]) / 60, 2)


def over_seeds(values: list[float]) -> dict[str, float]:
    low, high = bootstrap_interval(np.array(values))
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def summarise(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """One task's results of every random seed, joined; the models and metrics are the same for all."""
    first = tasks[0]
    models = {model: _model([task["models"][model] for task in tasks]) for model in first["models"]}
    summary = {"metric": first["metric"], "n": [task["n"] for task in tasks], "models": models}
    gains = [task["rho_teacher"]["value"] for task in tasks if task.get("rho_teacher")]
    known = [gain for gain in gains if gain is not None]
    return summary | ({"rho_teacher": {**over_seeds(known), "seeds": gains}} if known else {})


def _model(results: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = {
        metric: {
            **over_seeds([result["metrics"][metric]["mean"] for result in results]),
            "seeds": [result["metrics"][metric] for result in results],
        }
        for metric in results[0]["metrics"]
    }
    ended = [result["ended"] for result in results]
    return {"metrics": metrics, "ended": {**over_seeds(ended), "seeds": ended}}


def table(name: str, task: dict[str, Any]) -> list[str]:
    metrics = list(task["models"]["student"]["metrics"])
    lines = ["", f"{name} (n = {', '.join(map(str, task['n']))})"]
    lines.append("".join(f"{head:>18s}" for head in ("model", *metrics, "ended")))
    for model, result in task["models"].items():
        cells = [*(result["metrics"][metric]["mean"] for metric in metrics), result["ended"]["mean"]]
        lines.append(f"{model:>18s}" + "".join(f"{cell:18.3f}" for cell in cells))
    if gain := task.get("rho_teacher"):
        lines.append(f"rho_teacher {gain['mean']:.3f} [{gain['low']:.3f}, {gain['high']:.3f}]")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--random-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="benchmarks/quality-NAME.json unless given")
    given = parser.parse_args()
    config, name = load_config(given.config), given.config.stem
    results = [
        crosslora.transfer(seeded(config, name, seed)).adapters[0].results for seed in given.random_seeds
    ]
    summaries = {
        task: summarise([result["tasks"][task] for result in results]) for task in results[0]["tasks"]
    }
    collected = {
        "crosslora": results[0]["crosslora"],
        "versions": results[0]["packages"],
        "cpus": len(os.sched_getaffinity(0)),
        "config": results[0]["config"],
        "random_seeds": given.random_seeds,
        "interval": "95%, bootstrap over random seeds",
        "held_out_kl": [result["held_out_kl"] for result in results],
        "drift": [result["drift"] for result in results],
        "minutes": [minutes(config, name, seed) for seed in given.random_seeds],
        "tasks": summaries,
    }
    text = json.dumps(collected, indent=2).replace(f"{ROOT}/", "")  # paths as they are in any checkout
    (given.out or HERE / f"quality-{name}.json").write_text(text + "\n")
    print("\n".join(line for task, summary in summaries.items() for line in table(task, summary)))


if __name__ == "__main__":
    main()
