"""Ray: joined or started in this process, and what a stage needs of it."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from crosslora.config import Cluster, Config
from crosslora.errors import UserError

OBJECT_STORE_BYTES = 512 << 20
"""Enough for a shard in flight; Ray's own default takes a third of the memory."""
KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""Environment of a process that computes on CPU: glibc gives every chunk of logits back to the kernel and asks for it
again, zeroed. A fit worker spent most of its time there, vLLM a tenth."""
LARGE_BLOCK = 32 << 20
"""Bytes."""
_started_here = False
"""Whether the cluster lives in this process: then it never gets more nodes."""


def fit_environment(zero_stage: int) -> dict[str, str]:
    """KEEP_FREED_MEMORY for a fit worker. ZeRO-3 gathers and frees every weight again and again: large blocks go back to
    the kernel there, or the heap would be full of holes of their size (Gemma 3 270M took seven times its own)."""
    if zero_stage < 3:
        return KEEP_FREED_MEMORY
    kept = {name: value for name, value in KEEP_FREED_MEMORY.items() if name != "MALLOC_MMAP_MAX_"}
    return {**kept, "MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK)}


@contextmanager
def session(settings: Cluster) -> Iterator[None]:
    """Connect to the cluster that the configuration names; start one here where it names none, and stop it after."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address is None:
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        # Ray hands this to a shell as it is, and its own default is not quoted: a space in it would end the path.
        options |= {"runtime_env": {"py_executable": shlex.quote(sys.executable)}}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"cluster.address: no Ray cluster answers at {address!r} (from the configuration or RAY_ADDRESS); start one "
            "with `ray start --head`, or leave it out to start one in this process"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"cluster.address: the Ray cluster at {address!r} cannot be joined ({str(error).splitlines()[0]}); use the "
            "same versions of Python and Ray as its nodes, or submit the transfer as a job"
        ) from error
    global _started_here
    _started_here = address is None
    try:
        yield
    finally:
        _started_here = False
        ray.shutdown()


def cpus_per_share(shares: int) -> int:
    """The most CPUs c, at least 1, such that the nodes together hold `shares` parts of c; a part lies on one node."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return next((c for c in range(max(nodes, default=0), 1, -1) if sum(n // c for n in nodes) >= shares), 1)


def cpus_beside(gpus: float, shares: int) -> int:
    """CPUs of a process with `gpus` of which there are `shares`: one drives a GPU, without one it gets its share."""
    return 1 if gpus else cpus_per_share(shares)


def require(bundle: dict[str, float], count: int, stage: str, wait_seconds: float) -> None:
    """Wait until the nodes hold `count` times `bundle` (CPU, GPU), each on one node; an autoscaler is asked for them.

    Raises UserError that says needed against available.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    bundle = {name: amount for name, amount in bundle.items() if amount}
    deadline = time.monotonic() + wait_seconds
    try:
        while (held := _held(bundle)) < count and time.monotonic() < deadline and not _started_here:
            # again and again: the cluster keeps one request, of whoever was last
            request_resources(bundles=[bundle] * count)
            time.sleep(2)
    finally:
        if not _started_here and wait_seconds:
            request_resources(bundles=[])  # what the stage starts is its own demand
    if held < count:
        have = _amounts({name: ray.cluster_resources().get(name, 0) for name in bundle})
        raise UserError(
            f"cluster: {stage} needs {count} times {_amounts(bundle)}, each on one node, and the Ray cluster holds "
            f"{held} of these ({have} in all); add nodes, or ask for less (synthesis.engines, "
            "synthesis.tensor_parallel, fit.workers, cluster.gpus_per_*; of `serve` --replicas, --gpus, --threads)"
        )


def check(config: Config) -> None:
    """Raise UserError where the connected cluster, as it is now, cannot hold a stage of the transfer."""
    engine = config.synthesis.tensor_parallel * config.cluster.gpus_per_engine
    for stage, count, gpus in (
        ("synthesize", config.synthesis.engines, engine),
        ("fit", config.fit.workers, config.cluster.gpus_per_worker),
        ("evaluate", 1, engine),
    ):
        require({"CPU": cpus_beside(gpus, count), "GPU": gpus}, count, stage, wait_seconds=0)


def _held(bundle: dict[str, float]) -> int:
    """How many times the nodes hold the bundle, when nothing else runs."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(int(node.get(name, 0) / amount + 1e-9) for name, amount in bundle.items()) for node in nodes
    )


def _amounts(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def this_node() -> dict[str, float]:
    """A resource that only the node of this process has."""
    import ray

    return {f"node:{ray.util.get_node_ip_address()}": 0.001}


class Board:
    """An actor on which workers write what happens and from which the driver reads it."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def add(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events


@contextmanager
def board() -> Iterator[Any]:
    """A Board that ends with the block, on this process's node: it is lost with this process, not with some other node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    try:
        yield actor
    finally:
        ray.kill(actor)
