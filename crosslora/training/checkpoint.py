"""The files of a fit and of its checkpoints: where it stands, and tensors that load at any number of workers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

START, LEARNED = "start.safetensors", "projection.safetensors"
"""Of a fit: what the projection starts from, and what was learned."""


@dataclass
class Progress:
    """Where fitting stands."""

    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    start_kl: float = float("nan")
    """KL(teacher || target base) at the strict positions of the held-out samples, nats per token."""
    best_kl: float = float("nan")
    """The same for the student, at `best_step`."""
    looks_without_gain: int = 0
    adam_step: float = 0.0


Tensors = dict[str, torch.Tensor]


def save(folder: Path, parameters: Tensors, moments: Tensors, best: Tensors, progress: Progress) -> None:
    save_file(parameters, folder / "parameters.safetensors")
    save_file(moments, folder / "moments.safetensors")
    save_file(best, folder / "best.safetensors")
    (folder / "progress.json").write_text(json.dumps(asdict(progress)))


def load(folder: Path) -> tuple[Tensors, Tensors, Tensors, Progress]:
    parameters, moments, best = (
        load_file(folder / f"{name}.safetensors") for name in ("parameters", "moments", "best")
    )
    return parameters, moments, best, Progress(**json.loads((folder / "progress.json").read_text()))
