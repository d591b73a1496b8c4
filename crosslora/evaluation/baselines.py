"""Naive baselines: adapters for the target that nothing was trained for."""

from __future__ import annotations

import torch

from crosslora.adapter import LoraFactors
from crosslora.models import load_model
from crosslora.projection.build import Transfer
from crosslora.topology import SPACES


def baseline(
    name: str, transfer: Transfer, source_folder: str, target_folder: str, seed: int
) -> dict[str, LoraFactors]:
    """Factors of `random`, `crop` or `closed_form` (design words: docs/architecture.md)."""
    if name == "crop":
        return transfer.untrained(_crop_maps(transfer)).lora_factors()
    if name == "closed_form":
        return transfer.untrained(transfer.maps).lora_factors()
    factors = transfer.untrained(_normal_maps(transfer, seed)).lora_factors()
    return _with_source_norms(factors, transfer, source_folder, target_folder)


def _crop_maps(transfer: Transfer) -> dict[str, torch.Tensor]:
    """Zero-pad or cut every space."""
    return {
        space: torch.eye(transfer.target.widths[space], transfer.source.widths[space]) for space in SPACES
    }


def _normal_maps(transfer: Transfer, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        space: torch.randn(transfer.target.widths[space], transfer.source.widths[space], generator=generator)
        for space in SPACES
    }


def _with_source_norms(
    factors: dict[str, LoraFactors], transfer: Transfer, source_folder: str, target_folder: str
) -> dict[str, LoraFactors]:
    """Scale each dW_t so that |dW_t| / |W_t| is the source's |dW_s| / |W_s| (mean over the source's linears)."""
    ratio = _source_ratio(transfer, source_folder)
    norms = _weight_norms(target_folder, [*factors])
    scaled = {}
    for path, factor in factors.items():
        own = _product_norm(factor.A, factor.B)
        scale = ratio * norms[path] / own if own else 1.0  # the source's may be zero there
        scaled[path] = LoraFactors(factor.A, factor.B * scale)
    return scaled


def _source_ratio(transfer: Transfer, source_folder: str) -> float:
    updates = torch.stack(
        [
            _product_norm(group.A_s, part.B_s)
            for slot in transfer.slots
            for group in slot.groups
            for part in group.parts
        ]
    )
    norms = _weight_norms(source_folder, [linear.path for linear in transfer.source.linears])
    weights = torch.stack([*norms.values()])
    return float(updates.square().mean().sqrt() / weights.square().mean().sqrt())


def _product_norm(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Frobenius norm of B A without forming it."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt()


def _weight_norms(folder: str, paths: list[str]) -> dict[str, torch.Tensor]:
    """Frobenius norms of linears. By their paths in the model: the names in the files may be older ones."""
    model = load_model(folder, "auto")
    return {path: model.get_parameter(f"{path}.weight").detach().float().norm() for path in paths}
