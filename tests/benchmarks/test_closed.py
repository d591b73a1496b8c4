"""Closed forms between a base and itself, where what must come out is known."""

from pathlib import Path

import pytest
import torch

from benchmarks.quality.closed import activation_maps, cross_lora
from crosslora.adapter import Adapter, read_adapter
from crosslora.config import Base
from crosslora.projection.build import Transfer, build_transfer
from crosslora.text.pair import TokenizerPair
from tests.tiny import TEXT, tiny_llama, tiny_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(base=str(tiny_llama(tmp_path_factory.mktemp("tiny") / "base")))


@pytest.fixture(scope="module")
def adapter(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return read_adapter(tiny_lora(tmp_path_factory.mktemp("adapters") / "a", Path(base.base), 1))


@pytest.fixture(scope="module")
def transfer(base: Base, adapter: Adapter) -> Transfer:
    return build_transfer(adapter, base, base, TokenizerPair.load(base, base), 0)


def test_cross_lora_keeps_the_update_but_for_signs_that_mean_nothing(
    base: Base, adapter: Adapter, transfer: Transfer
) -> None:
    moved = cross_lora(transfer, base, base, None)
    other = cross_lora(transfer, base, base, torch.Generator().manual_seed(0))
    assert moved.keys() == adapter.factors.keys()
    for path, factor in adapter.factors.items():
        if factor.A.shape[1] != factor.B.shape[0]:
            continue  # the singular vectors of a square matrix span all of both spaces
        update = factor.B @ factor.A
        torch.testing.assert_close(moved[path].B @ moved[path].A, update, atol=1e-4, rtol=1e-3)
        changed = other[path].B @ other[path].A
        alike = torch.nn.functional.cosine_similarity(changed.flatten(), update.flatten(), dim=0)
        assert alike < 0.6, path
        torch.testing.assert_close(changed.norm(), update.norm(), atol=1e-3, rtol=1e-2)


def test_activations_of_a_base_and_itself_align_by_doing_nothing(base: Base, transfer: Transfer) -> None:
    maps = activation_maps(transfer, base, base, TokenizerPair.load(base, base), TEXT)
    for space, P in maps.items():
        torch.testing.assert_close(P, torch.eye(len(P)), atol=0.05, rtol=0, msg=space)
