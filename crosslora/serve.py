"""`crosslora serve`: moved adapters and their base behind one OpenAI-compatible endpoint, until it is stopped.

What lies in the given places is what is served: they are looked through again every few seconds.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from crosslora.adapter_config import read_settings
from crosslora.config import Base
from crosslora.errors import UserError
from crosslora.models import context_length, resolve
from crosslora.progress import say
from crosslora.run_folder import RunFolder
from crosslora.serving import Endpoint, serve_models

HEADER = "adapter_config.json"
TOKENIZER = "tokenizer.json"
FORMAT = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja")
"""Files that decide what a chat becomes; the export writes them beside the adapter."""
LONGEST = 4096
"""Tokens of prompt and answer where the user says nothing: what a laptop's memory holds for many requests."""
SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class Found:
    """An adapter in a local folder, where PEFT and vLLM can read it."""

    name: str
    folder: Path
    state: tuple[Any, ...]
    """What its files looked like when it was found."""

    @property
    def base(self) -> str:
        """The base that it names; raises UserError where it names none."""
        base = read_settings(self.folder).base_model_name_or_path
        if not base:
            raise UserError(f"{self.name}: its {HEADER} names no base; give --base")
        return base

    @property
    def format(self) -> str:
        """Digest of tokenizer and chat template, the same for adapters that one engine can serve."""
        sha = hashlib.sha256()
        for file in FORMAT:
            sha.update((self.folder / file).read_bytes() if (self.folder / file).is_file() else b"-")
        return sha.hexdigest()


def serve(
    places: Sequence[str],
    *,
    base: str | None,
    host: str,
    port: int,
    dtype: str,
    max_model_len: int | None,
    num_gpus: float,
    threads: int | None,
    replicas: int,
    api_key: str | None,
) -> None:
    """Serve the adapters of `places` (runs, PEFT folders, folders of these; paths or URIs) until Ctrl-C.

    `base` None takes the one that the adapters name. Raises UserError where a place holds no adapter, and where the
    adapters need several bases, tokenizers or chat templates, besides what `serve_models` raises.
    """
    with tempfile.TemporaryDirectory() as temporary:
        found = find_adapters(places, Path(temporary))
        named = base or common_base(found)
        served = Base(base=named)
        folder = found[0].folder
        with serve_models(
            served,
            Path(named).name.removesuffix(".gguf"),
            {adapter.name: adapter.folder for adapter in found},
            dtype=dtype,
            max_model_len=max_model_len
            or min(LONGEST, context_length(resolve(served, weights=False), LONGEST)),
            host=host,
            port=port,
            tokenizer=folder if (folder / TOKENIZER).is_file() else None,
            num_gpus=num_gpus,
            threads=threads,
            replicas=replicas,
            api_key=api_key,
        ) as endpoint:
            page = endpoint.url.removesuffix("v1")
            print(
                f"serving {', '.join(endpoint.models)} at {endpoint.url}; a page to try them: {page}",
                flush=True,
            )
            print("adapters may come, change and go in these places meanwhile; Ctrl-C stops it", flush=True)
            with suppress(KeyboardInterrupt):
                _Keeper(endpoint, places, base, found, Path(temporary)).run()


def find_adapters(places: Sequence[str], into: Path) -> list[Found]:
    """All adapters of `places`; those that are not local are copied to `into`.

    Raises UserError for a place without one, a name that occurs twice, and adapters that were fitted with different
    tokenizers or chat templates.
    """
    for place in places:
        if not list(_folders(place)):
            raise UserError(
                f"{place}: holds no adapter; give the folder of a run that has exported one, a PEFT folder (with "
                f"{HEADER}), or a folder of PEFT folders"
            )
    found = [_fetch(name, folder, into) for name, folder in _list(places).items()]
    for other in found[1:]:
        _check_same_format(other, found[0].name, found[0].format)
    return found


def common_base(found: Sequence[Found]) -> str:
    """The base that all adapters name; raises UserError where they differ."""
    bases = sorted({adapter.base for adapter in found})
    if len(bases) > 1:
        raise UserError(f"the adapters belong to different bases ({', '.join(bases)}); serve them apart")
    return bases[0]


class _Keeper:
    """Serves what comes into `places` and stops serving what goes. What cannot be served is said once."""

    def __init__(
        self,
        endpoint: Endpoint,
        places: Sequence[str],
        base: str | None,
        found: Sequence[Found],
        scratch: Path,
    ) -> None:
        self._endpoint, self._places, self._scratch = endpoint, places, scratch
        self._first, self._format = found[0].name, found[0].format
        self._base = common_base(found) if base is None else None
        self._known = {adapter.name: adapter.state for adapter in found}
        """State of what is served or was refused."""
        self._before = dict(self._known)

    def run(self) -> None:
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            try:
                self._look()
            except (OSError, UserError) as error:  # a store that is out of reach is no reason to serve less
                say(f"looking for adapters: {error}")

    def _look(self) -> None:
        listed = _list(self._places)
        states = {name: _state(folder) for name, folder in listed.items()}
        for name in self._known.keys() - states.keys():
            self._endpoint.change({}, [name])
            del self._known[name]
            say(f"no longer serving {name}")
        for name, state in states.items():
            # only what no longer changes: another program may still be writing it
            if state != self._known.get(name) and state == self._before.get(name):
                self._try(name, listed[name], state)
        self._before = states

    def _try(self, name: str, folder: RunFolder, state: tuple[Any, ...]) -> None:
        try:
            self._add(name, folder)
            say(f"serving {name}")
        except UserError as error:
            say(f"not serving {name}: {error}")
        except (OSError, HTTPException) as error:  # a file that went, a replica that is being replaced
            say(f"{name}: {error}; it is tried again")
            return
        self._known[name] = state

    def _add(self, name: str, folder: RunFolder) -> None:
        adapter = _fetch(name, folder, self._scratch)
        _check_same_format(adapter, self._first, self._format)
        if self._base is not None and adapter.base != self._base:
            raise UserError(f"it belongs to {adapter.base}, served is {self._base}; serve it apart")
        self._endpoint.change({name: adapter.folder})


def _check_same_format(adapter: Found, first: str, its_format: str) -> None:
    if adapter.format != its_format:
        raise UserError(
            f"{first} and {adapter.name} were fitted with different tokenizers or chat templates, and one "
            "engine has one; serve them apart, on two ports"
        )


def _list(places: Sequence[str]) -> dict[str, RunFolder]:
    """Adapters by name; raises UserError where two have the same."""
    listed: dict[str, RunFolder] = {}
    for place in places:
        for name, folder in _folders(place):
            if name in listed:
                raise UserError(
                    f"{place}: an adapter named {name!r} is there already; rename the folder of one"
                )
            listed[name] = folder
    return listed


def _folders(place: str) -> Iterator[tuple[str, RunFolder]]:
    """Names and folders: a PEFT folder itself, what a run has exported, or the PEFT folders in a folder."""
    folder = RunFolder.open(place.rstrip("/"))
    if folder.exists(HEADER):
        yield os.path.basename(folder.root), folder
        return
    is_run = folder.exists("run.json")
    for entry in (folder.sub("export") if is_run else folder).entries():
        inner = folder.sub(f"export/{entry.base_name}" if is_run else entry.base_name)
        if inner.exists("manifest.json" if is_run else HEADER):
            yield entry.base_name, inner


def _state(folder: RunFolder) -> tuple[Any, ...]:
    return tuple((entry.base_name, entry.size, entry.mtime_ns) for entry in folder.entries() if entry.is_file)


def _fetch(name: str, folder: RunFolder, into: Path) -> Found:
    """The adapter in a local folder: its own, or a copy below `into`."""
    state = _state(folder)
    local = folder.local_root
    if local is None:
        local = folder.copy(into / name / str(len(list(into.glob(f"{name}/*")))))
    return Found(name, local, state)
