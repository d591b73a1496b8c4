"""`crosslora serve`: moved adapters and their base behind one OpenAI-compatible endpoint, until it is stopped."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as arrow_fs

from crosslora.adapter_config import read_settings
from crosslora.config import Base
from crosslora.errors import UserError
from crosslora.models import load_config, resolve
from crosslora.run_folder import RunFolder
from crosslora.serving import serve_models

HEADER = "adapter_config.json"
TOKENIZER = "tokenizer.json"
FORMAT = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja")
"""Files that decide what a chat becomes; the export writes them beside the adapter."""
LONGEST = 4096
"""Tokens of prompt and answer where the user says nothing: what a laptop's memory holds for many requests."""


@dataclass(frozen=True)
class Found:
    """An adapter in a local folder, where PEFT and vLLM can read it."""

    name: str
    folder: Path

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
    api_key: str | None,
) -> None:
    """Serve the adapters of `places` (run folders or PEFT folders, paths or URIs) until Ctrl-C.

    `base` None takes the one that the adapters name. Raises UserError where a place holds no adapter, and where the
    adapters need several bases, tokenizers or chat templates, besides what `serve_models` raises.
    """
    with tempfile.TemporaryDirectory() as temporary:
        found = find_adapters(places, Path(temporary))
        named = base or common_base(found)
        model = resolve(Base(base=named))
        folder = found[0].folder
        with serve_models(
            model,
            Path(named).name.removesuffix(".gguf"),
            {adapter.name: adapter.folder for adapter in found},
            dtype=dtype,
            max_model_len=max_model_len or min(LONGEST, _context(model)),
            host=host,
            port=port,
            tokenizer=folder if (folder / TOKENIZER).is_file() else None,
            num_gpus=num_gpus,
            threads=threads,
            api_key=api_key,
        ) as endpoint:
            page = endpoint.url.removesuffix("v1")
            print(
                f"serving {', '.join(endpoint.models)} at {endpoint.url}; a page to try them: {page}",
                flush=True,
            )
            print("Ctrl-C stops it", flush=True)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()


def find_adapters(places: Sequence[str], into: Path) -> list[Found]:
    """All adapters of `places`; those that are not local are copied to `into`. Raises UserError for a place without one, a name that occurs
    twice, and adapters that were fitted with different tokenizers or chat templates."""
    found: list[Found] = []
    for place in places:
        for name, folder in _folders(place):
            if name in {adapter.name for adapter in found}:
                raise UserError(
                    f"{place}: an adapter named {name!r} is there already; rename the folder of one"
                )
            found.append(Found(name, folder.local_root or _copy(folder, into / name)))
    other = next((adapter for adapter in found if adapter.format != found[0].format), None)
    if other is not None:
        raise UserError(
            f"{found[0].name} and {other.name} were fitted with different tokenizers or chat templates, and one "
            "engine has one; serve them apart, on two ports"
        )
    return found


def common_base(found: Sequence[Found]) -> str:
    """The base that all adapters name; raises UserError where they differ."""
    bases = sorted({adapter.base for adapter in found})
    if len(bases) > 1:
        raise UserError(f"the adapters belong to different bases ({', '.join(bases)}); serve them apart")
    return bases[0]


def _folders(place: str) -> Iterator[tuple[str, RunFolder]]:
    """Names and folders of a PEFT folder itself, or of what a run has exported."""
    folder = RunFolder.open(place.rstrip("/"))
    if folder.exists(HEADER):
        yield os.path.basename(folder.root), folder
        return
    if not folder.exists("run.json"):
        raise UserError(
            f"{place}: holds neither {HEADER} nor run.json; give an adapter's folder or the folder of a run"
        )
    names = [adapter["name"] for adapter in folder.read_json("run.json")["config"]["adapters"]]
    for name in names:
        if not folder.exists(f"export/{name}/manifest.json"):
            raise UserError(
                f"{place}: its adapter {name!r} is not exported yet; run `crosslora transfer` to its end"
            )
        yield name, RunFolder(f"{folder.uri}/export/{name}", folder.filesystem, folder.path(f"export/{name}"))


def _copy(folder: RunFolder, local: Path) -> Path:
    local.mkdir(parents=True)
    for entry in folder.filesystem.get_file_info(arrow_fs.FileSelector(folder.root)):
        if entry.is_file:
            (local / entry.base_name).write_bytes(folder.read_bytes(entry.base_name))
    return local


def _context(model: str) -> int:
    """Positions that the base was made for."""
    return int(getattr(load_config(model).get_text_config(), "max_position_embeddings", LONGEST))
