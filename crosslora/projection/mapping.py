"""Which source factors each target linear receives: the layer map and the slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosslora.adapter import LoraFactors
from crosslora.errors import UserError
from crosslora.topology import READS, Linear, Topology


def layer_map(num_source: int, num_target: int) -> list[int]:
    """Source layer of each target layer: order-preserving, proportional depth."""
    if num_target == 1:
        return [0]
    step = (num_source - 1) / (num_target - 1)
    return [round(layer * step) for layer in range(num_target)]


@dataclass(frozen=True)
class Part:
    """Rows of a target linear that one role writes, and the source factor that feeds them."""

    role: str
    offset: int
    B_s: torch.Tensor
    """[d_out_source of the role, r]"""


@dataclass(frozen=True)
class Group:
    """Parts that read through one source factor A_s."""

    A_s: torch.Tensor
    """[r, d_in_source]"""
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Slot:
    """A target linear and the source factors that become its update; a fused linear may hold several groups."""

    path: str
    d_out: int
    reads: str
    groups: tuple[Group, ...]

    @property
    def rank(self) -> int:
        return sum(group.A_s.shape[0] for group in self.groups)


def build_slots(factors: dict[str, LoraFactors], source: Topology, target: Topology) -> list[Slot]:
    """Slots of all target linears that get an update; raises UserError where the adapter does not fit the source."""
    by_role = split_roles(factors, source)
    pi = layer_map(source.num_layers, target.num_layers)
    slots = [_slot(linear, pi[linear.layer], by_role) for linear in target.linears]
    return [slot for slot in slots if slot.groups]


def split_roles(
    factors: dict[str, LoraFactors], source: Topology
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(layer, role) -> (A_s, B_s); the B of a fused projection is cut at its role widths, its A is shared."""
    linears = source.by_path()
    by_role = {}
    for path, factor in factors.items():
        linear = linears.get(path)
        if linear is None:
            raise UserError(
                f"adapter: {path} is no linear of the source base that maps to a space; remove it from "
                "the adapter, or give the base that it was trained on"
            )
        check_shape(path, linear, (factor.B.shape[0], factor.A.shape[1]))
        for role, B_s in zip(linear.roles, factor.B.split(linear.widths), strict=True):
            by_role[linear.layer, role] = (factor.A, B_s)
    return by_role


def check_shape(path: str, linear: Linear, shape: tuple[int, int]) -> None:
    """Refuse an adapter whose factor does not have the shape of the source base's linear."""
    if shape != (linear.d_out, linear.d_in):
        raise UserError(
            f"adapter: {path} updates a {shape[0]} x {shape[1]} matrix, the source base has "
            f"{linear.d_out} x {linear.d_in} there; give the base that the adapter was trained on"
        )


def _slot(
    linear: Linear, source_layer: int, by_role: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
) -> Slot:
    groups: dict[int, tuple[torch.Tensor, list[Part]]] = {}
    offset = 0
    for role, width in zip(linear.roles, linear.widths, strict=True):
        if (source_layer, role) in by_role:
            A_s, B_s = by_role[source_layer, role]
            groups.setdefault(id(A_s), (A_s, []))[1].append(Part(role, offset, B_s))
        offset += width
    return Slot(
        linear.path,
        linear.d_out,
        READS[linear.roles[0]],
        tuple(Group(A_s, tuple(parts)) for A_s, parts in groups.values()),
    )
