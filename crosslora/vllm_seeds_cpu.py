"""Requests with a random seed on vLLM's CPU build.

A step may read only a part of a prompt; what it samples after that part is dropped. For a request with a random seed, vLLM 0.32
then sets the offset of the random generator back, which PyTorch has on GPUs only, so the engine ends. Here the generator
is not used in such a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.platforms import current_platform


def install() -> None:
    """Let requests have random seeds in this process, if it runs on CPU."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    sample_tokens = CPUModelRunner.sample_tokens

    def without_dropped(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        rows = np.nonzero(runner.discard_request_mask.np[: batch.num_reqs])[0].tolist()
        held = {row: batch.generators.pop(row) for row in rows if row in batch.generators}
        try:
            return sample_tokens(runner, *args, **kwargs)
        finally:
            batch.generators.update(held)

    CPUModelRunner.sample_tokens = without_dropped
