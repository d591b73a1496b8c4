"""The learnable projection: source LoRA factors in, target LoRA factors out.

    A_t = A_s P_in^T + dA        P_in  = P0_in  + UNIT D_in  Q^T
    B_t = P_out B_s  + dB        P_out = P0_out + UNIT D_out Q^T

P only matters on the span of the factors it maps, so D is learned in an orthonormal basis Q of that span
(docs/architecture.md, "Span reduction"). One P_in and one P_out per space, shared by all layers and modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

from crosslora.adapter import LoraFactors
from crosslora.projection.mapping import Slot
from crosslora.topology import WRITES

UNIT = 0.2
"""Of D, beside 1 of dA and dB. Adam moves all numbers equally far, and a number of D moves every vector of its space
(docs/quality.md compares)."""
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Path of a target linear -> (A [r, d_in], B [d_out, r])."""


def span_basis(vectors: torch.Tensor, tolerance: float = 1e-5) -> torch.Tensor:
    """Orthonormal basis [d, n] of the span of the columns of `vectors` [d, m]."""
    U, S, _ = torch.linalg.svd(vectors, full_matrices=False)
    n = max(int((S > tolerance * S[:1]).sum()), 1)
    return U[:, :n].contiguous()


class SpaceMap(nn.Module):
    """One P = P0 + UNIT D Q^T applied to all source vectors of one space, stacked as columns."""

    def __init__(
        self, vectors: torch.Tensor, d_target: int, P0: torch.Tensor | None, residual: bool, full: bool
    ) -> None:
        """vectors [d_source, m]; P0 [d_target, d_source] or None for zero; `full`: learn all of P (Q = identity)."""
        super().__init__()
        Q = torch.eye(len(vectors)) if full else span_basis(vectors)
        start = torch.zeros(d_target, vectors.shape[1]) if P0 is None else P0 @ vectors
        self.start: torch.Tensor
        self.coordinates: torch.Tensor
        self.register_buffer("start", start)  # [d_target, m]
        self.register_buffer("coordinates", UNIT * (Q.T @ vectors))  # [n, m]
        self.D = nn.Parameter(torch.zeros(d_target, Q.shape[1]))
        self.residual = nn.Parameter(torch.zeros_like(start)) if residual else None

    def forward(self) -> torch.Tensor:
        """Mapped vectors [d_target, m]."""
        mapped = self.start + self.D @ self.coordinates
        return mapped if self.residual is None else mapped + self.residual


class Projection(nn.Module):
    """All input and output maps; `forward` gives the target factors of every slot."""

    def __init__(
        self,
        slots: list[Slot],
        target_widths: dict[str, int],
        P_in: dict[str, torch.Tensor],
        P_out: dict[str, torch.Tensor] | None = None,
        *,
        residual: bool,
        full: bool = False,
    ) -> None:
        """P_in, P_out: space -> P0 [d_target, d_source]; P_out None starts the update at zero."""
        super().__init__()
        self.slots = slots
        columns_in: dict[str, list[torch.Tensor]] = defaultdict(list)
        columns_out: dict[str, list[torch.Tensor]] = defaultdict(list)
        for slot in slots:
            for group in slot.groups:
                columns_in[slot.reads].append(group.A_s.T)
                for part in group.parts:
                    columns_out[WRITES[part.role]].append(part.B_s)
        self.inputs = nn.ModuleDict(
            {
                space: SpaceMap(torch.cat(columns, 1), target_widths[space], P_in[space], residual, full)
                for space, columns in columns_in.items()
            }
        )
        self.outputs = nn.ModuleDict(
            {
                space: SpaceMap(
                    torch.cat(columns, 1),
                    target_widths[space],
                    P_out[space] if P_out else None,
                    residual,
                    full,
                )
                for space, columns in columns_out.items()
            }
        )

    def forward(self) -> Factors:
        A = {space: _Cutter(self.inputs[space]()) for space in self.inputs}
        B = {space: _Cutter(self.outputs[space]()) for space in self.outputs}
        return {slot.path: self._factors(slot, A, B) for slot in self.slots}

    def _factors(
        self, slot: Slot, A: dict[str, _Cutter], B: dict[str, _Cutter]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        As, Bs = [], []
        for group in slot.groups:
            rank = group.A_s.shape[0]
            As.append(A[slot.reads].take(rank).T)
            blocks = [(part.offset, B[WRITES[part.role]].take(rank)) for part in group.parts]
            Bs.append(_stack_rows(blocks, slot.d_out))
        return (As[0], Bs[0]) if len(As) == 1 else (torch.cat(As, 0), torch.cat(Bs, 1))

    def lora_factors(self) -> dict[str, LoraFactors]:
        """The factors as plain float32 tensors, ready to be written."""
        with torch.no_grad():
            return {
                path: LoraFactors(A.float().contiguous(), B.float().contiguous())
                for path, (A, B) in self().items()
            }


class _Cutter:
    """Hands out consecutive columns of a matrix, in the order in which they were stacked."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix, self.next = matrix, 0

    def take(self, columns: int) -> torch.Tensor:
        self.next += columns
        return self.matrix[:, self.next - columns : self.next]


def _stack_rows(blocks: Iterable[tuple[int, torch.Tensor]], d_out: int) -> torch.Tensor:
    """B [d_out, r] from blocks of rows at their offsets; rows without a block are zero."""
    rows, at = [], 0
    for offset, block in blocks:
        rows += [block.new_zeros(offset - at, block.shape[1]), block]
        at = offset + len(block)
    rows.append(rows[-1].new_zeros(d_out - at, rows[-1].shape[1]))
    return torch.cat([row for row in rows if len(row)], 0)
