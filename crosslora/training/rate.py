"""The learning rate relative to the target's weights."""

from __future__ import annotations

import torch

from crosslora.config import Base, Fit
from crosslora.models import load_model, load_model_config, resolve
from crosslora.topology import discover

REFERENCE = 0.0355
"""RMS of the linears of Gemma 3 270M, on which the default rate was chosen."""
ROWS = 64
"""Of every linear that are looked at: all of a large base would take minutes to read."""


def relative_rate(fit: Fit, target: Base) -> Fit:
    """`fit` with its learning rate times sqrt(rms / REFERENCE), rms that of the target's linears.

    Adam moves every number by about the rate, whatever the weights. Beside weights twice as large an update B A counts for
    half; both factors are learned, so it goes with the square of the rate.
    """
    scale = (weight_rms(resolve(target)) / REFERENCE) ** 0.5
    return fit.model_copy(update={"learning_rate": fit.learning_rate * scale})


def weight_rms(folder: str) -> float:
    """Root mean square of the linears of a base, each counting alike. The weights are read from their files, not held."""
    model = load_model(folder, "auto")
    weights = [
        model.get_parameter(f"{linear.path}.weight") for linear in discover(load_model_config(folder)).linears
    ]
    squares = [weight[:: max(len(weight) // ROWS, 1)].float().square().mean() for weight in weights]
    return float(torch.stack(squares).mean().sqrt())
