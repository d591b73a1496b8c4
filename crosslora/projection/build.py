"""The projection of one adapter for one pair of bases, the same on every worker and on export."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosslora.adapter import Adapter
from crosslora.config import Base
from crosslora.models import embedding_rows, load_model_config, resolve
from crosslora.projection.initial import MOST_SHARED_TOKENS, residual_map, start_maps
from crosslora.projection.mapping import Slot, build_slots
from crosslora.projection.projection import Projection
from crosslora.text.pair import TokenizerPair
from crosslora.topology import Topology, discover


@dataclass(frozen=True)
class Transfer:
    """What is mapped: slots, both topologies, and the closed-form maps that the projection starts from."""

    slots: list[Slot]
    source: Topology
    target: Topology
    maps: dict[str, torch.Tensor]

    def projection(self, *, residual: bool, full: bool = False) -> Projection:
        """Starts at a zero update: the input maps are closed-form, the output maps zero."""
        return Projection(self.slots, self.target.widths, self.maps, residual=residual, full=full)

    def untrained(self, maps: dict[str, torch.Tensor]) -> Projection:
        """The update that `maps` alone give, on both sides."""
        return Projection(self.slots, self.target.widths, maps, maps, residual=False)


def build_transfer(
    adapter: Adapter, source: Base, target: Base, pair: TokenizerPair, random_seed: int
) -> Transfer:
    source_folder, target_folder = resolve(source), resolve(target)
    source_topology, target_topology = (
        discover(load_model_config(source_folder)),
        discover(load_model_config(target_folder)),
    )
    slots = build_slots(adapter.factors, source_topology, target_topology)
    shared = torch.from_numpy(pair.shared[:MOST_SHARED_TOKENS])
    residual = residual_map(
        embedding_rows(source_folder, shared[:, 0]), embedding_rows(target_folder, shared[:, 1])
    )
    maps = start_maps(residual, source_topology.widths, target_topology.widths, random_seed)
    return Transfer(slots, source_topology, target_topology, maps)
