"""The student: a frozen target base whose linears read the projection's factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from crosslora.errors import UserError
from crosslora.projection.projection import Factors, Projection

LOGITS_TOLERANCE = 0.05
"""Of the largest logit: more than rounding in 16 bits."""


class Student(nn.Module):
    """Target base + transferred adapter.

    The factors are computed once per forward by `projection` and read by hooks on the adapted linears. The linears
    own no parameter of ours, which keeps ZeRO-3 simple: it gathers and frees the base's weights as it always does.
    """

    def __init__(self, base: PreTrainedModel, projection: Projection) -> None:
        super().__init__()
        self.base = base
        self.projection = projection
        self._factors: Factors = {}
        self._dtype = base.dtype
        for slot in projection.slots:
            base.get_submodule(slot.path).register_forward_hook(self._adapt(slot.path))

    def _adapt(self, path: str) -> Any:
        def add_update(
            module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            if not self._factors:
                return output
            A, B = self._factors[path]  # [r, d_in], [d_out, r]
            return output + nn.functional.linear(nn.functional.linear(inputs[0], A), B)

        return add_update

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, T, hidden].

        Rows are padded on the right: under a causal mask no real token sees the padding, so no mask is needed.
        """
        self._factors = {
            path: (A.to(self._dtype), B.to(self._dtype)) for path, (A, B) in self.projection().items()
        }
        output = self.base.base_model(input_ids=ids_BT, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return logits_of(self.base, hidden_ND)


@torch.no_grad()
def check_logits(base: PreTrainedModel) -> None:
    """Raise UserError where `logits_of` is not what the base itself computes."""
    ids = torch.arange(1, 9, device=base.device)[None]
    own = base(input_ids=ids).logits.float()
    ours = logits_of(base, base.base_model(input_ids=ids).last_hidden_state).float()
    if (own - ours).abs().max() > LOGITS_TOLERANCE * own.abs().max():
        raise UserError(
            f"target.base: {type(base).__name__} computes its logits in a way that crosslora does not know; use another base"
        )


def logits_of(base: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits [N, vocabulary] of hidden states [N, hidden], as the base's own forward computes them."""
    logits: torch.Tensor = base.get_output_embeddings()(hidden_ND)
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
