"""The learnable projection: source LoRA factors in, target LoRA factors out.

    A_t = A_s P_in^T + dA        P_in  = P0_in  + UNIT D_in  Q^T
    B_t = P_out B_s  + dB        P_out = P0_out + UNIT D_out Q^T

P only matters on the span of the factors it maps, so D is learned in an orthonormal basis Q of that span
(docs/architecture.md, "Span reduction"). One P_in and one P_out per space, shared by all layers and modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from crosslora.adapter import LoraFactors
from crosslora.projection.mapping import Slot
from crosslora.projection.start import Start
from crosslora.topology import WRITES

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Path of a target linear -> (A [r, d_in], B [d_out, r])."""


class SpaceMap(nn.Module):
    """One P = P0 + UNIT D Q^T applied to all m source vectors of one space, stacked as columns."""

    def __init__(self, start: torch.Tensor, coordinates: torch.Tensor, residual: bool) -> None:
        """start [d_target, m] is what P0 makes of the vectors; coordinates [n, m] are theirs in Q, times UNIT."""
        super().__init__()
        self.start: torch.Tensor
        self.coordinates: torch.Tensor
        self.register_buffer("start", start)
        self.register_buffer("coordinates", coordinates)
        self.D = nn.Parameter(torch.zeros(len(start), len(coordinates)))
        self.residual = nn.Parameter(torch.zeros_like(start)) if residual else None

    def forward(self) -> torch.Tensor:
        """Mapped vectors [d_target, m]."""
        mapped = self.start + self.D @ self.coordinates
        return mapped if self.residual is None else mapped + self.residual


class Projection(nn.Module):
    """All input and output maps; `forward` gives the target factors of every slot."""

    def __init__(self, slots: list[Slot], start: Start, *, residual: bool) -> None:
        """`start`: of these slots, from `start_of`."""
        super().__init__()
        self.slots = slots
        self._ranks = _stacked_ranks(slots)
        # not in the order of `start`, which a file gives in any: ZeRO's workers must agree on that of the parameters
        self.inputs, self.outputs = (
            _maps(side, self._ranks, start, residual) for side in ("inputs", "outputs")
        )

    def forward(self) -> Factors:
        A, B = self._mapped("inputs"), self._mapped("outputs")
        return {slot.path: _factors(slot, A, B) for slot in self.slots}

    def _mapped(self, side: str) -> dict[str, Iterator[torch.Tensor]]:
        """Space -> its factors one after the other. One split: the gradient of a slice is as large as the whole."""
        maps: Iterable[tuple[str, nn.Module]] = getattr(self, side).items()
        return {space: iter(map_().split(self._ranks[f"{side}.{space}"], dim=1)) for space, map_ in maps}

    def lora_factors(self) -> dict[str, LoraFactors]:
        """The factors as plain float32 tensors, ready to be written."""
        with torch.no_grad():
            return {
                path: LoraFactors(A.float().contiguous(), B.float().contiguous())
                for path, (A, B) in self().items()
            }


def _stacked_ranks(slots: list[Slot]) -> dict[str, list[int]]:
    """ "inputs.SPACE" and "outputs.SPACE" -> ranks of the factors, in the order in which they are stacked."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for slot in slots:
        for group in slot.groups:
            rank = group.A_s.shape[0]
            ranks[f"inputs.{slot.reads}"].append(rank)
            for part in group.parts:
                ranks[f"outputs.{WRITES[part.role]}"].append(rank)
    return ranks


def _maps(side: str, names: Iterable[str], start: Start, residual: bool) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            name.split(".")[1]: SpaceMap(start[f"{name}.start"], start[f"{name}.coordinates"], residual)
            for name in names
            if name.startswith(side)
        }
    )


def _factors(
    slot: Slot, A: dict[str, Iterator[torch.Tensor]], B: dict[str, Iterator[torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    As, Bs = [], []
    for group in slot.groups:
        As.append(next(A[slot.reads]).T)
        blocks = [(part.offset, next(B[WRITES[part.role]])) for part in group.parts]
        Bs.append(_stack_rows(blocks, slot.d_out))
    return (As[0], Bs[0]) if len(As) == 1 else (torch.cat(As, 0), torch.cat(Bs, 1))


def _stack_rows(blocks: Iterable[tuple[int, torch.Tensor]], d_out: int) -> torch.Tensor:
    """B [d_out, r] from blocks of rows at their offsets; rows without a block are zero."""
    rows, at = [], 0
    for offset, block in blocks:
        rows += [block.new_zeros(offset - at, block.shape[1]), block]
        at = offset + len(block)
    rows.append(rows[-1].new_zeros(d_out - at, rows[-1].shape[1]))
    return torch.cat([row for row in rows if len(row)], 0)
