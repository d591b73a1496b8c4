"""Several adapters in one projection."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.quality import pair
from benchmarks.quality.pair import Together, from_maps, outside
from crosslora.adapter import read_adapter
from crosslora.config import Base
from crosslora.projection.build import Transfer, build_transfer
from crosslora.text.pair import TokenizerPair
from tests.tiny import tiny_llama, tiny_lora


@pytest.fixture(scope="module")
def transfers(tmp_path_factory: pytest.TempPathFactory) -> list[Transfer]:
    """Of two adapters of one pair."""
    folder = tmp_path_factory.mktemp("tiny")
    base = Base(base=str(tiny_llama(folder / "base")))
    tokenizers = TokenizerPair.load(base, base)
    adapters = [
        read_adapter(tiny_lora(folder / name, Path(base.base), seed)) for seed, name in enumerate("ab")
    ]
    return [build_transfer(adapter, base, base, tokenizers, 0) for adapter in adapters]


def test_maps_that_were_learned_together_give_each_adapter_what_it_had(
    transfers: list[Transfer], tmp_path: Path
) -> None:
    together = Together(transfers)
    generator = torch.Generator().manual_seed(1)
    for parameter in together.parameters():
        parameter.data.normal_(generator=generator)
    save_file(together.maps(transfers[0].maps), tmp_path / "maps.safetensors")
    given = []
    for together.active, transfer in enumerate(transfers):
        factors = together()
        given.append(factors)
        alone = from_maps(tmp_path / "maps.safetensors", False, transfer, 0)()
        assert alone.keys() == factors.keys()
        for path, (A, B) in factors.items():
            torch.testing.assert_close(alone[path][0], A, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(alone[path][1], B, atol=1e-4, rtol=1e-4)
    path = next(iter(given[0]))
    assert not torch.allclose(given[0][path][0], given[1][path][0])


def test_what_lies_outside_the_span(transfers: list[Transfer]) -> None:
    one, other = transfers
    assert set(outside(one, [one]).values()) == {0.0}
    assert max(outside(one, [other]).values()) > 0.1


def test_committed_results_are_of_tasks_that_there_are() -> None:
    for entry in json.loads(pair.RESULTS.read_text()):
        assert {entry["held_out"], *entry["fitted"]} == set(pair.TASKS)
        assert all(max(map(int, curve)) == pair.STEPS for curve in entry["starts"].values())
