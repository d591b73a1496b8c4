"""Settings of the fit on one corpus: how far each student is from the teacher, on the corpus and on real prompts.

    python -m benchmarks.quality.fits --direction gemma3-smollm2 --settings "600 x 4" "600 x 4, rate 2e-3"

From the root of a checkout, after `make models`. The corpus is that of the cell `default` of SNIPS, made first where it is
missing, and so is what the teacher answers to the prompts of the test. One entry of fits.json each; those of this teacher
that are there are kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import crosslora
from benchmarks.alone import alone
from benchmarks.quality.cells import DIRECTIONS, WORK, Cell, conditions, write_whole
from benchmarks.quality.distil import distil, teacher_kl
from benchmarks.quality.methods import corpus_stages, make_source_adapter, with_residual
from crosslora.config import Config, Prompts
from crosslora.progress import say
from crosslora.run_folder import RunFolder
from crosslora.teacher.corpus import read_corpus

RESULTS = Path(__file__).with_name("fits.json")
SETTINGS: dict[str, dict[str, Any]] = {
    "600 x 8": {"steps": 600, "batch_size": 8},
    "600 x 4": {"steps": 600, "batch_size": 4},
    "600 x 4, rate 2e-3": {"steps": 600, "batch_size": 4, "learning_rate": 2e-3},
    "600 x 4, rate 4e-3": {"steps": 600, "batch_size": 4, "learning_rate": 4e-3},
    "600 x 4 of 350": {"steps": 600, "batch_size": 4, "most": 350},
    "600 x 4 of 700": {"steps": 600, "batch_size": 4, "most": 700},
    "300 x 8": {"steps": 300, "batch_size": 8},
    "150 x 16": {"steps": 150, "batch_size": 16},
    "150 x 16, rate 2e-3": {"steps": 150, "batch_size": 16, "learning_rate": 2e-3},
    "300 x 4": {"steps": 300, "batch_size": 4},
    "300 x 4, rate 2e-3": {"steps": 300, "batch_size": 4, "learning_rate": 2e-3},
    "300 x 4, no rehearsal": {"steps": 300, "batch_size": 4, "rehearsal": 0.0},
    "600 x 2": {"steps": 600, "batch_size": 2},
    "1200 x 4": {"steps": 1200, "batch_size": 4},
}
"""Steps x samples, a transfer's own first, `most` the samples that there are to train on; the rest as in every cell."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--direction", choices=DIRECTIONS, default="smollm2-gemma3")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    given = parser.parse_args()
    cell = Cell(given.direction, "snips", "default", 0)
    make_source_adapter(cell)
    config = cell.config()
    crosslora.transfer(config, until="filter")
    real = _real(cell, config)
    crosslora.transfer(real, until="filter")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for name in given.settings:
        about = {
            "direction": cell.direction,
            "name": name,
            "settings": SETTINGS[name],
            "source_steps": cell.setting.source_steps,
        }
        if not any(about.items() <= entry.items() for entry in found):
            say(f"[bold]{name}[/bold]")
            found.append(about | _fit(cell, config, real, SETTINGS[name]))
            write_whole(RESULTS, json.dumps(found, indent=1) + "\n")


def _fit(cell: Cell, config: Config, real: Config, settings: dict[str, Any]) -> dict[str, Any]:
    of_fit = {name: value for name, value in settings.items() if name != "most"}
    fit = config.fit.model_copy(update=of_fit | {"evaluate_every": settings["steps"]})
    config = config.model_copy(update={"fit": fit})
    stages = corpus_stages(cell)
    made = alone(distil, config, stages, with_residual, False, settings.get("most"))
    _, held_out = read_corpus(RunFolder.open(config.run), *stages)
    train, rest = read_corpus(RunFolder.open(real.run), *stages)
    kl = {
        "held_out": alone(teacher_kl, config, made.factors, held_out),
        "real": alone(teacher_kl, config, made.factors, [*train, *rest]),
    }
    return {
        "kl": kl,
        "minutes": made.minutes,
        "tokens_per_second": made.tokens_per_second,
    } | conditions()


def _real(cell: Cell, config: Config) -> Config:
    """A run whose corpus is the teacher's likeliest answers to the prompts of the test."""
    rows = cell.rows[1]
    file = WORK / "data" / f"{cell.task}-test-prompts.jsonl"
    write_whole(file, "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    synthesis = {
        "prompts": Prompts(self=0, file=1, prompts_file=file),
        "samples": len(rows),
        "response_temperature": 0.0,
    }
    update = {"run": f"{config.run}-test", "synthesis": config.synthesis.model_copy(update=synthesis)}
    return config.model_copy(update=update)


if __name__ == "__main__":
    main()
