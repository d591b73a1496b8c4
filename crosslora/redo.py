"""What is made again: a stage and those after it, of all adapters of a configuration or of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crosslora.errors import UserError
from crosslora.run_folder import STAGES, RunFolder


@dataclass(frozen=True)
class Redo:
    """What is to be made again: a stage and those after it, of these adapters."""

    stage: str
    names: Sequence[str]

    @classmethod
    def parse(cls, text: str | None, names: Sequence[str]) -> Redo:
        if text is None:
            return cls(STAGES[0], ())
        stage, slash, name = text.partition("/")
        check_stage("--redo", stage)
        if slash and name not in names:
            raise UserError(
                f"--redo {text}: the configuration has no adapter {name!r}; one of {', '.join(names)}"
            )
        return cls(stage, (name,) if slash else names)

    def first(self, name: str) -> str | None:
        """The first stage of this adapter that is made again, if any is."""
        return self.stage if name in self.names else None

    def forget(self, folder: RunFolder, name: str) -> None:
        """The last first: where this is interrupted, nothing stays that was made from what is gone."""
        if self.stage != "evaluate":
            folder.remove(f"harness/{name}")  # benchmarks of the student that goes
        for stage in reversed(STAGES[STAGES.index(self.stage) :]):
            folder.remove(f"{stage}/{name}")


def check_stage(option: str, stage: str | None) -> None:
    if stage is not None and stage not in STAGES:
        raise UserError(f"{option} {stage}: no such stage; one of {', '.join(STAGES)}")
