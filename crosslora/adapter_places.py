"""Adapters in the places that a user names: runs, PEFT folders, folders of these; paths or URIs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crosslora.adapter import read_adapter, write_adapter
from crosslora.adapter_config import CONFIG_FILE, read_settings
from crosslora.adapter_header import WEIGHTS_FILE
from crosslora.config import AdapterSource, Base
from crosslora.errors import UserError
from crosslora.run_folder import RunFolder, config_of_run, digest

TOKENIZER = "tokenizer.json"
FORMAT = (TOKENIZER, "tokenizer_config.json", "chat_template.jinja")
"""Files that decide what a chat becomes; the export writes them beside the adapter."""
OF_TEACHER = "-teacher"
"""What the name of a source adapter ends with where it is served beside the moved one."""


@dataclass(frozen=True)
class Found:
    """An adapter in a local folder, where PEFT and vLLM can read it."""

    name: str
    folder: Path

    @property
    def base(self) -> Base:
        """The base that it names, and its revision; raises UserError where it names none."""
        settings = read_settings(self.folder)
        if not settings.base_model_name_or_path:
            raise UserError(f"{self.name}: its {CONFIG_FILE} names no base; give --base")
        return Base(base=settings.base_model_name_or_path, revision=settings.revision)

    @property
    def format(self) -> str:
        """Digest of tokenizer and chat template, the same for adapters that one engine can serve."""
        sha = hashlib.sha256()
        for file in FORMAT:
            sha.update((self.folder / file).read_bytes() if (self.folder / file).is_file() else b"-")
        return sha.hexdigest()


@dataclass(frozen=True)
class Places:
    """Where adapters lie. With `teachers` the places are runs, and it is their source adapters that are meant."""

    places: tuple[str, ...]
    teachers: bool = False

    def listed(self) -> dict[str, RunFolder]:
        """Adapters by name; of several with one name the first, the others under their URI."""
        listed: dict[str, RunFolder] = {}
        for place in self.places:
            for name, folder in _teachers(place) if self.teachers else _folders(place):
                listed[folder.uri if name in listed else name] = folder
        return listed

    def fetch(self, name: str, folder: RunFolder, into: Path) -> Found:
        """The adapter in a local folder: its own, or a copy in the new folder `into`.

        Raises UserError where its name is another's."""
        if name == folder.uri:
            raise UserError(
                f"{folder.uri}: an adapter named {os.path.basename(folder.root)!r} is there already; rename the folder of one"
            )
        local = folder.local_root or folder.copy(into)
        if self.teachers:  # in the form that every vLLM reads
            adapter = read_adapter(local)
            local = into / "plain"
            write_adapter(local, adapter.factors, adapter.base_model_name_or_path)
        return Found(name, local)

    def find(self, into: Path) -> list[Found]:
        """All adapters; those that are not local are copied to `into`.

        Raises UserError for a place without one, a name that occurs twice, and adapters that were fitted with
        different tokenizers or chat templates.
        """
        for place in self.places:
            if not self.teachers and not [*_folders(place)]:
                raise UserError(
                    f"{place}: holds no adapter; give the folder of a run that has exported one, a PEFT folder (with "
                    f"{CONFIG_FILE}), or a folder of PEFT folders"
                )
        found = [self.fetch(name, folder, into / name) for name, folder in self.listed().items()]
        for other in found[1:]:
            check_same_format(other, found[0].format)
        return found


def common_base(found: Sequence[Found]) -> Base:
    """The base that all adapters name; raises UserError where they differ."""
    bases = list(dict.fromkeys(adapter.base for adapter in found))
    if len(bases) > 1:
        names = sorted(base.full_name for base in bases)
        raise UserError(f"the adapters belong to different bases ({', '.join(names)}); serve them apart")
    return bases[0]


def common_source(runs: Sequence[str]) -> Base:
    """The source base of all runs; raises UserError where they differ, and for a place that is no run."""
    sources = [config_of_run(run).source for run in runs]
    if other := next((source for source in sources if source != sources[0]), None):
        names = (sources[0].full_name, other.full_name)
        what = (
            f"source bases ({', '.join(names)})" if names[0] != names[1] else "chat templates of their source"
        )
        raise UserError(f"the runs have different {what}; serve them apart")
    return sources[0]


def check_same_format(adapter: Found, wanted: str) -> None:
    if adapter.format != wanted:
        raise UserError(
            f"{adapter.name} was fitted with another tokenizer or chat template than those before it, and one "
            "engine has one; serve it apart, on another port"
        )


def state_of(folder: RunFolder) -> str:
    """Changes when a file of the folder does."""
    return digest(
        [[entry.base_name, entry.size, entry.mtime_ns] for entry in folder.entries() if entry.is_file]
    )


def keep_source(run: RunFolder, source: AdapterSource) -> None:
    """Copy a source adapter into its run: the teacher may be wanted where the adapter's own folder is not."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        place, content = f"source/{source.name}/{file}", (source.path / file).read_bytes()
        if (
            not run.exists(place) or run.read_bytes(place) != content
        ):  # a teacher that is served need not be loaded again
            run.write_bytes(place, content)


def kept_source(run: RunFolder, name: str) -> RunFolder:
    """The folder of that copy; raises UserError where there is none."""
    folder = run.sub(f"source/{name}")
    if not folder.exists(WEIGHTS_FILE):
        raise UserError(
            f"{folder.uri}: holds no {WEIGHTS_FILE}; copy the source adapter {name} there, both its files"
        )
    return folder


def _folders(place: str) -> Iterator[tuple[str, RunFolder]]:
    """Names and folders: a PEFT folder itself, what a run has exported, or the PEFT folders in a folder."""
    folder = RunFolder.open(place.rstrip("/"))
    if folder.local_root and folder.local_root.is_file():
        return
    if folder.exists(CONFIG_FILE):
        yield os.path.basename(folder.root), folder
        return
    is_run = folder.exists("run.json")
    for entry in (folder.sub("export") if is_run else folder).entries():
        inner = folder.sub(f"export/{entry.base_name}" if is_run else entry.base_name)
        if inner.exists("manifest.json" if is_run else CONFIG_FILE):
            yield entry.base_name, inner


def _teachers(run: str) -> Iterator[tuple[str, RunFolder]]:
    folder = RunFolder.open(run)
    for source in config_of_run(run).adapters:
        if folder.exists(f"export/{source.name}/manifest.json"):
            yield f"{source.name}{OF_TEACHER}", kept_source(folder, source.name)
