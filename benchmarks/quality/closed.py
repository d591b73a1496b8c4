"""Closed forms of others, to compare with: nothing is learned.

Cross-LoRA (arXiv 2508.05232, eq. 5 to 7) as printed, U_t U_t^T dW_s V_t V_t^T, only type-checks where both linears have
the same shape, which no linear of the pair here has. What is left of it where they differ is

    dW_t = U_t (U_s^T dW_s V_s) V_t^T

with the leading singular vectors of W_s and W_t. Each pair (u_i, v_i) is defined up to a common sign, so that as good a
decomposition of the same weights gives another update: `signs` draws one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.train_adapter import DTYPE
from crosslora.adapter import LoraFactors
from crosslora.config import Base
from crosslora.models import load_model, resolve
from crosslora.projection.build import Transfer
from crosslora.projection.mapping import layer_map
from crosslora.text.alignment import strict_positions
from crosslora.text.pair import TokenizerPair
from crosslora.topology import READS, SPACES, WRITES, Linear, Topology

LEADING = 320
"""Singular vectors: the most of the paper's ablation."""
Weights = dict[str, torch.Tensor]


def cross_lora(
    transfer: Transfer, source: Base, target: Base, signs: torch.Generator | None
) -> dict[str, LoraFactors]:
    """The repaired form; with `signs`, of another decomposition that is as right."""
    source_weights, target_weights = _weights(resolve(source)), _weights(resolve(target))
    by_role = {(linear.layer, linear.roles): linear for linear in transfer.source.linears}
    target_linears = transfer.target.by_path()
    layers = layer_map(transfer.source.num_layers, transfer.target.num_layers)
    factors = {}
    for slot in transfer.slots:
        linear = target_linears[slot.path]
        (group,) = slot.groups  # no linear of these bases is fused
        (part,) = group.parts
        U_s, V_s = _leading(source_weights[by_role[layers[linear.layer], linear.roles].path])
        U_t, V_t = _leading(target_weights[slot.path])
        n = min(U_s.shape[1], U_t.shape[1])
        sign = torch.ones(n)
        if signs is not None:
            sign = torch.randint(2, (n,), generator=signs) * 2.0 - 1.0
        A = (group.A_s @ V_s[:, :n] * sign) @ V_t[:, :n].T  # [r, d_in_target]
        B = U_t[:, :n] @ (sign[:, None] * (U_s[:, :n].T @ part.B_s))  # [d_out_target, r]
        factors[slot.path] = LoraFactors(A.contiguous(), B.contiguous())
    return factors


def _leading(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U [d_out, n], V [d_in, n] of W [d_out, d_in]."""
    U, _, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    return U[:, :LEADING], Vh[:LEADING].T


def _weights(folder: str) -> Weights:
    weights = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                weights[name.removesuffix(".weight")] = tensors.get_tensor(name)
    return weights


def activation_maps(
    transfer: Transfer, source: Base, target: Base, pair: TokenizerPair, texts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Orthogonal Procrustes of every space between what the two bases compute for the same bytes of the same texts, over
    all pairs of layers: P0 [d_target, d_source]."""
    layers = layer_map(transfer.source.num_layers, transfer.target.num_layers)
    models = [load_model(resolve(base), DTYPE) for base in (source, target)]
    sums = {
        space: torch.zeros(transfer.target.widths[space], transfer.source.widths[space]) for space in SPACES
    }
    words = (pair.teacher_words, pair.student_words)
    for text in texts:
        ids = [vocabulary.encode(text) for vocabulary in words]
        ends = [vocabulary.ends(np.array(i)) for vocabulary, i in zip(words, ids, strict=True)]
        rows = strict_positions(*ends)
        ours, theirs = (
            _activations(model, topology, chat.bos_ids, i)
            for model, topology, chat, i in zip(
                models, (transfer.source, transfer.target), (pair.teacher, pair.student), ids, strict=True
            )
        )
        for (layer, place, space), X_t in theirs.items():
            X_s = ours.get((layers[layer], place, space))
            if X_s is not None:
                x, y = X_s[torch.from_numpy(rows[0])], X_t[torch.from_numpy(rows[1])]
                sums[space] += (y - y.mean(0)).T @ (x - x.mean(0))
    return {space: _orthogonal(total) for space, total in sums.items()}


@torch.inference_mode()
def _activations(
    model: Any, topology: Topology, bos: list[int], ids: list[int]
) -> dict[tuple[int, str, str], torch.Tensor]:
    """(layer, what it is of, space) -> float32 [T, width]: inputs and outputs of every linear, at the T ids after BOS."""
    found: dict[tuple[int, str, str], torch.Tensor] = {}

    def keep(linear: Linear) -> Any:
        role = linear.roles[0]

        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found[linear.layer, f"into {role}", READS[role]] = inputs[0][0, len(bos) :].float()
            found[linear.layer, f"out of {role}", WRITES[role]] = output[0, len(bos) :].float()

        return hook

    hooks = [
        model.get_submodule(linear.path).register_forward_hook(keep(linear)) for linear in topology.linears
    ]
    model.base_model(input_ids=torch.tensor([bos + ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _orthogonal(total: torch.Tensor) -> torch.Tensor:
    U, _, Vh = torch.linalg.svd(total, full_matrices=False)
    return U @ Vh
