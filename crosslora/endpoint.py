"""Bases and their LoRA adapters behind one OpenAI-compatible endpoint: engines in Ray Serve."""

from __future__ import annotations

import errno
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from crosslora import cluster
from crosslora.adapter_places import Found, Places
from crosslora.adapter_watch import Rules
from crosslora.config import Base, Cluster, Dtype
from crosslora.errors import UserError
from crosslora.models import resolve
from crosslora.precision import chosen
from crosslora.replica import MAX_SEQUENCES, BesideEngine, FrontEngine
from crosslora.shelf import REFUSED, Shelf
from crosslora.vllm_settings import environment, lora_options, parallel_options, slots

CPU_BATCHED_TOKENS = 512
"""Tokens per step on CPU: logprobs of a prompt take positions x vocabulary floats (0.5 GB at 262k entries)."""
STOP_SECONDS = 25.0
LONGEST_ANSWER, SHORT_ANSWER = 600.0, 5.0
"""Seconds for which a replica that is stopped goes on with its answers."""
WAIT_SECONDS = Cluster().wait_seconds
APPLICATION = "crosslora"


@dataclass(frozen=True)
class Model:
    """A base and the adapters that lie in places: what one engine serves."""

    base: Base
    places: Places
    rules: Rules
    dtype: Dtype
    max_model_len: int
    chat_template: str | None = None
    """Jinja text or a file; None takes that of the tokenizer."""

    @classmethod
    def of_folders(
        cls, base: Base, name: str, folders: Sequence[Path], dtype: Dtype, max_model_len: int
    ) -> Model:
        """The base as `name`, and PEFT folders each under its own. Raises UserError for one that cannot be served."""
        rules = Rules(name, None, None, limits(folders))
        for folder in folders:
            rules.check(Found(folder.name, folder))
        return cls(base, Places(tuple(map(str, folders))), rules, dtype, max_model_len)


@dataclass(frozen=True)
class Resources:
    """What every replica of every engine gets, and how many there are."""

    num_gpus: float = 0
    """On one node."""
    nodes: int = 1
    """Over which the layers of a base are spread, with `num_gpus` of each."""
    threads: int | None = None
    """CPUs where there is no GPU; None gives each engine an equal share of all."""
    replicas: int = 1
    autoscaling: dict[str, Any] | None = None
    """Ray Serve's settings, in place of `replicas`."""
    wait_seconds: float = WAIT_SECONDS
    """How long to wait for what they need."""

    @property
    def at_least(self) -> int:
        return self.replicas if self.autoscaling is None else max(self.autoscaling.get("min_replicas", 1), 1)

    @property
    def at_most(self) -> int:
        return self.replicas if self.autoscaling is None else self.autoscaling.get("max_replicas", 1)


@dataclass
class Endpoint:
    """A running server. `url` ends in /v1."""

    url: str
    models: list[str]
    """The names that requests may use when it starts; the base first."""
    board: Any
    """On which the shelves say what comes and goes later."""


def limits(folders: Sequence[Path]) -> dict[str, Any]:
    """LoRA options of an engine for these adapters; {} where there is none.

    Raises UserError for a folder that vLLM cannot serve.
    """
    options = lora_options(folders)
    if options:
        options["max_loras"] = slots(len(folders))
    return options


def build(
    models: Sequence[Model],
    resources: Resources,
    api_key: str | None = None,
    lifeline: tuple[str, int] | None = None,
    board: Any = None,
) -> Any:
    """The Ray Serve application: an engine for the first model that takes all requests, and one for a second.

    `lifeline` and `board` belong to the program that starts it here, ends it, and has the places on its own disk.
    """
    options = _replica_options(resources, len(models), goes_on=lifeline is None)
    beside = None
    for number, model in reversed([*enumerate(models)]):
        shelf: Any = Shelf
        shelf = shelf.options(
            name=f"shelf-{number}",
            ray_actor_options={"num_cpus": 0, "resources": cluster.this_node() if lifeline else {}},
        ).bind(model.places, model.rules, board)
        kind: Any = BesideEngine if number else FrontEngine
        engine = kind.options(name=f"vllm-{number}", **options)
        arguments = [_vllm_options(model, resources, api_key), shelf, lifeline]
        beside = engine.bind(*arguments) if number else engine.bind(*arguments, beside)
    return beside


def _replica_options(resources: Resources, engines: int, goes_on: bool) -> dict[str, Any]:
    """How many replicas Ray Serve starts of each engine, and what it gives them. One that is stopped while the endpoint
    `goes_on` finishes its answers."""
    bundles = _bundles(resources, engines)
    cpus = int(bundles[0]["CPU"])
    actor = {
        "num_cpus": cpus,
        "num_gpus": resources.num_gpus if len(bundles) == 1 else 0,  # else its workers have them
        "runtime_env": {"env_vars": environment(cpus, resources.num_gpus)},
    }
    options: dict[str, Any] = {"num_replicas": resources.replicas}
    if resources.autoscaling is not None:
        options = {"autoscaling_config": resources.autoscaling}
    finishes = goes_on or resources.autoscaling is not None
    return {
        "graceful_shutdown_timeout_s": LONGEST_ANSWER if finishes else SHORT_ANSWER,
        "ray_actor_options": actor,
        "placement_group_bundles": bundles,
        "placement_group_strategy": "PACK",
        **options,
    }


def _vllm_options(model: Model, resources: Resources, api_key: str | None) -> dict[str, Any]:
    """Of vLLM's command line."""
    return {
        "model": model.base,
        "served_model_name": [model.rules.model],
        "chat_template": model.chat_template,
        "dtype": chosen(model.dtype, resources.num_gpus > 0),
        "max_model_len": model.max_model_len,
        "max_num_seqs": MAX_SEQUENCES,
        "disable_log_stats": True,
        "api_key": [api_key] if api_key else None,
        "worker_extension_cls": "crosslora.vllm_worker.EndsWithReplica",
        **_device_options(resources),
        **model.rules.lora,
    }


def _device_options(resources: Resources) -> dict[str, Any]:
    if resources.num_gpus:
        return parallel_options(max(int(resources.num_gpus), 1), resources.nodes)
    return {
        "enforce_eager": True,
        "max_num_batched_tokens": CPU_BATCHED_TOKENS,
    }


@contextmanager
def serve_models(
    models: Sequence[Model],
    resources: Resources,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
) -> Iterator[Endpoint]:
    """Serve one or two models until the block is left.

    Every adapter is shown to act before the block is entered; later the places are looked through every few seconds.
    Joins the Ray cluster of this process, or starts one. `port` 0 picks a free one. With `api_key`, requests need it
    as their bearer token. A page to try the models is at `/`. Nothing is left running after the block, nor after this
    process is killed. Raises UserError for a taken port, a folder that cannot be served, an adapter that changes
    nothing, too few resources, and where Ray Serve already runs on the cluster.
    """
    free_port(host, port)  # said before anything heavy starts; Ray may take a port before it is used below
    for model in models:
        resolve(model.base, weights=False)
    with cluster.session(Cluster()), _lifeline() as lifeline, cluster.board() as board:
        app = build(models, resources, api_key, lifeline, board)
        refuse_a_second_server()  # before what the first one holds is waited for
        _require(resources, len(models))
        with _running(app, models, host, free_port(host, port)) as url:
            for event in ray.get(board.take.remote()):
                if event["event"] == REFUSED:
                    raise UserError(f"{event['adapter']}: {event['why']}")
            names = [name for model in models for name in (model.rules.model, *model.places.listed())]
            yield Endpoint(url, names, board)


def refuse_a_second_server() -> None:
    """Raises UserError where Ray Serve already runs on the cluster of this process."""
    if _controller() is not None:
        raise UserError(
            "cluster: Ray Serve already runs there and its port cannot be changed; stop it with `serve shutdown`, "
            "or use another cluster"
        )


def _require(resources: Resources, engines: int) -> None:
    bundles = _bundles(resources, engines)
    count = resources.at_least * engines * len(bundles)
    cluster.require(bundles[0], count, "serving", resources.wait_seconds)


def _bundles(resources: Resources, engines: int) -> list[cluster.Bundle]:
    """The placement group of a replica."""
    if resources.threads:
        gpus = {"GPU": resources.num_gpus} if resources.num_gpus else {}
        return [{"CPU": resources.threads, **gpus}]
    return cluster.engine_bundles(resources.num_gpus, resources.nodes, resources.at_most * engines)


@contextmanager
def _running(app: Any, models: Sequence[Model], host: str, port: int) -> Iterator[str]:
    """Run `app` in Ray Serve, yield its URL, and shut Ray Serve down."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        try:
            serve.run(app, name=APPLICATION)
        except RuntimeError as error:
            raise UserError(_why_not_served(models)) from error
        yield f"http://{host}:{port}/v1"
    finally:
        end_serve()


def _why_not_served(models: Sequence[Model]) -> str:
    deployments = serve.status().applications[APPLICATION].deployments
    messages = {
        number: deployments[name].message
        for number in range(len(models))
        for name in (f"shelf-{number}", f"vllm-{number}")
        if name in deployments and re.search("Error|Exception", deployments[name].message)
    }
    number, message = next(iter(messages.items()), (0, ""))
    last_error = re.split(r"\n(?=[\w.]+(?:Error|Exception): )", message)[-1]
    return (
        f"{models[number].base.base}: vLLM did not start with it ({' '.join(last_error.split())[:300]}); mend that, its "
        "output is in worker-*.out among the logs of Ray's session "
        f"{ray.get_runtime_context().get_session_name()}"
    )


def _controller() -> Any:
    """The actor that runs Ray Serve, or None."""
    with suppress(ValueError):
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    return None


def end_serve() -> None:
    """Shut Ray Serve down and wait until it is gone.

    serve.shutdown() alone would wait in a call that ends with the death of the callee, which Ray prints as a failure.
    """
    controller = _controller()
    if controller is None:
        return
    ray.get(controller.graceful_shutdown.remote(wait=False))
    deadline = time.monotonic() + STOP_SECONDS
    while _controller() is not None and time.monotonic() < deadline:
        time.sleep(0.1)
    serve.shutdown()  # makes this process forget it


@contextmanager
def _lifeline() -> Iterator[tuple[str, int]]:
    """An address of this process. A connection to it ends when this process does, whatever ends it.

    The actors of Ray Serve outlive the program that started them, unless that program also started Ray.
    """
    with socket.create_server((ray.util.get_node_ip_address(), 0)) as server:
        threading.Thread(target=_accept, args=[server], daemon=True).start()
        try:
            yield server.getsockname()[:2]
        finally:
            server.shutdown(socket.SHUT_RDWR)  # or the thread would go on waiting


def _accept(server: socket.socket) -> None:
    """Connections that nobody accepts fill a queue, and then nobody can connect."""
    with suppress(OSError):
        while True:
            threading.Thread(target=_hold, args=[server.accept()[0]], daemon=True).start()


def _hold(connection: socket.socket) -> None:
    """Until the other side ends: it sends nothing."""
    with connection, suppress(OSError):
        connection.recv(1)


def free_port(host: str, port: int) -> int:
    """`port`, or a free one where it is 0; raises UserError where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            way_out = "stop what listens there, or give another port (0 picks a free one)"
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                way_out = "give an IPv4 address of this machine, or its name"
            raise UserError(f"port {port} on {host}: {error.strerror}; {way_out}") from error
        return int(probe.getsockname()[1])
