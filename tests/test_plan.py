"""What of an adapter cannot reach the target is said before any work."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig

from crosslora import plan
from crosslora.adapter import read_adapter, write_adapter
from crosslora.config import Base, Config
from crosslora.errors import UserError
from crosslora.plan import make_plan
from crosslora.topology import Topology, discover
from tests.tiny import bare_config, byte_level_tokenizer, tiny_gemma, tiny_llama, tiny_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    tiny_llama(folder / "source")
    tiny_gemma(folder / "target")
    tiny_lora(folder / "whole", folder / "source")
    return folder


def config_of(folder: Path, leaf: str, rank: int = 4) -> Config:
    """An adapter of those linears whose path ends so."""
    factors = {
        path: type(pair)(pair.A.repeat(rank // 4, 1), pair.B.repeat(1, rank // 4))
        for path, pair in read_adapter(folder / "whole").factors.items()
        if path.endswith(leaf)
    }
    write_adapter(folder / leaf, factors, str(folder / "source"))
    return bare_config(
        source={"base": str(folder / "source")},
        target={"base": str(folder / "target")},
        adapters=[{"name": "mine", "path": str(folder / leaf)}],
    )


def test_an_adapter_of_layers_that_feed_no_layer_is_refused(folder: Path) -> None:
    assert make_plan(config_of(folder, "o_proj")).layer_map == [0, 2, 3]
    with pytest.raises(UserError, match="nothing of it reaches the target; it changes gate of layers 1"):
        make_plan(config_of(folder, "layers.1.mlp.gate_proj"))


def test_an_engine_on_cpu_has_the_cache_that_it_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, taken = config_of(folder, "o_proj"), []
    for gib in ("1", "3"):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", gib)
        memory = make_plan(config).memory_gigabytes
        taken.append([memory["synthesize, per engine"], memory["evaluate, per engine"]])
    assert [b - a for a, b in zip(*taken, strict=True)] == pytest.approx([2 * 2**30 / 1e9] * 2, abs=0.011)


def without_mlp(config: PretrainedConfig) -> Topology:
    found = discover(config)
    kept = tuple(linear for linear in found.linears if "mlp" not in linear.path)
    return Topology(found.num_layers, found.widths, kept, found.unknown)


def test_linears_that_the_target_has_not_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder, "_proj")
    assert not make_plan(config).warnings
    monkeypatch.setattr(
        plan, "discover", lambda c: without_mlp(c) if c.model_type != "llama" else discover(c)
    )
    (warning,) = make_plan(config).warnings
    assert "down, gate, up of the source" in warning
    with pytest.raises(UserError, match="nothing of it reaches the target"):
        make_plan(config_of(folder, "up_proj"))


def test_a_rank_that_cannot_be_served_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"q_proj of the target \(query\) would get rank 516"):
        make_plan(config_of(folder, "q_proj", rank=516))


def test_a_fused_linear_of_the_target_takes_the_ranks_of_all_that_feed_it(folder: Path) -> None:
    tokenizer = byte_level_tokenizer()
    sizes: Any = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "fused")
    tokenizer.save_pretrained(folder / "fused")
    config = config_of(folder, "_proj")
    unfused = make_plan(config).adapters[0]
    fused = make_plan(config.model_copy(update={"target": Base(base=str(folder / "fused"))})).adapters[0]
    assert (unfused.rank, unfused.target_rank) == (4, 4)
    assert (fused.rank, fused.target_rank) == (4, 12), "query, key and value"


def test_linears_of_no_known_role_are_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "discover", lambda c: replace(discover(c), unknown=("model.router",)))
    assert make_plan(config_of(folder, "_proj")).unmapped_modules == ["model.router"]
