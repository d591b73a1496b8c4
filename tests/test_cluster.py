"""What stages ask of Ray, on two nodes of eight logical GPUs: nothing runs on them, everything is placed."""

import shlex
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from crosslora import cluster
from crosslora.config import Config
from crosslora.errors import UserError
from crosslora.progress import progress
from crosslora.run_folder import RunFolder
from crosslora.teacher import synthesize
from crosslora.training.fit import scaling
from tests.tiny import bare_config

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    nodes = RayCluster(initialize_head=True, head_node_args={"num_cpus": 16, "num_gpus": 8})
    nodes.add_node(num_cpus=16, num_gpus=8)
    # Ray hands this to a shell as it is: a space in the path would end it
    ray.init(nodes.address, runtime_env={"py_executable": shlex.quote(sys.executable)})
    yield
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def config() -> Config:
    return bare_config(
        synthesis={"engines": 2, "tensor_parallel": 8},
        fit={"workers": 16, "batch_size": 16},
        cluster={"gpus_per_engine": 1, "gpus_per_worker": 1, "wait_seconds": 1},
    )


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    class Place:
        """In place of the teacher, which would load vLLM."""

        def __init__(self, *_: Any) -> None:
            pass

        def ready(self, are_answers: bool | None) -> bool:
            return True

        def node(self) -> tuple[str, int]:
            return ray.get_runtime_context().get_node_id(), len(ray.get_gpu_ids())

    monkeypatch.setattr(synthesize, "Teacher", Place)


def test_engines_of_eight_gpus_get_a_node_each(two_nodes: None, places: None) -> None:
    groups = [placement_group(cluster.engine_bundles(8, 1, 2), strategy="PACK") for _ in range(2)]
    engines = [synthesize._actor_class(group).remote() for group in groups]
    nodes, gpus = zip(*ray.get([engine.node.remote() for engine in engines]), strict=True)
    assert gpus == (8, 8) and len(set(nodes)) == 2
    for group in groups:
        remove_placement_group(group)


def test_an_engine_over_two_nodes_has_eight_gpus_of_each(two_nodes: None, places: None) -> None:
    """Its own process has none: vLLM starts a worker in every bundle."""
    group = placement_group(cluster.engine_bundles(8, 2, 1), strategy="PACK")
    engine = synthesize._actor_class(group).remote()
    assert ray.get(engine.node.remote())[1] == 0
    nodes = placement_group_table(group)["bundles_to_node_id"].values()
    assert sorted(Counter(nodes).values()) == [8, 8]
    remove_placement_group(group)


def test_what_others_use_is_waited_for_and_then_named(two_nodes: None) -> None:
    taken = placement_group([{"GPU": 8}])
    assert taken.wait(30) and cluster.is_placed(taken)
    with pytest.raises(
        UserError, match=r"fit waited 2 s for 9 times 1 CPU and 1 GPU, .*; 8 of these are free"
    ):
        cluster.require({"CPU": 1, "GPU": 1}, 9, "fit", wait_seconds=2)
    threading.Timer(1, remove_placement_group, [taken]).start()
    cluster.require({"CPU": 1, "GPU": 1}, 9, "fit", wait_seconds=30)


def test_an_engine_that_waits_for_a_node_gives_up_after_a_time(
    two_nodes: None, places: None, config: Config, tmp_path: Path
) -> None:
    stage = RunFolder.open(str(tmp_path)).stage("synthesize/a", {})
    with cluster.board() as board:
        foreman = synthesize._Foreman(config, tmp_path, stage, [], 1, board)
        (lost,) = foreman.groups
        foreman._end(lost)
        foreman.starting.clear()
        taken = placement_group([{"GPU": 8}] * 2)
        assert taken.wait(30)
        foreman._start()
        with (
            pytest.raises(UserError, match="synthesize waited"),
            progress("synthesize", 8, "samples") as shown,
        ):
            foreman.run(shown)
        foreman.stop()
    states = {group["state"] for group in placement_group_table().values()}
    remove_placement_group(taken)
    assert states == {"CREATED", "REMOVED"}


def test_an_engine_joins_when_there_is_room(
    two_nodes: None, places: None, config: Config, tmp_path: Path
) -> None:
    stage = RunFolder.open(str(tmp_path)).stage("synthesize/a", {})
    with cluster.board() as board:
        foreman = synthesize._Foreman(config, tmp_path, stage, [], 3, board)
        ready, waiting = ray.wait([*foreman.starting], num_returns=2, timeout=60)
        assert len(ready) == 2 and not ray.wait(waiting, timeout=1)[0]
        foreman._end(foreman.starting[ready[0]])
        assert ray.get(waiting, timeout=60) == [True]
        foreman.stop()


def test_three_engines_of_eight_gpus_are_refused_with_what_is_there(two_nodes: None) -> None:
    with pytest.raises(
        UserError,
        match=r"synthesize needs 3 times 1 CPU and 8 GPU, each on one node, .* holds 2 .*\(32 CPU and 16 GPU",
    ):
        cluster.require({"CPU": 1, "GPU": 8}, 3, "synthesize", wait_seconds=1)


def test_a_plan_is_checked_against_the_cluster(two_nodes: None, config: Config) -> None:
    cluster.check(config)
    more = config.model_copy(update={"fit": config.fit.model_copy(update={"workers": 17})})
    with pytest.raises(UserError, match=r"fit needs 17 times 1 CPU and 1 GPU, .* holds 16"):
        cluster.check(more)


def test_a_cluster_that_never_grows_is_checked_for_what_is_to_do(
    two_nodes: None, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before hours of synthesis; which does with fewer engines than it was given."""
    fit = config.fit.model_copy(update={"workers": 17})
    more = config.model_copy(
        update={"fit": fit, "synthesis": config.synthesis.model_copy(update={"engines": 9})}
    )
    cluster.check_here(more, ["synthesize", "fit"])  # another's cluster: an autoscaler may bring nodes
    monkeypatch.setattr(cluster, "_started_here", True)
    cluster.check_here(more, ["synthesize", "evaluate"])
    with pytest.raises(UserError, match=r"fit needs 17 times 1 CPU and 1 GPU, .* holds 16"):
        cluster.check_here(more, ["synthesize", "fit"])


def test_sixteen_workers_fill_both_nodes(two_nodes: None, config: Config) -> None:
    settings = scaling(config.fit.workers, cluster.bundle(config.cluster.gpus_per_worker, 16))
    group = placement_group(
        [settings.resources_per_worker] * settings.num_workers, strategy=settings.placement_strategy
    )
    assert group.wait(30)
    nodes = placement_group_table(group)["bundles_to_node_id"].values()
    assert sorted(Counter(nodes).values()) == [8, 8]
    remove_placement_group(group)


def test_eight_workers_stay_on_one_node(two_nodes: None, config: Config) -> None:
    """ZeRO-3 moves all weights between them."""
    settings = scaling(8, cluster.bundle(1, 8))
    group = placement_group([settings.resources_per_worker] * 8, strategy=settings.placement_strategy)
    assert group.wait(30)
    assert len(set(placement_group_table(group)["bundles_to_node_id"].values())) == 1
    remove_placement_group(group)


@pytest.mark.parametrize(
    ("cpus", "shares", "expected"),
    [
        ([2], 1, 2),
        ([2], 2, 1),
        ([2], 5, 1),
        ([0, 4, 4], 2, 4),
        ([8, 2], 2, 4),
        ([8, 2], 3, 2),
        ([8, 6], 3, 4),
    ],
)
def test_shares_are_as_large_as_the_nodes_allow(
    monkeypatch: pytest.MonkeyPatch, cpus: list[int], shares: int, expected: int
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": n} if n else {}} for n in cpus]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert cluster.cpus_per_share(shares) == expected
