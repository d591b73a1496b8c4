"""What runs in the process of a served model. vLLM imports this there by name (`worker_extension_cls`), before it
loads the model; importing it makes vLLM use the grouped form of LoRA, and take random seeds."""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress

from crosslora import vllm_lora_cpu, vllm_seeds_cpu

vllm_lora_cpu.install()
vllm_seeds_cpu.install()


class EndsWithReplica:
    """Mixed into vLLM's workers. Ray does not always end the children of an actor with it."""

    def end_with(self, pid: int) -> None:
        """End this process when process `pid` ends, however it does; the engine ends with its workers."""
        threading.Thread(target=_end_after, args=[pid], daemon=True).start()


def _end_after(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has ended already
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(1)
