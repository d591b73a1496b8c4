"""The memory of a fit step beside what crosslora/sizing.py counts for it; writes benchmarks/memory.json and a chart.

    python benchmarks/memory.py

Each point is two real steps (base, projection, DeepSpeed, chunked loss) on random tokens, in one process per worker.
On CPU the figure is the peak of the resident memory less what it was before the base was loaded, on a GPU torch's peak
of allocated memory. The most of all workers counts. Needs the demo's models (`make models`).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from crosslora import cluster
from crosslora.adapter import read_adapter
from crosslora.config import Config, load_config
from crosslora.endpoint import free_port
from crosslora.models import load_model_config, resolve
from crosslora.projection.build import build_transfer
from crosslora.sizing import HEAP, Shape, fit_memory
from crosslora.text.pair import TokenizerPair
from crosslora.training.losses import Rows, summed_loss

HERE = Path(__file__).resolve().parent
FILE = HERE / "memory.json"
EXAMPLES = HERE.parent / "examples" / "snips"
STEPS, TOP_K = 2, 16
Row = dict[str, Any]
"""A point and what was measured there."""


@dataclass(frozen=True)
class Point:
    example: str
    zero_stage: int
    workers: int
    sequences: int
    """Of one worker."""
    length: int
    checkpointing: bool
    dtype: str = "bfloat16"


POINTS = [
    Point("demo", 1, 1, 4, 64, False),
    Point("demo", 1, 1, 16, 128, False),
    Point("demo", 1, 1, 16, 128, True, "float32"),
    Point("demo", 1, 1, 4, 512, False),
    Point("demo", 0, 1, 8, 256, False, "float32"),
    Point("demo", 2, 2, 8, 128, False),
    Point("demo", 3, 2, 8, 128, False),
    Point("demo", 3, 4, 4, 64, True),
    Point("reverse", 1, 1, 4, 256, False),
    Point("reverse", 1, 1, 16, 64, False),
    Point("reverse", 1, 1, 16, 256, True, "float32"),
    Point("reverse", 2, 2, 8, 512, False),
    Point("reverse", 3, 2, 8, 256, False),
    Point("reverse", 1, 1, 8, 96, False, "float32"),
]


CALIBRATION = Point("reverse", 1, 1, 8, 128, False)
"""None of the above: sizing.HEAP, the one constant that was measured, is what activations take here."""


def settings(point: Point) -> Config:
    config = load_config(EXAMPLES / f"{point.example}.yaml")
    update = {
        "zero_stage": point.zero_stage,
        "workers": point.workers,
        "batch_size": point.sequences * point.workers,
        "gradient_checkpointing": point.checkpointing,
        "dtype": point.dtype,
    }
    return config.model_copy(update={"fit": config.fit.model_copy(update=update)})


class Peak:
    """Most resident memory of this process, or most that torch allocated on the GPU, since it was made. Bytes.

    Of /proc's fields VmRSS is all of it, RssAnon without pages of files, which the kernel takes back when it wants.
    """

    def __init__(self, field: str = "VmRSS") -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or what was used before would be taken again and not be counted
        self._field = field
        self._most = self._first = _resident_bytes(field)
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def bytes(self) -> int:
        self._stop.set()
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return self._most - self._first

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._most = max(self._most, _resident_bytes(self._field))


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def worker(point: Point) -> dict[str, Any]:
    """Two steps as training/loop.py takes them; memory of this worker and numbers that it learns."""
    from crosslora.training import state
    from crosslora.training.loop import (
        build_engine,
        build_student,
        ds_config,
        join_group,
        use_plain_attention,
    )

    join_group("nccl" if torch.cuda.is_available() else "gloo")
    use_plain_attention([point.length])
    config = settings(point)
    pair = TokenizerPair.load(config.source, config.target)
    adapter = read_adapter(config.adapters[0].path)
    transfer = build_transfer(adapter, config.source, config.target, pair, 0)
    peak = Peak()
    engine = build_engine(build_student(config, transfer.projection(residual=True)), ds_config(config.fit))
    vocabulary = engine.module.base.get_output_embeddings().out_features
    best = state.gather_parameters(engine, keep=True)  # as the worker that writes keeps it
    started = time.monotonic()
    for _ in range(STEPS):
        ids = torch.randint(vocabulary, (point.sequences, point.length), device=engine.device)
        hidden = engine(ids).flatten(0, 1)
        rows = _rows(len(hidden), vocabulary, engine.device)
        engine.backward(summed_loss(hidden, rows, engine.module.logits, vocabulary) / len(rows))
        engine.step()
    learned = sum(values.numel() for values in best.values())
    return {
        "peak": peak.bytes(),
        "learned": learned,
        "shares": _shares(engine) if point.zero_stage == 3 else None,
        "seconds": time.monotonic() - started,
    }


def _shares(engine: Any) -> dict[str, int]:
    """Bytes of this worker's shares of what ZeRO-3 divides: the weights, and what Adam keeps of the learned numbers."""
    weights = sum(p.ds_tensor.nbytes for p in engine.module.parameters() if not p.requires_grad)
    values = engine.optimizer.fp32_partitioned_groups_flat
    states = engine.optimizer.optimizer.state.values()
    moments = [t for state in states for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
    return {"weights": weights, "learned": sum(t.nbytes for t in [*values, *moments])}


def _rows(count: int, vocabulary: int, device: torch.device) -> Rows:
    top = torch.randint(vocabulary, (count, TOP_K), device=device)
    return Rows(
        student_ids=top[:, 0],
        top_ids=top,
        top_logprobs=torch.full((count, TOP_K), -4.0, device=device),
        strict=torch.ones(count, dtype=torch.bool, device=device),
    )


def run(point: Point) -> list[dict[str, Any]]:
    """What every worker reports."""
    command = [str(HERE / "memory.py"), "--worker", json.dumps(asdict(point))]
    environment = cluster.fit_environment(point.zero_stage, point.checkpointing)
    return run_workers(command, point.workers, environment)


def run_workers(command: list[str], workers: int, environment: dict[str, str]) -> list[dict[str, Any]]:
    """What each of the processes of one group prints last: Python, with the environment of a fit worker."""
    port = free_port("127.0.0.1", 0)
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **environment,
                "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // workers, 1)),
                "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_SIZE": str(workers),
                "WORLD_SIZE": str(workers),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(workers)
    ]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{command}: a worker failed, see above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def measure(point: Point) -> Row:
    workers = run(point)
    row = {
        **asdict(point),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "learned": workers[0]["learned"],
        "measured": max(result["peak"] for result in workers),
    }
    print(f"measured {row['measured'] / 1e9:.2f} GB  {point}", flush=True)
    return row


def compared(row: Row) -> Row:
    """With what the formulas of today count."""
    counted = count(point_of(row), row["learned"], on_gpu=row["device"] != "CPU")
    return {**row, "counted": counted, "ratio": round(counted["total"] / row["measured"], 3)}


def point_of(row: Row) -> Point:
    return Point(**{field.name: row[field.name] for field in fields(Point)})


def heap(row: Row) -> float:
    """Bytes that each byte of activations took, in a measured row."""
    counted = row["counted"]
    rest = row["measured"] - counted["weights"] - counted["learned"] - counted["working"]
    return round(rest / (counted["activations"] / HEAP), 3)


def count(point: Point, learned: int, on_gpu: bool) -> dict[str, float]:
    config = settings(point)
    memory = fit_memory(
        Shape.of(load_model_config(resolve(config.target))),
        learned=learned,
        dtype=point.dtype,
        zero_stage=point.zero_stage,
        workers=point.workers,
        sequences=point.sequences,
        length=point.length,
        checkpointing=point.checkpointing,
        on_gpu=on_gpu,
    )
    return {**asdict(memory), "total": memory.total}


def chart(points: list[Row]) -> None:
    figure, axes = plt.subplots(figsize=(5, 5))
    most = 1.1 * max(point["measured"] for point in points) / 1e9
    axes.plot([0, most], [0, most], color="#4c566a", linewidth=1)
    axes.fill_between(
        [0, most], [0, 0.8 * most], [0, 1.2 * most], color="#c9ced6", alpha=0.4, label="within 20%"
    )
    axes.scatter(
        [point["measured"] / 1e9 for point in points],
        [point["counted"]["total"] / 1e9 for point in points],
        color="#2a9d8f",
    )
    axes.set(xlabel="measured, GB", ylabel="counted, GB", xlim=(0, most), ylim=(0, most))
    axes.legend()
    figure.savefig(HERE / "memory.png", dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument(
        "--points", type=int, nargs="+", help="numbers of those to measure; the file keeps the others"
    )
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(Point(**json.loads(arguments.worker)))))
        return
    former = json.loads(FILE.read_text()) if arguments.points else {"points": [], "calibration": None}
    rows = {point_of(row): row for row in [*former["points"], former["calibration"]] if row}
    all_points = [*POINTS, CALIBRATION]
    chosen = [POINTS[number] for number in arguments.points] if arguments.points else all_points
    if missing := [str(point) for point in all_points if point not in rows and point not in chosen]:
        parser.error(f"{FILE.name} does not have {', '.join(missing)}: measure them too")
    for point in chosen:
        rows[point] = measure(point)
    *points, calibration = (compared(rows[point]) for point in all_points)
    for row in points:
        print(f"{row['ratio']:5.2f}  {point_of(row)}")
    result = {"heap": heap(calibration), "calibration": calibration, "points": points}
    FILE.write_text(json.dumps(result, indent=2) + "\n")
    chart(points)


if __name__ == "__main__":
    main()
