"""Rows of a batch get the update of their own adapter; in an engine: tests/teacher/test_engine.py."""

from typing import Any

import pytest
import torch

from crosslora.vllm_lora_cpu import GroupedLora


@pytest.mark.parametrize("whole", [False, True])
def test_every_row_gets_the_update_of_its_own_adapter(whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, generator=generator)
    # two slices of one linear; of each two adapters of rank 3
    stacks = [
        (torch.randn(2, 1, 3, 5, generator=generator), torch.randn(2, 1, width, 3, generator=generator))
        for width in (7, 2)
    ]
    lora: Any = GroupedLora.__new__(GroupedLora)
    lora._groups = [(1, None)] if whole else [(0, torch.tensor([0, 2])), (1, torch.tensor([1]))]
    adapters = [1, 1, 1, 1] if whole else [0, 1, 0, None]
    y = torch.ones(4, 9)
    A, B = zip(*stacks, strict=True)
    lora.add_lora_linear(y, x, A, B, 2.0, (7, 2))
    for row, adapter in enumerate(adapters):
        update = torch.zeros(9)
        if adapter is not None:
            update = torch.cat([2 * B[adapter, 0] @ A[adapter, 0] @ x[row] for A, B in stacks])
        torch.testing.assert_close(y[row], 1 + update)
