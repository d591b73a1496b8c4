"""A whole transfer as a job on hosts that share nothing but a network and a disk: no loopback, no ports."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from crosslora.run_folder import RunFolder, stage_states
from tests.nodes import Nodes, network_of_namespaces
from tests.tiny_pair import make_pair, tiny_config


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and ip")
def test_a_transfer_between_network_namespaces(tmp_path: Path) -> None:
    config = tiny_config(make_pair(tmp_path / "pair"), tmp_path / "run", zero_stage=3)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (tmp_path / "link").mkdir()
    with (
        network_of_namespaces(3) as hosts,
        Nodes(tmp_path / "link", head_cpus=0, hosts=hosts, GLOO_SOCKET_IFNAME="eth0") as nodes,
    ):
        nodes.add()
        nodes.add()
        nodes.job("python", "ray_jobs/transfer.py", "--config", file, "cluster.address=auto")
    folder = RunFolder.open(config.run)
    assert set(stage_states(folder).values()) == {"done"}
    assert folder.read_json("evaluate/tiny/results.json")["tasks"]["say"]["n"] == 8
