"""A small adapter in a folder, and ways to spoil it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from crosslora.adapter import LoraFactors, read_adapter, write_adapter
from crosslora.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0, UP1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def tiny_llama() -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2)).eval()


def random_factors(ranks: dict[str, int], base: Any) -> dict[str, LoraFactors]:
    shapes = {name: base.get_submodule(name).weight.shape for name in ranks}
    return {
        name: LoraFactors(A=torch.randn(rank, shapes[name][1]), B=torch.randn(shapes[name][0], rank) * 0.1)
        for name, rank in ranks.items()
    }


@cache
def _saved() -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        write_adapter(folder, random_factors({Q0: 2, UP1: 2}, tiny_llama()), "base")
        return {name: (Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def saved_adapter(folder: Path) -> Path:
    """An adapter of rank 2 on Q0 and UP1, written there."""
    for name, content in _saved().items():
        (folder / name).write_bytes(content)
    return folder


def edit(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def a_key(module: str) -> str:
    return f"base_model.model.{module}.lora_A.weight"


def b_key(module: str) -> str:
    return f"base_model.model.{module}.lora_B.weight"


def ranks(folder: Path) -> dict[str, int]:
    return {module: pair.rank for module, pair in read_adapter(folder).factors.items()}


def refused(folder: Path) -> str:
    """The message of the refusal; it is one line that says a way out after a semicolon."""
    with pytest.raises(UserError) as error:
        read_adapter(folder)
    message = str(error.value)
    assert str(folder) in message and "; " in message and "\n" not in message
    return message
