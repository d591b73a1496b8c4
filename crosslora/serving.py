"""One base and any number of its LoRA adapters behind an OpenAI-compatible endpoint: vLLM's own app in Ray Serve."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi.responses import HTMLResponse
from ray import serve
from ray.serve.schema import LoggingConfig

from crosslora import cluster
from crosslora.config import Base, Cluster
from crosslora.errors import UserError
from crosslora.models import resolve
from crosslora.vllm_settings import environment, lora_options

MAX_SEQUENCES = 256
"""Requests that run at a time; more wait in vLLM."""
CPU_BATCHED_TOKENS = 512
"""Tokens per step on CPU: logprobs of a prompt take positions x vocabulary floats (0.5 GB at 262k entries)."""
STOP_SECONDS = 25.0
WAIT_SECONDS = Cluster().wait_seconds
APPLICATION, DEPLOYMENT = "crosslora", "vllm"
PROBE = "The quick brown fox jumps over the lazy dog."


@dataclass(frozen=True)
class Endpoint:
    """A running server. `url` ends in /v1; `models` are the names that requests may use, the base first."""

    url: str
    models: list[str]


@contextmanager
def serve_models(
    base: str | Path,
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
    wait_seconds: float = WAIT_SECONDS,
    api_key: str | None = None,
) -> Iterator[Endpoint]:
    """Serve `base` as model `name` and each PEFT folder of `adapters` under its key, until the block is left.

    Every adapter is shown to act before the block is entered. Joins the Ray cluster of this process, or starts one.
    `port` 0 picks a free one. `chat_template` is Jinja text or a file; without it (and without `tokenizer`, a folder)
    vLLM uses the base's. `threads` None uses all CPUs of the largest node. `wait_seconds`: how long to wait for what
    the replica needs. With `api_key`, requests need it as their bearer token. A page to try the models is at `/`.
    Nothing is left running after the block, nor after this process is killed. Raises UserError for a taken port, a folder that cannot be served, an adapter
    that changes nothing, too few resources, and where Ray Serve already runs on the cluster.
    """
    if name in adapters:
        raise UserError(f"adapters: {name!r} is the name of the base as well; give the adapter another name")
    free_port(host, port)  # said before anything heavy starts; Ray may take a port before it is used below
    options = {
        "model": resolve(Base(base=str(base))),
        "served_model_name": [name],
        "tokenizer": str(tokenizer) if tokenizer else None,
        "chat_template": str(chat_template) if chat_template else None,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": MAX_SEQUENCES,
        "disable_log_stats": True,
        "api_key": [api_key] if api_key else None,
        "worker_extension_cls": "crosslora.vllm_worker.EndsWithReplica",
        **_device_options(num_gpus),
        **lora_options(adapters.values()),
    }
    paths = {key: str(path.resolve()) for key, path in adapters.items()}
    with cluster.session(Cluster()), _lifeline() as lifeline:
        actor = _actor_options(num_gpus, threads, wait_seconds)
        app = VllmServer.options(ray_actor_options=actor).bind(options, paths, lifeline)  # type: ignore[attr-defined]
        with _running(app, options["model"], host, free_port(host, port)) as url:
            _check_adapters_act(url, name, adapters, api_key)
            yield Endpoint(url, [name, *adapters])


def _device_options(num_gpus: float) -> dict[str, Any]:
    if num_gpus:
        return {"tensor_parallel_size": max(int(num_gpus), 1)}
    return {
        "enforce_eager": True,
        "max_num_batched_tokens": CPU_BATCHED_TOKENS,
    }


def _actor_options(num_gpus: float, threads: int | None, wait_seconds: float) -> dict[str, Any]:
    """What the replica asks of Ray: as many CPUs as it has threads, so that nothing runs beside it."""
    cpus = threads or (1 if num_gpus else cluster.cpus_per_share(1))
    cluster.require({"CPU": cpus, "GPU": num_gpus}, "serving", wait_seconds)
    return {"num_cpus": cpus, "num_gpus": num_gpus, "runtime_env": {"env_vars": environment(cpus, num_gpus)}}


@serve.deployment(
    name=DEPLOYMENT,
    max_ongoing_requests=4 * MAX_SEQUENCES,
    max_constructor_retry_count=1,
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=5,
)
@serve.ingress()
class VllmServer:
    """A replica: vLLM's engine, and vLLM's own OpenAI app as what Ray Serve hands the requests to."""

    def __init__(self, options: dict[str, Any], adapters: dict[str, str], lifeline: tuple[str, int]) -> None:
        self._options = options
        self._adapters = adapters
        self._engine: Any = None
        self._resources = AsyncExitStack()
        driver = socket.create_connection(lifeline)
        threading.Thread(target=_end_serve_with, args=[driver], daemon=True).start()

    async def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve calls this once, in the event loop that serves the app."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.entrypoints.openai.models.protocol import LoRAModulePath
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        vars(args).update(self._options)
        args.lora_modules = [LoRAModulePath(name, path) for name, path in self._adapters.items()]
        self._engine = await self._resources.enter_async_context(build_async_engine_client(args))
        await self._engine.collective_rpc("end_with", args=(os.getpid(),))
        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, tasks, self._engine.model_config)
        app.add_api_route("/", _page, response_class=HTMLResponse, include_in_schema=False)
        await init_app_state(self._engine, app.state, args, tasks)
        return app

    async def check_health(self) -> None:
        """Ray Serve calls this every few seconds, and starts a new replica where it raises."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        await self._resources.aclose()


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
        _end_serve()


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


def _end_serve() -> None:
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


def _end_serve_with(driver: socket.socket) -> None:
    with suppress(OSError):
        driver.recv(1)
    _end_serve()


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


def _page() -> str:
    """What the endpoint shows in a browser."""
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _check_adapters_act(url: str, name: str, adapters: dict[str, Path], api_key: str | None = None) -> None:
    """Raise UserError on an adapter with which the endpoint gives the base's logprobs."""
    without = _logprobs(url, name, api_key)
    for adapter, path in adapters.items():
        if _logprobs(url, adapter, api_key) == without:
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
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        logprobs: list[float | None] = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
        return logprobs
