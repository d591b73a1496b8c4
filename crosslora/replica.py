"""A replica of an endpoint: vLLM's engine, and vLLM's own OpenAI app as what Ray Serve hands the requests to."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import socket
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import serve
from starlette.responses import HTMLResponse
from starlette.types import Message

from crosslora.adapter_watch import Files
from crosslora.gate import Gate
from crosslora.models import load_format, resolve
from crosslora.relay import Call, Relay, answer

MAX_SEQUENCES = 256
"""Requests that run at a time; more wait in vLLM."""
LIMITS: dict[str, Any] = {
    "max_ongoing_requests": 4 * MAX_SEQUENCES,
    "max_constructor_retry_count": 1,
    "graceful_shutdown_wait_loop_s": 0.1,
    "health_check_period_s": 2,
}
"""Of every deployment that is an engine."""
KEPT = 2
"""Last versions of an adapter that stay on disk: vLLM may read the one before again, for requests that run."""
KEPT_REMOVED = 8
"""The same for adapters that were taken away."""
PROBE = "The quick brown fox jumps over the lazy dog."


class Engine:
    """Serves the model of `options` (of vLLM's command line; the model is a Base) and what adapters lie on `shelf`.

    `lifeline` is an address of the program that started it and ends it; None where it goes on by itself.
    """

    async def __init__(  # type: ignore[misc] # Ray Serve awaits it
        self, options: dict[str, Any], shelf: Any, lifeline: tuple[str, int] | None
    ) -> None:
        self._options, self._shelf = options, shelf
        self._served: dict[str, str] = {}
        """State of each adapter that was taken."""
        self._refused: dict[str, str] = {}
        self._folders: dict[str, list[str]] = {}
        """Where the last versions of each adapter lie."""
        self._removed: list[str] = []
        """Where those lie that were taken away last."""
        self._resources = AsyncExitStack()
        self._folder = Path(self._resources.enter_context(tempfile.TemporaryDirectory()))
        if lifeline is not None:
            driver = socket.create_connection(lifeline)
            threading.Thread(target=_end_serve_with, args=[driver], daemon=True).start()
        await self._start()

    async def _start(self) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        from crosslora.export import exported_tokenizer

        args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        vars(args).update(self._options)
        args.model = resolve(self._options["model"])  # on this node
        if tokenizer := await self._shelf.tokenizer.remote():
            args.tokenizer = self._write("tokenizer", tokenizer)
        elif args.chat_template:  # so that a chat ends where the template ends an answer
            exported_tokenizer(load_format(args.model, self._options["model"])).save_pretrained(
                self._folder / "tokenizer"
            )
            args.tokenizer = str(self._folder / "tokenizer")
        self._engine: Any = await self._resources.enter_async_context(build_async_engine_client(args))
        await self._engine.collective_rpc("end_with", args=(socket.gethostname(), os.getpid()))
        tasks = await self._engine.get_supported_tasks()
        self._app: Any = build_app(args, tasks, self._engine.model_config)
        await init_app_state(self._engine, self._app.state, args, tasks)
        # vLLM's answer to a request whose engine is dead ends the server; here check_health ends the replica
        self._app.state.server = SimpleNamespace(should_exit=False)
        self._models: Any = self._app.state.openai_serving_models
        self._without = await self._probe(None)
        version = await self._follow(0)
        self._following = asyncio.create_task(self._follow_on(version))

    async def check_health(self) -> None:
        """Ray Serve calls this every few seconds, and starts a new replica where it raises."""
        await self._engine.check_health()

    async def answer(self, call: Call) -> AsyncIterator[Message]:
        """What the app answers to a request that another replica passes on."""
        async for message in answer(self._app, call):
            yield message

    def has(self, model: str) -> bool:
        """Whether requests may name the model."""
        return model in self._models.lora_requests or model in self._options["served_model_name"]

    async def _follow_on(self, version: int) -> None:
        while True:
            try:
                version = await self._follow(version)
            except Exception:  # a full disk, a shelf that is starting again; the same version is tried again
                logging.getLogger(__name__).exception("adapters after version %s", version)
                await asyncio.sleep(1)

    async def _follow(self, version: int) -> int:
        """Wait until the shelf is newer than `version`, or for seconds, and serve what lies on it then."""
        version, wanted = await self._shelf.after.remote(version)
        for name in self._served.keys() - wanted.keys():
            self._drop(name)
            del self._served[name]
            self._removed += self._folders.pop(name, [])
        _keep_last(self._removed, KEPT_REMOVED)
        for name, state in wanted.items():
            if self._served.get(name) != state and (files := await self._shelf.files.remote(name)):
                await self._take(name, files)
                self._served[name] = state
        replica = serve.get_replica_context().replica_id.unique_id
        await self._shelf.report.remote(replica, version, self._refused)
        return version

    def _drop(self, name: str) -> None:
        """Requests that run keep what they began with."""
        self._models.lora_requests.pop(name, None)
        self._refused.pop(name, None)

    async def _take(self, name: str, files: Files) -> None:
        """Serve an adapter once it is seen to act.

        Under an id of its own, so that no cache of a former adapter of that name is used; vLLM's own request to load
        one would leave a moment without any.
        """
        from vllm.lora.request import LoRARequest

        number = self._models.lora_id_counter.inc(1)
        folders = self._folders.setdefault(name, [])
        folders.append(self._write(f"{name}-{number}", files))
        _keep_last(folders, KEPT)
        request = LoRARequest(name, number, folders[-1])
        try:
            await self._engine.add_lora(request)
            probed = await self._probe(request)
        except Exception as error:  # vLLM names no class
            logging.getLogger(__name__).exception("vLLM does not take the adapter %s", name)
            self._drop(name)
            self._refused[name] = f"vLLM does not take it ({type(error).__name__}: {str(error)[:200]})"
            return
        self._drop(name)
        if not all(map(math.isfinite, probed)):
            self._refused[name] = (
                "its answers are no numbers (NaN logprobs); train it again, or take an earlier checkpoint"
            )
        elif probed == self._without:
            self._refused[name] = (
                "it changes nothing (the same logprobs with and without it); check that its B matrices are not zero, "
                "and that it belongs to this base"
            )
        else:
            self._models.lora_requests[name] = request

    async def _probe(self, adapter: Any) -> list[float]:
        """log p of every token of PROBE."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
        async for output in self._engine.generate(PROBE, sampling, str(uuid.uuid4()), lora_request=adapter):
            if output.finished:
                return [entry.logprob for place in output.prompt_logprobs[1:] for entry in place.values()]
        return []

    def _write(self, name: str, files: Files) -> str:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        try:
            for file, content in files.items():
                (folder / file).write_bytes(content)
        except OSError:  # of a full disk: it is tried again and again, under another number
            shutil.rmtree(folder)
            raise
        return str(folder)

    async def __del__(self) -> None:
        await self._resources.aclose()


BesideEngine = serve.deployment(Engine, **LIMITS)
"""The second engine of an endpoint, which the first one asks."""


@serve.deployment(**LIMITS)
@serve.ingress()
class FrontEngine(Engine):
    """The engine that takes the requests. `beside` is a handle of another for the models that this one does not have."""

    async def __init__(  # type: ignore[misc]
        self, options: dict[str, Any], shelf: Any, lifeline: tuple[str, int] | None, beside: Any
    ) -> None:
        self._beside = beside
        await super().__init__(options, shelf, lifeline)

    async def __serve_build_asgi_app__(self) -> Any:
        """Ray Serve calls this once, after the constructor."""
        self._app.add_api_route("/", _page, response_class=HTMLResponse, include_in_schema=False)
        if self._beside is None:
            return Gate(self._app)
        return Gate(Relay(self._app, self.has, self._beside))


def _keep_last(folders: list[str], number: int) -> None:
    for folder in folders[:-number]:
        shutil.rmtree(folder)
    del folders[:-number]


def _page() -> str:
    """What the endpoint shows in a browser."""
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _end_serve_with(driver: socket.socket) -> None:
    from crosslora.endpoint import end_serve

    with suppress(OSError):
        driver.recv(1)
    end_serve()
