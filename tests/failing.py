"""An engine that fails. In a module of its own, since Ray's workers import its class."""

from pathlib import Path
from typing import Any

import torch

from crosslora.config import Base, Synthesis
from crosslora.teacher.corpus import Sample
from crosslora.teacher.synthesize import Teacher


class FailsOnce(Teacher):
    """Goes on living when its engine fails, as where a GPU has too little memory for a shard."""

    def __init__(self, base: Base, adapter: Path, settings: Synthesis, seed: int, board: Any) -> None:
        super().__init__(base, adapter, settings, seed, board)
        self._mark = Path(adapter).parent / "failed"

    def shard(self, index: int, size: int, are_answers: bool | None) -> list[Sample]:
        if not self._mark.exists():
            self._mark.touch()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().shard(index, size, are_answers)
