"""The run folder: one writer, write-once files, manifests last, every stage keyed by a digest of its inputs.

A run folder is a local path or any URI that pyarrow.fs opens. Object stores cannot rename, so nothing here depends on
it: a stage counts as done only when its `manifest.json`, written last, is there and its inputs are the same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as arrow_fs
from pydantic import ValidationError

from crosslora.config import Config
from crosslora.errors import UserError

STAGES = ("synthesize", "filter", "fit", "export", "evaluate")
BEFORE_ANY_RESULT = {"inputs.json", "events.jsonl", "events"}
"""What a stage has of itself before it made anything."""
PASSWORD = re.compile(r"://[^/@]*:(?!\d+/)[^@]*@")
"""User and password before the host of a URI, also where a slash of the password was not escaped; a port is none."""


def below(place: str, name: str) -> str:
    """The path or URI of `name` in a folder; the query of a URI stays at its end."""
    folder, mark, query = place.partition("?") if "://" in place else (place, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def digest(value: Any) -> str:
    """sha256 of a JSON-like value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_whole(file: Path, content: bytes) -> None:
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)  # a full disk is not left with it


@dataclass(frozen=True)
class RunFolder:
    """Files of one run, addressed by names relative to `root`."""

    uri: str
    filesystem: arrow_fs.FileSystem
    root: str

    @classmethod
    def open(cls, uri: str) -> RunFolder:
        if PASSWORD.search(uri):
            raise UserError(
                f"run: {PASSWORD.sub('://...@', uri)} holds credentials, which run.json and messages would show; leave them out "
                "and set the environment variables of the store (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://)"
            )
        try:
            if "://" in uri:
                filesystem, root = arrow_fs.FileSystem.from_uri(uri)
            else:
                filesystem, root = arrow_fs.LocalFileSystem(), str(Path(uri).absolute())
        except (ValueError, OSError) as error:
            raise UserError(
                f"run: {uri!r} cannot be opened ({error}); give a local path or a URI such as s3://"
            ) from error
        return cls(uri, filesystem, root)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @property
    def local_root(self) -> Path | None:
        """The folder itself where it is local, else None."""
        return Path(self.root) if isinstance(self.filesystem, arrow_fs.LocalFileSystem) else None

    def sub(self, name: str) -> RunFolder:
        return RunFolder(below(self.uri, name), self.filesystem, self.path(name))

    def entries(self) -> list[arrow_fs.FileInfo]:
        """Files and folders directly in it, by name; none where it does not exist."""
        selector = arrow_fs.FileSelector(self.root, allow_not_found=True)
        return sorted(self.filesystem.get_file_info(selector), key=lambda entry: str(entry.base_name))

    def copy(self, into: Path) -> Path:
        """Copy the files directly in it to a local folder, for what can read nothing else."""
        into.mkdir(parents=True)
        for entry in self.entries():
            if entry.is_file:
                (into / entry.base_name).write_bytes(self.read_bytes(entry.base_name))
        return into

    def exists(self, name: str) -> bool:
        return self.filesystem.get_file_info(self.path(name)).type != arrow_fs.FileType.NotFound

    def write_bytes(self, name: str, content: bytes) -> None:
        """The whole file or none of it: an object store does so by itself, a full disk does not."""
        self.filesystem.create_dir(os.path.dirname(self.path(name)), recursive=True)
        if self.local_root is not None:
            _write_whole(Path(self.path(name)), content)
            return
        with self.filesystem.open_output_stream(self.path(name)) as stream:
            stream.write(content)

    def read_bytes(self, name: str) -> bytes:
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def write_json(self, name: str, value: Any) -> None:
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_json(self, name: str) -> Any:
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise UserError(f"{self.path(name)}: damaged ({error}); delete it and run again") from error

    def remove(self, name: str) -> None:
        """Manifests first, so that half of a stage is never taken for all of it."""
        inside = arrow_fs.FileSelector(self.path(name), allow_not_found=True, recursive=True)
        for file in self.filesystem.get_file_info(inside):
            if file.base_name == "manifest.json":
                self.filesystem.delete_file(file.path)
        if self.exists(name):
            self.filesystem.delete_dir(self.path(name))

    def stage(self, name: str, inputs: dict[str, Any]) -> Stage:
        """The folder of one stage; refuses to mix with what a former run of it made from other inputs."""
        former = self.read_json(f"{name}/inputs.json") if self.exists(f"{name}/inputs.json") else None
        if former is None or digest(former) != digest(inputs):
            if self._made_something(name):
                changes, (stage, adapter) = "; ".join(differences(former or {}, inputs)), name.split("/")
                raise UserError(
                    f"{self.path(name)}: was made from other inputs ({changes}); add --redo {stage} to make it and what "
                    f"follows again (--redo {name}: of {adapter} alone), or name another run folder"
                )
            self.write_json(f"{name}/inputs.json", inputs)
        return Stage(self, name, inputs)

    def _made_something(self, stage: str) -> bool:
        names = (str(entry.base_name) for entry in self.sub(stage).entries())
        return any(name not in BEFORE_ANY_RESULT for name in names)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock: one run, one writer."""
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _process_start(os.getpid())}
        self._lock(owner)
        try:
            yield
        finally:  # messages say where it may be deleted by hand; another's is left
            if self.exists("lock.json") and self.read_json("lock.json") == owner:
                self.filesystem.delete_file(self.path("lock.json"))

    def _lock(self, owner: dict[str, Any]) -> None:
        try:
            if self.filesystem.get_file_info(self.root).type == arrow_fs.FileType.File:
                raise NotADirectoryError(errno.ENOTDIR, "it is a file")
            self.filesystem.create_dir(self.root, recursive=True)
            self._create_lock(json.dumps(owner).encode())
        except FileExistsError:
            self._take_over(owner)
        except (PermissionError, NotADirectoryError) as error:
            raise UserError(
                f"run: {self.uri} is not writable ({error.strerror}); name another folder"
            ) from error

    def _take_over(self, owner: dict[str, Any]) -> None:
        """Replace the lock of a process that is gone; raises UserError where it lives."""
        holder = self.read_json("lock.json")
        if not _is_gone(holder):
            raise UserError(
                f"run: {self.uri} is in use by process {holder.get('pid')} on {holder.get('host')}; wait for it, "
                f"stop it, or name another run folder; if that machine is gone, delete {self.path('lock.json')}"
            )
        self.write_json("lock.json", owner)

    def _create_lock(self, content: bytes) -> None:
        local = self.local_root
        if local is None:  # no exclusive create on object stores: best effort
            if self.exists("lock.json"):
                raise FileExistsError
            self.write_bytes("lock.json", content)
            return
        descriptor = os.open(local / "lock.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)


@dataclass(frozen=True)
class Stage:
    """One stage of one run: `inputs.json` first, `manifest.json` last."""

    folder: RunFolder
    name: str
    inputs: dict[str, Any]

    @property
    def digest(self) -> str:
        return digest(self.inputs)

    @property
    def done(self) -> bool:
        return self.folder.exists(f"{self.name}/manifest.json")

    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = self.folder.read_json(f"{self.name}/manifest.json")
        return manifest

    def finish(self, outputs: dict[str, Any]) -> dict[str, Any]:
        manifest = {"inputs_digest": self.digest, **outputs}
        self.folder.write_json(f"{self.name}/manifest.json", manifest)
        return manifest

    def reopen(self) -> None:
        """What it made stays, and more is to come."""
        self.folder.filesystem.delete_file(self.folder.path(f"{self.name}/manifest.json"))

    def event(self, event: str, **fields: Any) -> None:
        """Append a line to the stage's events.jsonl (a file per event where the store cannot append)."""
        line = (
            json.dumps({"time": round(time.time(), 3), "stage": self.name, "event": event, **fields}) + "\n"
        )
        local = self.folder.local_root
        if local is None:
            self.folder.write_bytes(f"{self.name}/events/{time.time_ns()}.jsonl", line.encode())
            return
        with open(local / self.name / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(line)


def differences(former: Any, now: Any, place: str = "") -> list[str]:
    """Leaves in which two JSON-like values differ, as `place: former -> now`."""
    if isinstance(former, dict) and isinstance(now, dict):
        keys = sorted(former.keys() | now.keys())
        return [
            change
            for key in keys
            for change in differences(former.get(key), now.get(key), f"{place}.{key}" if place else key)
        ]
    return [] if former == now else [f"{place}: {_short(former)} -> {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _process_start(pid: int) -> str | None:
    """When a process started (clock ticks since boot), so that a reused pid is not taken for the holder."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _is_gone(holder: dict[str, Any]) -> bool:
    return holder.get("host") == socket.gethostname() and _process_start(holder["pid"]) != holder["started"]


def adapter_names(folder: RunFolder) -> list[str]:
    """Of all adapters of a run; raises UserError for a folder that holds no run."""
    return [adapter["name"] for adapter in _saved(folder)["adapters"]]


def _saved(folder: RunFolder) -> dict[str, Any]:
    if not folder.exists("run.json"):
        raise UserError(f"{folder.uri}: holds no run.json; give the folder of a run")
    config: dict[str, Any] = folder.read_json("run.json")["config"]
    return config


def stage_states(folder: RunFolder) -> dict[str, str]:
    """Every stage of every adapter of a run: done, started, or not started."""
    names = adapter_names(folder)
    return {f"{stage}/{name}": _state(folder, f"{stage}/{name}") for name in names for stage in STAGES}


def _state(folder: RunFolder, stage: str) -> str:
    if folder.exists(f"{stage}/manifest.json"):
        return "done"
    return "started" if folder.exists(f"{stage}/inputs.json") else "not started"


def config_of_run(place: str) -> Config:
    """The configuration that a run was made with; raises UserError for a folder that holds no run."""
    saved = _saved(RunFolder.open(place))
    try:
        return Config.model_validate(saved)
    except ValidationError as error:
        raise UserError(
            f"{place}: its run.json is of another version ({error.errors()[0]['msg']}); run `crosslora transfer` with its "
            "configuration again"
        ) from error
