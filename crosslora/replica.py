"""A replica of an endpoint: vLLM's engine, and vLLM's own OpenAI app as what Ray Serve hands the requests to."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
import threading
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse
from ray import serve

from crosslora.gate import Gate
from crosslora.models import resolve
from crosslora.shelf import Files

MAX_SEQUENCES = 256
"""Requests that run at a time; more wait in vLLM."""
DEPLOYMENT = "vllm"


@serve.deployment(
    name=DEPLOYMENT,
    max_ongoing_requests=4 * MAX_SEQUENCES,
    max_constructor_retry_count=1,
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=5,
)
@serve.ingress()
class VllmServer:
    """Serves the model of `options` (of vLLM's command line; the model is a Base) and what adapters lie on `shelf`."""

    def __init__(self, options: dict[str, Any], shelf: Any, lifeline: tuple[str, int]) -> None:
        self._options, self._shelf = options, shelf
        self._engine: Any = None
        self._models: Any = None
        self._served: dict[str, int] = {}
        """Version of each adapter that is loaded."""
        self._resources = AsyncExitStack()
        self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory()))
        driver = socket.create_connection(lifeline)
        threading.Thread(target=_end_serve_with, args=[driver], daemon=True).start()

    async def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve calls this once, in the event loop that serves the app."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        vars(args).update(self._options)
        args.model = resolve(self._options["model"])  # on this node
        if tokenizer := await self._shelf.tokenizer.remote():
            args.tokenizer = self._write("tokenizer", tokenizer)
        self._engine = await self._resources.enter_async_context(build_async_engine_client(args))
        await self._engine.collective_rpc("end_with", args=(os.getpid(),))
        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, tasks, self._engine.model_config)
        app.add_api_route("/", _page, response_class=HTMLResponse, include_in_schema=False)
        await init_app_state(self._engine, app.state, args, tasks)
        self._models = app.state.openai_serving_models
        version = await self._follow(0)
        self._following = asyncio.create_task(self._follow_on(version))
        return Gate(app)

    async def check_health(self) -> None:
        """Ray Serve calls this every few seconds, and starts a new replica where it raises."""
        await self._engine.check_health()

    async def _follow_on(self, version: int) -> None:
        while True:
            try:
                version = await self._follow(version)
            except Exception:  # a full disk, say; the same version is tried again
                logging.getLogger(__name__).exception("adapters after version %s", version)
                await asyncio.sleep(1)

    async def _follow(self, version: int) -> int:
        """Wait until the shelf is newer than `version`, and serve what lies on it then."""
        version, wanted = await self._shelf.after.remote(version)
        for name in self._served.keys() - wanted.keys():
            # requests that run keep what they began with
            self._models.lora_requests.pop(name, None)
            del self._served[name]
        for name, its_version in wanted.items():
            if self._served.get(name) != its_version:
                await self._load(name, its_version, await self._shelf.files.remote(name))
                self._served[name] = its_version
        await self._shelf.adopted.remote(serve.get_replica_context().replica_id.unique_id, version)
        return version

    async def _load(self, name: str, version: int, files: Files | None) -> None:
        """Under an id of its own, so that no cache of a former adapter of that name is used; vLLM's own request to load
        one would leave a moment without any."""
        from vllm.lora.request import LoRARequest

        if files is None:
            return
        folder = self._write(f"{name}-{version}", files)
        request = LoRARequest(name, self._models.lora_id_counter.inc(1), folder)
        try:
            await self._engine.add_lora(request)
        except Exception:  # vLLM names no class
            # the driver asks for every adapter, and says that this one is missing
            logging.getLogger(__name__).exception("vLLM does not take the adapter %s", name)
            self._models.lora_requests.pop(name, None)
        else:
            self._models.lora_requests[name] = request

    def _write(self, name: str, files: Files) -> str:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return str(folder)

    async def __del__(self) -> None:
        await self._resources.aclose()


def _page() -> str:
    """What the endpoint shows in a browser."""
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _end_serve_with(driver: socket.socket) -> None:
    from crosslora.serving import end_serve

    with suppress(OSError):
        driver.recv(1)
    end_serve()
