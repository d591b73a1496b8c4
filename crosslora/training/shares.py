"""ZeRO-3 from the file: every worker takes its share of a base out of the mapped weights, and never holds more."""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel


def keep_share(base: PreTrainedModel, dtype: str, settings: dict[str, Any]) -> None:
    """Of every weight leave this worker's share, in `dtype`, on its device. `settings` are DeepSpeed's."""
    _FromFile(module=base, config_dict_or_path={**settings, "bf16": {"enabled": dtype == "bfloat16"}})
    for buffer in base.buffers():
        buffer.data = buffer.data.to(get_accelerator().current_device_name())


class _FromFile(deepspeed.zero.Init):
    """What zero.Init does to a module that is there, without sending every weight from the first worker to the others:
    all have read the same file."""

    def _zero_init_param(self, param: Any) -> None:
        param.data = param.data.to(self.dtype)
        self._convert_to_deepspeed_param(param)
        param.partition()
