"""What runs in the process of a served model. vLLM imports this there by name (`worker_extension_cls`), before it
loads the model; importing it makes vLLM use the grouped form of LoRA, take random seeds, and tell the versions of an
adapter apart."""

from __future__ import annotations

import os
import select
import socket
import threading
from contextlib import suppress
from typing import Any

from vllm.lora.request import LoRARequest

from crosslora import vllm_lora_cpu, vllm_seeds_cpu

vllm_lora_cpu.install()
vllm_seeds_cpu.install()


def _same(request: LoRARequest, other: Any) -> bool:
    return isinstance(other, LoRARequest) and request.lora_int_id == other.lora_int_id


# vLLM 0.32 compares names. While requests of a replaced adapter and of its successor run in one batch, one of the two
# then counts as not used, and a third adapter takes its place: the engine ends.
LoRARequest.__eq__ = _same
LoRARequest.__hash__ = lambda request: hash(request.lora_int_id)


class EndsWithReplica:
    """Mixed into vLLM's workers. Ray does not always end the children of an actor with it."""

    def end_with(self, host: str, pid: int) -> None:
        """End this process when process `pid` of `host` ends, however it does; the engine ends with its workers there."""
        if socket.gethostname() != host:
            return  # a worker on another node, which is an actor of its own
        threading.Thread(target=_end_after, args=[pid], daemon=True).start()


def _end_after(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has ended already
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(1)
