"""Where the projection starts: closed-form maps that need no data and no training."""

from __future__ import annotations

import torch

from crosslora.topology import SPACES

MOST_SHARED_TOKENS = 20_000
"""Shared tokens used, the most frequent first."""


def residual_map(source_rows: torch.Tensor, target_rows: torch.Tensor) -> torch.Tensor:
    """Orthogonal Procrustes between the embeddings of n shared tokens.

    source_rows [n, d_s], target_rows [n, d_t]. Returns P0 [d_t, d_s], the semi-orthogonal P that maximises
    tr(P E_s^T E_t) (Schoenemann, "A generalized solution of the orthogonal Procrustes problem", 1966).
    """
    U, _, Vh = torch.linalg.svd(_centred(target_rows).T @ _centred(source_rows), full_matrices=False)
    return U @ Vh


def random_map(d_target: int, d_source: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian [d_target, d_source] that keeps the expected norm of what it maps."""
    return torch.randn(d_target, d_source, generator=generator) / d_target**0.5


def start_maps(
    residual: torch.Tensor, source_widths: dict[str, int], target_widths: dict[str, int], random_seed: int
) -> dict[str, torch.Tensor]:
    """P0 of every space: `residual` by Procrustes, the others random (nothing pairs them without data)."""
    generator = torch.Generator().manual_seed(random_seed)
    maps = {space: random_map(target_widths[space], source_widths[space], generator) for space in SPACES[1:]}
    return {"residual": residual, **maps}


def _centred(table: torch.Tensor) -> torch.Tensor:
    return table - table.mean(dim=0, keepdim=True) if len(table) else table
