"""Learn once per pair: one projection for several adapters, and what it is worth to one that it was not fitted on.

    python -m benchmarks.quality.pair --held-out spoken

From the root of a checkout, after `make models`. From SmolLM2 to Gemma 3, random seed 0, on the corpora of the cells
`default` of TASKS, made first where they are missing. The projection has no residual, since that belongs to one adapter.
One entry of pair.json each:

- `outside`: share of the squared norm of the held-out adapter's factors that lies outside the span that was fitted
- `moved`: the held-out adapter by that projection alone, without any training of its own
- `starts`: fits of the held-out adapter from that projection and from the usual start; loss on held-out samples by step
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import crosslora
from benchmarks.alone import alone
from benchmarks.quality.answers import greedy
from benchmarks.quality.cells import WORK, Cell, conditions, write_whole
from benchmarks.quality.distil import distil, teacher_kl, train_student
from benchmarks.quality.methods import corpus_stages, make_source_adapter, transfer_of, with_residual
from crosslora.adapter import LoraFactors, write_adapter
from crosslora.config import Fit
from crosslora.evaluation.tasks import Item, score
from crosslora.models import load_model, resolve
from crosslora.precision import chosen
from crosslora.projection.build import Transfer
from crosslora.projection.projection import Factors, Projection
from crosslora.projection.start import UNIT, span_basis, stacked_vectors, start_of, whole_basis
from crosslora.projection.student import Student
from crosslora.run_folder import RunFolder
from crosslora.teacher.corpus import read_corpus
from crosslora.text.pair import TokenizerPair
from crosslora.training.batches import Example, batch_indices, build_examples
from crosslora.training.loop import use_plain_attention
from crosslora.training.rate import relative_rate

RESULTS = Path(__file__).with_name("pair.json")
TASKS = ("snips", "spoken", "facts")
STEPS = 100
"""Of the held-out adapter's own fits."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--held-out", choices=TASKS, default="spoken")
    task = parser.parse_args().held_out
    cells = {name: Cell("smollm2-gemma3", name, "default", 0) for name in TASKS}
    for cell in cells.values():
        make_source_adapter(cell)
        crosslora.transfer(cell.config(), until="filter")
    held_out = cells.pop(task)
    maps = WORK / "pairs" / f"without-{task}.safetensors"
    alone(fit_together, list(cells.values()), maps)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    entry = {
        "held_out": task,
        "fitted": list(cells),
        "outside": outside(transfer_of(held_out), [transfer_of(cell) for cell in cells.values()]),
    }
    entry |= {"moved": _moved(held_out, maps), "starts": _starts(held_out, maps)} | conditions()
    write_whole(RESULTS, json.dumps([e for e in found if e["held_out"] != task] + [entry], indent=1) + "\n")


class Together(nn.Module):
    """One projection for the slots of several adapters; `forward` gives the factors of the one that is `active`."""

    def __init__(self, transfers: list[Transfer]) -> None:
        super().__init__()
        self.slots = transfers[0].slots  # the same linears for all
        slots = [
            replace(slot, path=f"{index}:{slot.path}")
            for index, transfer in enumerate(transfers)
            for slot in transfer.slots
        ]
        start = start_of(slots, transfers[0].target.widths, transfers[0].maps, None, whole_basis)
        self.projection = Projection(slots, start, residual=False)
        self.active = 0

    def forward(self) -> Factors:
        factors = self.projection()
        return {slot.path: factors[f"{self.active}:{slot.path}"] for slot in self.slots}

    def maps(self, P0: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """P [d_target, d_source] of every space, named "in." and "out."; P0 is where the input maps started."""
        inputs: Any = self.projection.inputs
        outputs: Any = self.projection.outputs
        learned = {f"in.{space}": P0[space] + UNIT * inputs[space].D.detach() for space in inputs}
        return learned | {f"out.{space}": UNIT * outputs[space].D.detach() for space in outputs}


def fit_together(cells: list[Cell], file: Path) -> None:
    """Batches of one adapter after the other, as many steps as a fit of one."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    fit = relative_rate(cells[0].config().fit, cells[0].bases[1])
    transfers = [transfer_of(cell) for cell in cells]
    corpora = [_examples(cell) for cell in cells]
    use_plain_attention(example.length for examples in corpora for example in examples)
    module = Together(transfers)
    base = load_model(resolve(cells[0].bases[1]), chosen(fit.dtype, on_gpu=False))
    student = Student(base, module)  # type: ignore[arg-type]
    train_student(student, _in_turn(module, corpora, fit), [], fit)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(module.maps(transfers[0].maps), file)


def _in_turn(module: Together, corpora: list[list[Example]], fit: Fit) -> Iterator[list[Example]]:
    batches = [batch_indices(examples, fit.batch_size, fit.random_seed) for examples in corpora]
    for module.active in cycle(range(len(corpora))):
        yield [corpora[module.active][i] for i in next(batches[module.active])]


def outside(held_out: Transfer, fitted: list[Transfer]) -> dict[str, float]:
    """Of every space; 0 where the fitted adapters span all of it."""
    own = _vectors(held_out)
    others = [_vectors(transfer) for transfer in fitted]
    shares = {}
    for space, V in own.items():
        Q = span_basis(torch.cat([vectors[space] for vectors in others], 1))
        shares[space] = round(max(1 - float((Q.T @ V).square().sum() / V.square().sum()), 0.0), 4)
    return shares


def _vectors(transfer: Transfer) -> dict[str, torch.Tensor]:
    """Space -> the source vectors [d_source, m] that one map reads ("in.") or writes ("out.")."""
    return {name.replace("puts.", "."): vectors for name, vectors in stacked_vectors(transfer.slots).items()}


def from_maps(file: Path, residual: bool, transfer: Transfer, random_seed: int) -> Projection:
    """The held-out adapter by maps that were learned on others."""
    P = load_file(file)
    P_in, P_out = (
        {name.removeprefix(side): matrix for name, matrix in P.items() if name.startswith(side)}
        for side in ("in.", "out.")
    )
    start = start_of(transfer.slots, transfer.target.widths, P_in, P_out, span_basis)
    return Projection(transfer.slots, start, residual=residual)


def moved_factors(cell: Cell, maps: Path) -> dict[str, LoraFactors]:
    return from_maps(maps, False, transfer_of(cell), 0).lora_factors()


def _moved(cell: Cell, maps: Path) -> dict[str, Any]:
    factors = alone(moved_factors, cell, maps)
    folder = WORK / "pairs" / cell.task
    write_adapter(folder, factors, cell.bases[1].base)
    _, held_out = read_corpus(RunFolder.open(cell.config().run), *corpus_stages(cell))
    test = cell.rows[1]
    answers = alone(greedy, cell.bases[1], folder, test, cell.setting.max_tokens)
    items = [Item(row["prompt"], row["completion"]) for row in test]
    metrics = [metric for metric in cell.setting.metrics if metric != "nats"]
    return {"kl": alone(teacher_kl, cell.config(), factors, held_out)} | {
        metric: round(float(score(metric, answers, items).mean()), 4) for metric in metrics
    }


def _starts(cell: Cell, maps: Path) -> dict[str, dict[int, float]]:
    config = cell.config()
    fit = config.fit.model_copy(update={"steps": STEPS, "evaluate_every": 25})
    config = config.model_copy(update={"fit": fit})
    starts = {"usual": with_residual, "learned on others": partial(from_maps, maps, True)}
    return {
        name: alone(distil, config, corpus_stages(cell), build, False).held_out
        for name, build in starts.items()
    }


def _examples(cell: Cell) -> list[Example]:
    train, _ = read_corpus(RunFolder.open(cell.config().run), *corpus_stages(cell))
    return build_examples(train, TokenizerPair.load(*cell.bases), cell.config().fit.max_tokens)


if __name__ == "__main__":
    main()
