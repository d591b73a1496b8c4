"""What changes in the places from which adapters are served, and which of it can be served."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslora.adapter_config import CONFIG_FILE
from crosslora.adapter_header import WEIGHTS_FILE
from crosslora.adapter_places import TOKENIZER, Found, Places, check_same_format, state_of
from crosslora.config import Base
from crosslora.errors import UserError
from crosslora.run_folder import RunFolder
from crosslora.vllm_settings import lora_options

Files = dict[str, bytes]
"""name -> content"""
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "*.model")


@dataclass(frozen=True)
class Rules:
    """What an adapter must be like to be served beside the others."""

    model: str
    """Name of the base, which no adapter may have."""
    base: Base | None
    """What an adapter must name as its base; None takes any."""
    format: str | None
    """Digest of tokenizer and chat template that adapters must share; all are served with those. None: with the base's."""
    lora: dict[str, Any]
    """LoRA options that the engines were started with."""

    def check(self, adapter: Found) -> None:
        """Raise UserError where the adapter cannot be served."""
        if adapter.name == self.model:
            raise UserError(
                f"adapters: {adapter.name!r} is the name of the base as well; give the adapter another name"
            )
        if self.format is not None:
            check_same_format(adapter, self.format)
        if self.base is not None and adapter.base != self.base:
            raise UserError(
                f"it belongs to {adapter.base.full_name}, served is {self.base.full_name}; serve it apart"
            )
        needed = lora_options([adapter.folder])
        rank, modules = self.lora.get("max_lora_rank", 0), self.lora.get("lora_target_modules", [])
        if needed["max_lora_rank"] > rank or not set(needed["lora_target_modules"]) <= set(modules):
            raise UserError(
                f"{adapter.folder}: does not fit what this server was started for (rank up to {rank}, modules "
                f"{', '.join(modules) or 'none'}); start it again with this adapter"
            )


@dataclass(frozen=True)
class Change:
    """An adapter that came or changed (`files`), that cannot be served (`problem`), or that is gone (neither)."""

    name: str
    state: str = ""
    files: Files | None = None
    tokenizer: Files | None = None
    """What the adapter is served with; None for the base's own."""
    problem: str | None = None


class Watch:
    """Looks through places. The first look takes what is there, later ones only what no longer changes: another program
    may still be writing it."""

    def __init__(self, places: Places, rules: Rules) -> None:
        self._places, self._rules = places, rules
        self._known: dict[str, str] = {}
        """State of what was reported."""
        self._before: dict[str, str] | None = None

    def look(self) -> list[Change]:
        """What changed since the last look. Raises OSError and UserError where a place cannot be read."""
        listed = self._places.listed()
        states = {name: state_of(folder) for name, folder in listed.items()}
        before = states if self._before is None else self._before
        changes = [Change(name) for name in self._known.keys() - states.keys()]
        changes += [
            self._take(name, listed[name], state)
            for name, state in states.items()
            if state != self._known.get(name) and state == before.get(name)
        ]
        self._before = states
        self._known = {name: state for name, state in self._known.items() if name in states}
        self._known |= {change.name: change.state for change in changes if change.state}
        return changes

    def _take(self, name: str, folder: RunFolder, state: str) -> Change:
        with tempfile.TemporaryDirectory() as temporary:
            try:
                adapter = self._places.fetch(name, folder, Path(temporary) / name)
                self._rules.check(adapter)
            except (UserError, PermissionError) as error:
                return Change(name, state, problem=str(error))
            own = self._rules.format is not None and (adapter.folder / TOKENIZER).is_file()
            tokenizer = _files(adapter.folder, *TOKENIZER_FILES) if own else None
            return Change(name, state, _files(adapter.folder, CONFIG_FILE, WEIGHTS_FILE), tokenizer)


def _files(folder: Path, *patterns: str) -> Files:
    return {file.name: file.read_bytes() for pattern in patterns for file in folder.glob(pattern)}
