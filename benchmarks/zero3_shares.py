"""What a worker holds of what ZeRO-3 divides, with 1, 2 and 4 workers; writes benchmarks/zero3_shares.json and a chart.

    python -m benchmarks.zero3_shares

Two real steps of the reverse example (SmolLM2 135M as the student) per number of workers, each a process; the bytes of
a worker's own shares, the most of all workers. Needs the demo's models (`make models`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.memory import Point, run

HERE = Path(__file__).resolve().parent
WORKERS = (1, 2, 4)
COLOURS = {"weights": "#2a9d8f", "learned": "#e9c46a"}


def measure(workers: int) -> dict[str, Any]:
    shares = [result["shares"] for result in run(Point("reverse", 3, workers, 2, 64, False))]
    most = {part: max(share[part] for share in shares) for part in COLOURS}
    return {"workers": workers, **most, "total": sum(most.values())}


def chart(rows: list[dict[str, Any]]) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.5))
    names = [str(row["workers"]) for row in rows]
    below = [0.0] * len(rows)
    for part, colour in COLOURS.items():
        heights = [row[part] / 1e6 for row in rows]
        axes.bar(names, heights, bottom=below, color=colour, label=part, width=0.6)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.plot(
        names, [rows[0]["total"] / 1e6 / row["workers"] for row in rows], "o--", color="#4c566a", label="1/N"
    )
    axes.set(xlabel="workers", ylabel="MB of each worker")
    axes.legend()
    figure.savefig(HERE / "zero3_shares.png", dpi=120, bbox_inches="tight")


def main() -> None:
    rows = [measure(workers) for workers in WORKERS]
    (HERE / "zero3_shares.json").write_text(json.dumps(rows, indent=2) + "\n")
    chart(rows)
    for row in rows:
        share = row["total"] * row["workers"] / rows[0]["total"]
        print(f"{row['workers']} workers: {row['total'] / 1e6:.1f} MB each, {share:.3f} of 1/N")


if __name__ == "__main__":
    main()
