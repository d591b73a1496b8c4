"""What makes a teacher, a target or a task the same as before: the identities that stage digests are made of."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

from crosslora.adapter import Adapter
from crosslora.config import Base, Prompts, Task
from crosslora.errors import UserError
from crosslora.models import base_digest, load_format, resolve
from crosslora.teacher.corpus import SCHEMA_VERSION


@cache
def base_identity(base: Base) -> dict[str, Any]:
    """Digests of a base, its tokenizer and its chat template (as loaded, not as stored), wherever it lies."""
    folder = resolve(base)
    chat = load_format(folder, base)
    return {
        "base_digest": base_digest(folder),
        "tokenizer": _sha(chat.tokenizer.backend_tokenizer.to_str()),
        "chat_template": _sha(str(chat.tokenizer.chat_template)),
    }


def source_identity(base: Base, adapter: Adapter) -> dict[str, Any]:
    return {**base_identity(base), "adapter": adapter.digest, "schema_version": SCHEMA_VERSION}


def prompt_identity(prompts: Prompts) -> list[str]:
    """Digests of the seed examples and prompt files in use."""
    return [
        _sha(path.read_text(encoding="utf-8")) for path in (prompts.seeds_file, prompts.prompts_file) if path
    ]


def task_identity(task: Task) -> dict[str, str]:
    try:
        return {"name": task.name, "sha256": hashlib.sha256(task.path.read_bytes()).hexdigest()}
    except OSError as error:
        raise UserError(
            f"evaluation.tasks: {task.path} cannot be read ({error.strerror}); give a JSON-lines file"
        ) from error


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
