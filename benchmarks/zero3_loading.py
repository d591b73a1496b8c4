"""Private memory of a fit worker while ZeRO-3 loads its share of a base; writes benchmarks/zero3_loading.json.

    python -m benchmarks.zero3_loading

A Llama of 409M random weights, loaded by 1, 2 and 4 workers, each a process. Private is what is no page of a file
(RssAnon): the most while it loads, less what it was before, the most of all workers. `tensors` is what a worker holds
beside its share, in sizes of the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory import HERE, Peak, run_workers
from crosslora import cluster
from crosslora.config import parse_config

WORKERS = (1, 2, 4)
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 49152,
}


def make(folder: str, shape: dict[str, int]) -> int:
    """A base of random weights in bfloat16; bytes of the largest."""
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).bfloat16()
    model.save_pretrained(folder)
    return max(parameter.nbytes for parameter in model.parameters())


def worker(folder: str, workers: int) -> dict[str, int]:
    """Load as a fit worker does."""
    from crosslora.training.loop import join_group, load_base

    join_group("gloo")
    pair = {"source": {"base": folder}, "target": {"base": folder}, "adapters": [{"name": "a", "path": "a"}]}
    fit = {"dtype": "bfloat16", "zero_stage": 3, "workers": workers, "batch_size": workers}
    config = parse_config({"run": "run", **pair, "fit": fit}, Path.cwd())
    LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=1, hidden_size=64, vocab_size=64)
    )  # imports are not loading
    peak = Peak("RssAnon")
    base = load_base(config)
    return {"private": peak.bytes(), "share": sum(p.ds_tensor.nbytes for p in base.parameters())}


def measure(shape: dict[str, int], workers: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row for each number of workers, bytes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        largest = make(folder, shape)
        for count in workers:
            command = ["-m", "benchmarks.zero3_loading", "--worker", folder, str(count)]
            reported = run_workers(command, count, cluster.fit_environment(3, checkpointing=False))
            private = max(report["private"] for report in reported)
            share = max(report["share"] for report in reported)
            tensors = round((private - share) / largest, 2)
            rows.append({"workers": count, "private": private, "share": share, "tensors": tensors})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, workers = arguments.worker
        print(json.dumps(worker(folder, int(workers))))
        return
    rows = measure(SHAPE, WORKERS)
    (HERE / "zero3_loading.json").write_text(
        json.dumps({"shape": SHAPE, "torch": torch.__version__, "rows": rows}, indent=2) + "\n"
    )
    for row in rows:
        print(
            f"{row['workers']} workers: {row['private'] / 1e6:.0f} MB private at the most, a share of "
            f"{row['share'] / 1e6:.0f} MB and {row['tensors']} of the largest tensor"
        )


if __name__ == "__main__":
    main()
