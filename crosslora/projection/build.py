"""The projection of one adapter for one pair of bases."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crosslora.adapter import Adapter
from crosslora.config import Base
from crosslora.models import embedding_rows, load_model_config, resolve
from crosslora.projection.initial import MOST_SHARED_TOKENS, residual_map, start_maps
from crosslora.projection.mapping import Slot, build_slots
from crosslora.projection.projection import Projection
from crosslora.projection.start import Start, no_basis, span_basis, start_of
from crosslora.text.pair import TokenizerPair
from crosslora.topology import Topology, discover


@dataclass(frozen=True)
class Transfer:
    """What is mapped: slots, both topologies, and the closed-form maps that the projection starts from."""

    slots: list[Slot]
    source: Topology
    target: Topology
    maps: dict[str, torch.Tensor]

    def start(self) -> Start:
        """A zero update: the input maps are closed-form, the output maps zero."""
        return start_of(self.slots, self.target.widths, self.maps, None, span_basis)

    def projection(self, *, residual: bool) -> Projection:
        return Projection(self.slots, self.start(), residual=residual)

    def untrained(self, maps: dict[str, torch.Tensor]) -> Projection:
        """The update that `maps` alone give, on both sides."""
        start = start_of(self.slots, self.target.widths, maps, maps, no_basis)
        return Projection(self.slots, start, residual=False)


def build_transfer(
    adapter: Adapter, source: Base, target: Base, pair: TokenizerPair, random_seed: int
) -> Transfer:
    """Reads the embeddings of both bases."""
    source_folder, target_folder = resolve(source), resolve(target)
    source_topology, target_topology = topologies(source, target)
    shared = torch.from_numpy(pair.shared[:MOST_SHARED_TOKENS])
    residual = residual_map(
        embedding_rows(source_folder, shared[:, 0]), embedding_rows(target_folder, shared[:, 1])
    )
    maps = start_maps(residual, source_topology.widths, target_topology.widths, random_seed)
    slots = build_slots(adapter.factors, source_topology, target_topology)
    return Transfer(slots, source_topology, target_topology, maps)


def projection_from(
    start: Start, adapter: Adapter, source: Base, target: Base, *, residual: bool
) -> Projection:
    """The projection that starts where `Transfer.start` of the same adapter and bases does; reads their configurations alone."""
    return Projection(build_slots(adapter.factors, *topologies(source, target)), start, residual=residual)


def topologies(source: Base, target: Base) -> tuple[Topology, Topology]:
    source_topology, target_topology = (
        discover(load_model_config(resolve(base, weights=False))) for base in (source, target)
    )
    return source_topology, target_topology
