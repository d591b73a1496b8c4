"""A Ray cluster of several nodes on this machine, each a real `ray start`; nodes come and are lost.

They share this machine's loopback, or live in network namespaces of their own.
"""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType

import psutil

from crosslora.endpoint import free_port

ROOT = Path(__file__).parent.parent


NETWORK = "10.213.71"


@dataclass(frozen=True)
class Host:
    address: str
    inside: tuple[str, ...] = ()
    """What runs a command there."""


class Nodes:
    """The head runs jobs, and work only with `head_cpus`.

    Every node gets the next of `hosts` and so an address of its own: a job's driver belongs to a node that has its
    machine's address, whichever it finds. `ray start` does not quote the path of its Python: a link in `folder` leads around a space in it.
    """

    def __init__(
        self, folder: Path, head_cpus: int, hosts: Iterator[Host] | None = None, **environment: str
    ) -> None:
        self._folder = folder
        self._hosts = hosts or (Host(f"127.0.0.{n}") for n in count(1))
        head_host = next(self._hosts)
        (folder / "environment").symlink_to(sys.prefix)
        programs = folder / "environment" / "bin"
        self._ray: list[str | Path] = [programs / "python", "-m", "ray.scripts.scripts"]
        self._port, jobs = _port(), _port()
        self._environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RAY_API_SERVER_ADDRESS": f"http://{head_host.address}:{jobs}",
            "RAY_DASHBOARD_ADDRESS": f"http://{head_host.address}:{jobs}",  # of `serve`
            "NO_PROXY": f"{os.environ.get('NO_PROXY', 'localhost')},{head_host.address}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
            **environment,
        }
        self._head = f"{head_host.address}:{self._port}"
        head = ["--head", f"--port={self._port}", f"--dashboard-port={jobs}", "--disable-usage-stats"]
        head.append(f"--dashboard-host={head_host.address}")
        self._nodes = [self._start(head_host, *head, f"--num-cpus={head_cpus}")]

    def __enter__(self) -> "Nodes":
        deadline = time.monotonic() + 120
        while True:
            with suppress(subprocess.CalledProcessError):
                self.job("true")
                return self
            assert time.monotonic() < deadline, "the cluster runs no jobs"
            time.sleep(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in reversed(self._nodes):
            node.terminate()
            node.wait()

    def add(self, cpus: int = 1) -> None:
        self._nodes.append(self._start(next(self._hosts), f"--address={self._head}", f"--num-cpus={cpus}"))

    def job(self, *command: str | Path) -> None:
        """Run a job from the checkout to its end; raises CalledProcessError where it fails."""
        job = self.begin_job(*command)
        if code := job.wait():
            raise subprocess.CalledProcessError(code, command)

    def begin_job(
        self, *command: str | Path, environment: Sequence[str] = ("--working-dir", ".")
    ) -> "subprocess.Popen[bytes]":
        """`ray job submit`, which ends with the job and fails with it."""
        self._last_job = f"job-{uuid.uuid4().hex}"
        options = [*environment, "--submission-id", self._last_job]
        arguments: list[str | Path] = [*self._ray, "job", "submit", *options, "--", *command]
        return subprocess.Popen(arguments, env=self._environment, cwd=ROOT)

    def ask(self, command: str) -> str:
        """What `ray job logs` or `ray job status` (with the end of the log where it failed) says of the last job."""
        asked = [*self._ray, "job", command, self._last_job]
        return subprocess.run(
            asked, env=self._environment, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout

    def stop_job(self) -> None:
        """`ray job stop` for the last one."""
        subprocess.run(
            [*self._ray, "job", "stop", self._last_job], env=self._environment, cwd=ROOT, check=True
        )

    def serve(self, *arguments: str | Path) -> None:
        """Ray Serve's own command, `serve`."""
        program: list[str | Path] = [self._ray[0], "-m", "ray.serve.scripts"]
        subprocess.run([*program, *arguments], env=self._environment, cwd=ROOT, check=True)

    def lose_node_of(self, process: str) -> None:
        """Kill a node on which a process of that name runs, and everything on it.

        Ray names a process after what it does at the moment: between two calls it has no method's name.
        """
        for _ in range(1000):
            for node in self._nodes[1:]:
                processes = [node, *psutil.Process(node.pid).children(recursive=True)]
                if any(process in _name(p.pid) for p in processes[1:]):
                    for p in processes:
                        with suppress(psutil.NoSuchProcess):
                            p.kill()
                    node.wait()
                    self._nodes.remove(node)
                    return
            time.sleep(0.01)
        raise AssertionError(f"no node but the head runs {process}")

    def _start(self, host: Host, *options: str) -> "subprocess.Popen[bytes]":
        """One after the other: nodes that start at the same time choose the same sockets."""
        # Without a port of its own the agent that starts jobs gives up where another Ray still holds the usual one.
        agent = f"--dashboard-agent-listen-port={_port()}"
        address = f"--node-ip-address={host.address}"
        command: list[str | Path] = [*host.inside, *self._ray, "start", "--block", agent, address, *options]
        log = self._folder / f"{uuid.uuid4().hex}.log"
        with log.open("wb") as file:
            node = subprocess.Popen(command, env=self._environment, cwd=ROOT, stdout=file, stderr=file)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return node


@contextmanager
def network_of_namespaces(size: int) -> Iterator[Iterator[Host]]:
    """Hosts that only share a bridge: each has its own loopback, ports and address. Needs root."""
    tag = uuid.uuid4().hex[:6]
    bridge, spaces = f"br{tag}", [f"host{n}-{tag}" for n in range(size)]
    try:
        _ip(f"link add {bridge} type bridge")
        _ip(f"addr add {NETWORK}.1/24 dev {bridge}")
        _ip(f"link set {bridge} up")
        for number, space in enumerate(spaces):
            _ip(f"netns add {space}")
            _ip(f"link add v{number}{tag} type veth peer name eth0 netns {space}")
            _ip(f"link set v{number}{tag} master {bridge} up")
            _ip(f"-n {space} addr add {NETWORK}.{number + 10}/24 dev eth0")
            _ip(f"-n {space} link set eth0 up")
            _ip(f"-n {space} link set lo up")
            _ip(f"-n {space} route add default via {NETWORK}.1")
        inside = (["ip", "netns", "exec", space] for space in spaces)
        yield (Host(f"{NETWORK}.{n + 10}", tuple(command)) for n, command in enumerate(inside))
    finally:
        for space in spaces:
            _ip(f"netns del {space}", check=False)
        _ip(f"link del {bridge}", check=False)


def _ip(arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments.split()], check=check)


def _port() -> int:
    return free_port("127.0.0.1", 0)


def _name(pid: int) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(psutil.Process(pid).cmdline())
    return ""
