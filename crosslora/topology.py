"""Which linear of a model reads and writes which space, found by building the model on the meta device.

A *role* is what a linear does inside a decoder layer. Roles are told by the leaf names that transformers uses for
them and proven by the shapes that the configuration demands; a linear that fits no role is listed, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from crosslora.errors import UserError

READS = {
    "query": "residual",
    "key": "residual",
    "value": "residual",
    "attention_out": "attention",
    "gate": "residual",
    "up": "residual",
    "down": "mlp",
}
WRITES = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention_out": "residual",
    "gate": "mlp",
    "up": "mlp",
    "down": "residual",
}
SPACES = ("residual", "query", "key", "value", "attention", "mlp")

# Leaf names, each with the roles whose outputs it stacks (more than one: a fused projection).
ROLES_BY_LEAF: dict[str, tuple[str, ...]] = {
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    "o_proj": ("attention_out",),
    "out_proj": ("attention_out",),
    "qkv_proj": ("query", "key", "value"),
    "c_attn": ("query", "key", "value"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "gate_up_proj": ("gate", "up"),
    "fc1": ("up",),
    "c_fc": ("up",),
    "fc2": ("down",),
}


@dataclass(frozen=True)
class Linear:
    """One linear module: path below the causal LM, its roles in output order, and its widths."""

    path: str
    layer: int
    roles: tuple[str, ...]
    widths: tuple[int, ...]
    """Output width of each role; their sum is the module's output width."""
    d_in: int

    @property
    def d_out(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True)
class Topology:
    """The adaptable linears of a model and the widths of its spaces."""

    num_layers: int
    widths: dict[str, int]
    linears: tuple[Linear, ...]
    unknown: tuple[str, ...]
    """Linears inside decoder layers that fit no role."""

    def by_path(self) -> dict[str, Linear]:
        return {linear.path: linear for linear in self.linears}


def meta_model(config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def discover(config: PretrainedConfig) -> Topology:
    """Topology of the causal LM that `config` describes; raises UserError where nothing can be mapped."""
    try:
        text = config.get_text_config()
        if (
            text.model_type == "codegen" or getattr(text, "multi_query", True) is False
        ):  # CodeGen, GPT-BigCode
            raise ValueError("its fused attention stores queries, keys and values in turns, head by head")
        widths = space_widths(text)
        model = meta_model(config)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"base: the layers of a {config.model_type} model are not known ({str(error).splitlines()[0][:200]}); "
            "use a decoder-only transformer"
        ) from error
    prefix = decoder_layers(model, text.num_hidden_layers)
    linears, unknown = [], []
    for path, module in model.named_modules():
        if not path.startswith(prefix + ".") or not isinstance(module, nn.Linear | Conv1D):
            continue
        layer = int(path[len(prefix) + 1 :].split(".")[0])
        linear = _linear(path, layer, module, widths)
        if linear is None:
            unknown.append(path)
        else:
            linears.append(linear)
    if not linears:
        raise UserError(
            f"base: no linear of {type(model).__name__} could be mapped to a space; it has "
            f"{', '.join(_leaves(unknown)) or 'none inside its layers'}; use a decoder-only transformer"
        )
    return Topology(text.num_hidden_layers, widths, tuple(linears), tuple(unknown))


def space_widths(text: PretrainedConfig) -> dict[str, int]:
    """Width of each space, from head counts and sizes in the configuration."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    mlp = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * text.hidden_size
    if not isinstance(mlp, int):
        raise ValueError("its layers have MLPs of different widths")
    return {
        "residual": text.hidden_size,
        "query": heads * head_dim,
        "key": kv_heads * head_dim,
        "value": kv_heads * head_dim,
        "attention": heads * head_dim,
        "mlp": mlp,
    }


def decoder_layers(model: nn.Module, num_layers: int) -> str:
    """Path of the module list that holds the decoder layers."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return path
    raise UserError(
        f"base: {type(model).__name__} has no list of {num_layers} decoder layers; use a decoder-only transformer"
    )


def _linear(path: str, layer: int, module: nn.Module, widths: dict[str, int]) -> Linear | None:
    leaf = path.rpartition(".")[2]
    roles = ROLES_BY_LEAF.get(leaf)
    if leaf == "out_proj" and (
        "attn" not in path or "linear_attn" in path
    ):  # of a convolution or a state space
        return None
    if leaf == "c_proj":  # GPT-2 calls both outputs so: the parent tells them apart
        roles = ("attention_out",) if ".attn." in path else ("down",)
    if roles is None:
        return None
    d_out, d_in = _shape(module)
    expected = tuple(widths[WRITES[role]] for role in roles)
    if d_in != widths[READS[roles[0]]] or d_out != sum(expected):
        return None
    return Linear(path, layer, roles, expected, d_in)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in); Conv1D stores its weight transposed."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _leaves(paths: list[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})
