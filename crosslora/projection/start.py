"""What the learnable projection starts from, as tensors: worked out once for a fit, and the same for all its workers.

Which basis a singular value decomposition gives depends on the machine, and what is learned only means something in
that basis. So it is stored, never worked out again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from crosslora.projection.mapping import Slot
from crosslora.topology import WRITES

UNIT = 0.2
"""Of D, beside 1 of dA and dB. Adam moves all numbers equally far, and a number of D moves every vector of its space
(docs/quality.md compares)."""
TOLERANCE = 1e-5
"""Of the largest singular value: what is smaller is rounding."""
Start = dict[str, torch.Tensor]
"""Of the m source vectors V of a space: inputs.SPACE.start [d_target, m] is P0 V, inputs.SPACE.coordinates [n, m] is
UNIT Q^T V; outputs.SPACE likewise."""


def span_basis(vectors: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis Q [d, n] of the span of the columns of `vectors` [d, m]."""
    U, S, _ = torch.linalg.svd(vectors, full_matrices=False)
    n = max(int((S > TOLERANCE * S[:1]).sum()), 1)
    return U[:, :n].contiguous()


def whole_basis(vectors: torch.Tensor) -> torch.Tensor:
    """Q [d, d] of the whole space: all of P is learned."""
    return torch.eye(len(vectors))


def no_basis(vectors: torch.Tensor) -> torch.Tensor:
    """Q [d, 0]: nothing of P is learned."""
    return vectors[:, :0]


def start_of(
    slots: list[Slot],
    target_widths: dict[str, int],
    P_in: dict[str, torch.Tensor],
    P_out: dict[str, torch.Tensor] | None,
    basis: Callable[[torch.Tensor], torch.Tensor],
) -> Start:
    """P_in, P_out: space -> P0 [d_target, d_source]; P_out None starts the update at zero. `basis` of the vectors is what D is
    learned in."""
    start = {}
    for name, vectors in stacked_vectors(slots).items():
        side, space = name.split(".")
        maps = P_in if side == "inputs" else P_out
        zero = torch.zeros(target_widths[space], vectors.shape[1])
        start[f"{name}.start"] = maps[space] @ vectors if maps else zero
        start[f"{name}.coordinates"] = UNIT * (basis(vectors).T @ vectors)
    return start


def stacked_vectors(slots: list[Slot]) -> dict[str, torch.Tensor]:
    """ "inputs.SPACE" -> all A_s^T that read it, "outputs.SPACE" -> all B_s that write it: [d_source, m], in the order of the
    slots, their groups and parts."""
    columns: dict[str, list[torch.Tensor]] = defaultdict(list)
    for slot in slots:
        for group in slot.groups:
            columns[f"inputs.{slot.reads}"].append(group.A_s.T)
            for part in group.parts:
                columns[f"outputs.{WRITES[part.role]}"].append(part.B_s)
    return {name: torch.cat(stacked, 1) for name, stacked in columns.items()}
