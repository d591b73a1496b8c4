"""LoRA on vLLM's CPU build by one matrix product per adapter in the batch.

vLLM 0.32 copies the adapter's weights once per token there (benchmarks/synthesis.py compares). A batch holds few adapters, so rows are grouped by adapter instead; the sums are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


def install() -> None:
    """Make vLLM use the grouped form in this process, if it runs on CPU."""
    if current_platform.is_cpu():
        name = f"{GroupedLora.__module__}.{GroupedLora.__name__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)


class GroupedLora(PunicaWrapperCPU):
    """vLLM's CPU wrapper with the linear layers' update computed adapter by adapter."""

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        indices = self.token_lora_indices
        used = [index for index in indices.unique().tolist() if index >= 0]
        whole = len(used) == 1 and bool((indices == used[0]).all())
        self._groups: list[tuple[int, torch.Tensor | None]] = [
            (index, None if whole else (indices == index).nonzero().squeeze(1)) for index in used
        ]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """y [n, sum(output_slices)] += scale * x A^T B^T; each stack is [adapters, 1, r, d_in] or [.., d_out, r]."""
        for index, rows in self._groups:
            own_x = x if rows is None else x[rows]
            start = 0
            for A, B, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                update = (own_x @ A[index, 0].T) @ B[index, 0, :width].T
                out = y[:, start : start + width]
                if rows is None:
                    out.add_(update, alpha=scale)
                else:
                    out.index_add_(0, rows, update, alpha=scale)
                start += width
