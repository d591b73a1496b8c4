"""ZeRO-3 from the files: every worker copies its share of a base out of the mapped weights, and nothing is sent."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel


def keep_share(base: PreTrainedModel, dtype: str, settings: dict[str, Any]) -> None:
    """Of every weight leave this worker's share, in `dtype`, on its device. `settings` are DeepSpeed's.

    Beside the shares no more than one weight is held at a time, and on CPU none where the files have the dtype.
    """
    _FromFiles(module=base, config_dict_or_path={**settings, "bf16": {"enabled": dtype == "bfloat16"}})
    _restore_embed_scale(base, getattr(torch, dtype))
    for buffer in base.buffers():
        buffer.data = buffer.data.to(get_accelerator().current_device_name())


def _restore_embed_scale(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gemma multiplies its embeddings by a buffer, which was rounded to the dtype of the files."""
    for module in base.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=dtype)


class _FromFiles(deepspeed.zero.Init):
    """What zero.Init does to a module that is there, but for frozen weights, which all workers have read from the same
    files: those are not sent by the first."""

    def _zero_init_param(self, param: Any) -> None:
        # of the projection: deepspeed.initialize shares it out through this object too
        if param.requires_grad:
            super()._zero_init_param(param)
            return
        param.data = param.data.to(self.dtype)
        self._convert_to_deepspeed_param(param)
        param.partition()
