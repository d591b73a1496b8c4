"""Ray: joined or started in this process, and what a stage needs of it."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from crosslora.config import Cluster, Config
from crosslora.errors import UserError

if TYPE_CHECKING:  # Ray takes a second to import
    from ray.util.placement_group import PlacementGroup

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
LARGE_BLOCK = 1 << 20
"""Bytes."""
SECONDS_BETWEEN_LOOKS = 1.0
LESS = (
    "synthesis.engines, synthesis.tensor_parallel, fit.workers, cluster.gpus_per_*; of `serve` --replicas, --gpus, "
    "--threads"
)
"""Settings that say how much is asked for."""
Bundle = dict[str, float]
"""Amounts of CPU and GPU that lie on one node."""
_started_here = False
"""Whether the cluster lives in this process: then it never gets more nodes."""


def fit_environment(zero_stage: int, checkpointing: bool) -> dict[str, str]:
    """KEEP_FREED_MEMORY for a fit worker. Where memory is what is short, large blocks go back to the kernel: ZeRO-3 gathers
    and frees every weight again and again, checkpointing every layer's activations, and the heap would be full of holes
    of their size (Gemma 3 270M took seven times its own with ZeRO-3)."""
    if zero_stage < 3 and not checkpointing:
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


def bundle(gpus: float, shares: int) -> Bundle:
    """Of a process of which there are `shares`: one CPU drives its GPUs, without them it gets its share of the CPUs."""
    return {"CPU": 1, "GPU": gpus} if gpus else {"CPU": cpus_per_share(shares)}


def require(wanted: Bundle, count: int, stage: str, wait_seconds: float) -> None:
    """Wait until `count` times `wanted` are free, each on one node; an autoscaler is asked for them.

    Raises UserError that says needed against available.
    """
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + wait_seconds
    try:
        while _held(wanted, _free()) < count and time.monotonic() < deadline:
            if _started_here:
                _refuse_unless_held(wanted, count, stage)  # it never gets more nodes
            else:  # again and again: the cluster keeps one request, of whoever was last
                request_resources(bundles=[wanted] * count)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        if not _started_here:
            request_resources(bundles=[])  # what the stage starts is its own demand
    _refuse_unless_held(wanted, count, stage)
    if (free := _held(wanted, _free())) < count:
        raise UserError(
            f"cluster: {stage} waited {wait_seconds:g} s for {count} times {_amounts(wanted)}, each on one node; {free} "
            "of these are free, the rest is in use by others (`ray status` shows it); end what else runs there, raise "
            f"cluster.wait_seconds, or ask for less ({LESS})"
        )


def _refuse_unless_held(wanted: Bundle, count: int, stage: str) -> None:
    """Raise UserError where the nodes would not do even if nothing else ran."""
    import ray

    if (held := _held(wanted, _nodes())) < count:
        have = _amounts({name: ray.cluster_resources().get(name, 0) for name in wanted})
        raise UserError(
            f"cluster: {stage} needs {count} times {_amounts(wanted)}, each on one node, and the Ray cluster holds "
            f"{held} of these ({have} in all); add nodes, or ask for less ({LESS})"
        )


def check(config: Config) -> None:
    """Raise UserError where the connected cluster, as it is now, cannot hold a stage of the transfer."""
    _check(config, config.synthesis.engines, ("synthesize", "fit", "evaluate"))


def check_here(config: Config, stages: Collection[str]) -> None:
    """Raise UserError where a cluster that was started here cannot hold one of these stages: it never gets more nodes.
    Synthesis does with one engine."""
    if _started_here:
        _check(config, 1, stages)


def _check(config: Config, engines: int, stages: Collection[str]) -> None:
    gpus, nodes = config.gpus_per_engine_and_node, config.synthesis.pipeline_parallel
    worker = bundle(config.cluster.gpus_per_worker, config.fit.workers)
    for stage, count, bundles in (
        ("synthesize", engines, engine_bundles(gpus, nodes, engines)),
        ("fit", config.fit.workers, [worker]),
        ("evaluate", 1, engine_bundles(gpus, nodes, 1)),
    ):
        if stage in stages:
            _refuse_unless_held(bundles[0], count * len(bundles), stage)


def engine_bundles(gpus: float, nodes: int, shares: int) -> list[Bundle]:
    """The placement group of a vLLM engine, one of `shares`: `gpus` of one node; or, with so many of each of several
    nodes, a bundle for every GPU, as vLLM's workers on Ray want it."""
    return [bundle(gpus, shares)] if nodes == 1 else [bundle(1, shares)] * int(gpus * nodes)


def is_placed(group: PlacementGroup) -> bool:
    """Whether nodes hold all of it now."""
    from ray.util.placement_group import placement_group_table

    return bool(placement_group_table(group)["state"] == "CREATED")


def _held(wanted: Bundle, nodes: Iterable[Bundle]) -> int:
    """How many times the nodes hold what is wanted."""
    return sum(
        min(int(node.get(name, 0) / amount + 1e-9) for name, amount in wanted.items()) for node in nodes
    )


def _nodes() -> list[Bundle]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _free() -> list[Bundle]:
    from ray._private.state import available_resources_per_node  # Ray's public call has only their sum

    return list(available_resources_per_node().values())


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
