"""Roles are found from the model itself, and proven by its shapes."""

from pathlib import Path

import pytest
from transformers import (
    AutoConfig,
    BertConfig,
    CodeGenConfig,
    Gemma3nTextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    Lfm2Config,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    T5Config,
)

from crosslora.errors import UserError
from crosslora.projection.mapping import layer_map
from crosslora.topology import discover
from tests.tiny import tiny_gemma, tiny_llama


def test_llama_and_gemma(tmp_path: Path) -> None:
    for build in (tiny_llama, tiny_gemma):
        build(tmp_path / build.__name__)
        config = AutoConfig.from_pretrained(tmp_path / build.__name__)
        topology = discover(config)
        assert len(topology.linears) == 7 * config.num_hidden_layers and not topology.unknown
        assert topology.widths["key"] == config.num_key_value_heads * config.head_dim


def test_fused_projections_are_told_by_their_parts() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    topology = discover(Phi3Config(**sizes, num_key_value_heads=2, vocab_size=64, pad_token_id=0))
    by_leaf = {linear.path.rpartition(".")[2]: linear for linear in topology.linears}
    assert by_leaf["qkv_proj"].roles == ("query", "key", "value") and by_leaf["qkv_proj"].widths == (
        32,
        16,
        16,
    )
    assert by_leaf["gate_up_proj"].roles == ("gate", "up")


@pytest.mark.parametrize("config", [T5Config(num_layers=1), MambaConfig(num_hidden_layers=1)])
def test_other_kinds_of_model_are_refused(config: PretrainedConfig) -> None:
    with pytest.raises(UserError, match=rf"a {config.model_type} model .*decoder-only transformer"):
        discover(config)


def test_an_output_that_is_not_of_attention_fits_no_role() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Lfm2Config(
        **sizes, num_hidden_layers=2, vocab_size=64, layer_types=["conv", "full_attention"], pad_token_id=0
    )
    topology = discover(config)
    outputs = [linear.path for linear in topology.linears if linear.roles == ("attention_out",)]
    assert outputs == ["model.layers.1.self_attn.out_proj"]
    assert "model.layers.0.conv.out_proj" in topology.unknown


@pytest.mark.parametrize(
    "config", [GPTBigCodeConfig(n_layer=1, multi_query=False), CodeGenConfig(n_layer=1, vocab_size=64)]
)
def test_heads_in_turns_are_refused(config: PretrainedConfig) -> None:
    with pytest.raises(UserError, match="in turns, head by head"):
        discover(config)


def test_layers_of_different_widths_are_refused() -> None:
    config = Gemma3nTextConfig(num_hidden_layers=5, intermediate_size=[32] * 4 + [64], vocab_size=64)
    with pytest.raises(UserError, match="MLPs of different widths"):
        discover(config)


def test_gpt2_stores_its_weights_transposed() -> None:
    topology = discover(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))
    assert {linear.roles for linear in topology.linears} == {
        ("query", "key", "value"), ("attention_out",), ("up",), ("down",),
    }  # fmt: skip


def test_what_cannot_be_mapped_is_refused() -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, is_decoder=True
    )
    with pytest.raises(UserError, match=r"no linear of BertLMHeadModel could be mapped.*query"):
        discover(config)


def test_the_layer_map_keeps_the_order_and_the_ends() -> None:
    pi = layer_map(30, 18)
    assert pi == sorted(pi) and (pi[0], pi[-1], len(pi)) == (0, 29, 18)
    assert layer_map(18, 30) == sorted(layer_map(18, 30))
    assert layer_map(5, 1) == [0]


def test_experts_are_not_moved() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=64)
    roles = {role for linear in discover(config).linears for role in linear.roles}
    assert roles == {"query", "key", "value", "attention_out"}
