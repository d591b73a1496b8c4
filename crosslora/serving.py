"""One base and any number of its LoRA adapters behind an OpenAI-compatible endpoint: replicas in Ray Serve."""

from __future__ import annotations

import json
import logging
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from crosslora import cluster
from crosslora.config import Base, Cluster
from crosslora.errors import UserError
from crosslora.models import resolve
from crosslora.replica import DEPLOYMENT, MAX_SEQUENCES, VllmServer
from crosslora.shelf import Files, Shelf
from crosslora.vllm_settings import environment, lora_options

CPU_BATCHED_TOKENS = 512
"""Tokens per step on CPU: logprobs of a prompt take positions x vocabulary floats (0.5 GB at 262k entries)."""
STOP_SECONDS = 25.0
WAIT_SECONDS = Cluster().wait_seconds
APPLICATION = "crosslora"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
ADOPTION_SECONDS = PROBE_SECONDS = 60.0
LEAST_SLOTS = 4
"""Adapters that run in one batch; those beyond take turns."""
PROBE = "The quick brown fox jumps over the lazy dog."


@dataclass
class Endpoint:
    """A running server. `url` ends in /v1; requests may name the base or one of `adapters`."""

    url: str
    base: str
    shelf: Any
    replicas: int
    api_key: str | None
    limits: dict[str, Any]
    """LoRA options that the engines were started with."""
    adapters: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """The names that requests may use, the base first."""
        return [self.base, *self.adapters]

    def change(self, put: dict[str, Path], remove: Sequence[str] = ()) -> None:
        """Serve the PEFT folders `put` too, under their keys, and no longer those named in `remove`.

        Returns when all replicas do and every new adapter was seen to act; requests that run are finished as they
        began. Raises UserError for an adapter that cannot be served or changes nothing: then none of `put` is.
        """
        for name, path in put.items():
            self._check_fits(name, path)
        files = {name: _files(path, *ADAPTER) for name, path in put.items()}
        try:
            self._reach(files, remove)
        except UserError:
            ray.get(self.shelf.change.remote({}, [*put]))
            raise
        self.adapters = [name for name in self.adapters if name not in (*put, *remove)] + [*put]
        if not put:
            return
        try:
            _check_adapters_act(self.url, self.base, put, self.api_key)
        except (UserError, OSError, HTTPException):
            self.adapters = [name for name in self.adapters if name not in put]
            self._reach({}, [*put])
            raise

    def _reach(self, put: dict[str, Files], remove: Sequence[str]) -> None:
        version = ray.get(self.shelf.change.remote(put, list(remove)))
        if not ray.get(self.shelf.adopted_by.remote(self.replicas, version, ADOPTION_SECONDS)):
            raise UserError(
                f"serving: fewer than {self.replicas} replicas took the change of adapters within "
                f"{ADOPTION_SECONDS:.0f} s; see `ray status`, one may be starting again"
            )

    def _check_fits(self, name: str, path: Path) -> None:
        if name == self.base:
            raise UserError(
                f"adapters: {name!r} is the name of the base as well; give the adapter another name"
            )
        needed = lora_options([path])
        rank, modules = self.limits.get("max_lora_rank", 0), self.limits.get("lora_target_modules", [])
        if needed["max_lora_rank"] > rank or not set(needed["lora_target_modules"]) <= set(modules):
            raise UserError(
                f"{path}: does not fit what this server was started for (rank up to {rank}, modules "
                f"{', '.join(modules) or 'none'}); start it again with this adapter"
            )


@contextmanager
def serve_models(
    base: Base,
    name: str,
    adapters: dict[str, Path],
    *,
    dtype: str,
    max_model_len: int,
    host: str = "127.0.0.1",
    port: int = 0,
    chat_template: str | Path | None = None,
    tokenizer: Path | None = None,
    num_gpus: float = 0,
    threads: int | None = None,
    replicas: int = 1,
    wait_seconds: float = WAIT_SECONDS,
    api_key: str | None = None,
) -> Iterator[Endpoint]:
    """Serve `base` as model `name` and each PEFT folder of `adapters` under its key, until the block is left.

    Every adapter is shown to act before the block is entered. Joins the Ray cluster of this process, or starts one.
    `port` 0 picks a free one. `chat_template` is Jinja text or a file; without it (and without `tokenizer`, a folder)
    vLLM uses the base's. Each of the `replicas` is an engine of its own with `num_gpus`, or with `threads` CPUs; None
    gives each an equal share of all. `wait_seconds`: how long to wait for what they need. With `api_key`, requests
    need it as their bearer token. A page to try the models is at `/`. Nothing is left running after the block, nor
    after this process is killed. Raises UserError for a taken port, a folder that cannot be served, an adapter that
    changes nothing, too few resources, and where Ray Serve already runs on the cluster.
    """
    if name in adapters:
        raise UserError(f"adapters: {name!r} is the name of the base as well; give the adapter another name")
    free_port(host, port)  # said before anything heavy starts; Ray may take a port before it is used below
    resolve(base, weights=False)
    limits = lora_options(adapters.values())
    if limits:  # one more than there are: for a moment a replaced adapter and its successor run in one batch
        limits["max_loras"] = max(len(adapters) + 1, LEAST_SLOTS)
    options = {
        "model": base,
        "served_model_name": [name],
        "chat_template": str(chat_template) if chat_template else None,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": MAX_SEQUENCES,
        "disable_log_stats": True,
        "api_key": [api_key] if api_key else None,
        "worker_extension_cls": "crosslora.vllm_worker.EndsWithReplica",
        **_device_options(num_gpus),
        **limits,
    }
    shared = _files(tokenizer, "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "*.model")
    with cluster.session(Cluster()), _lifeline() as lifeline, _shelf(shared) as shelf:
        ray.get(shelf.change.remote({key: _files(path, *ADAPTER) for key, path in adapters.items()}, []))
        actor = _actor_options(num_gpus, threads, replicas, wait_seconds)
        deployment: Any = VllmServer
        app = deployment.options(ray_actor_options=actor, num_replicas=replicas).bind(
            options, shelf, lifeline
        )
        with _running(app, base.base, host, free_port(host, port)) as url:
            _check_adapters_act(url, name, adapters, api_key)
            yield Endpoint(url, name, shelf, replicas, api_key, limits, [*adapters])


@contextmanager
def _shelf(tokenizer: Files) -> Iterator[Any]:
    shelf = cluster.beside_driver(Shelf, tokenizer)
    try:
        yield shelf
    finally:
        ray.kill(shelf)


def _files(folder: Path | None, *patterns: str) -> Files:
    """Files of a folder whose names match; none where there is no folder."""
    found = [file for pattern in patterns for file in (folder.glob(pattern) if folder else ())]
    return {file.name: file.read_bytes() for file in found}


def _device_options(num_gpus: float) -> dict[str, Any]:
    if num_gpus:
        return {"tensor_parallel_size": max(int(num_gpus), 1)}
    return {
        "enforce_eager": True,
        "max_num_batched_tokens": CPU_BATCHED_TOKENS,
    }


def _actor_options(
    num_gpus: float, threads: int | None, replicas: int, wait_seconds: float
) -> dict[str, Any]:
    """What a replica asks of Ray: as many CPUs as it has threads, so that nothing runs beside it."""
    cpus = threads or cluster.cpus_beside(num_gpus, replicas)
    cluster.require({"CPU": cpus, "GPU": num_gpus}, replicas, "serving", wait_seconds)
    return {"num_cpus": cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": environment(cpus, num_gpus)}}


@contextmanager
def _running(app: Any, base: str, host: str, port: int) -> Iterator[str]:
    """Run `app` in Ray Serve, yield its URL, and shut Ray Serve down."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if _controller() is not None:
        raise UserError(
            "cluster: Ray Serve already runs there and its port cannot be changed; stop it with `serve shutdown`, "
            "or use another cluster"
        )
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
        try:
            serve.run(app, name=APPLICATION)
        except RuntimeError as error:
            raise UserError(_why_not_served(base)) from error
        yield f"http://{host}:{port}/v1"
    finally:
        end_serve()


def _why_not_served(base: str) -> str:
    message = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].message
    last_error = re.split(r"\n(?=[\w.]+(?:Error|Exception): )", message)[-1]
    return (
        f"{base}: vLLM did not start with it ({' '.join(last_error.split())[:300]}); mend that, its output is in "
        f"worker-*.out among the logs of Ray's session {ray.get_runtime_context().get_session_name()}"
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
        yield server.getsockname()[:2]


def free_port(host: str, port: int) -> int:
    """`port`, or a free one where it is 0; raises UserError where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} on {host}: {error.strerror}; stop what listens there, or give another port "
                "(0 picks a free one)"
            ) from error
        return int(probe.getsockname()[1])


def _check_adapters_act(url: str, name: str, adapters: dict[str, Path], api_key: str | None = None) -> None:
    """Raise UserError on an adapter with which the endpoint gives the base's logprobs."""
    without = _logprobs(url, name, api_key)
    for adapter, path in adapters.items():
        try:
            within = _logprobs(url, adapter, api_key)
        except urllib.error.HTTPError as error:
            raise UserError(
                f"{path}: vLLM does not serve it ({error.code}); its output is in worker-*.out among the logs of Ray's "
                "session"
            ) from error
        if within == without:
            raise UserError(
                f"{path}: served as {adapter!r} it changes nothing (the same logprobs as {name!r}); "
                "check that its B matrices are not zero, and that it belongs to this base"
            )


def _logprobs(url: str, model: str, api_key: str | None) -> list[float | None]:
    """log p of every token of PROBE. Goes straight to the endpoint, whatever proxy the environment names."""
    body = {"model": model, "prompt": PROBE, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {api_key}"} if api_key else {}
    )
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        request, timeout=PROBE_SECONDS
    ) as answer:
        logprobs: list[float | None] = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
        return logprobs
