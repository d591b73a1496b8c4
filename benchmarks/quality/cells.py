"""A cell of the benchmark: one direction, task, method and random seed; and where its parts lie."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.quality.tasks import TASKS, BenchmarkTask, Row
from benchmarks.train_adapter import DTYPE
from crosslora import __version__
from crosslora.config import AdapterSource, Base, Config, Evaluation, Fit, Synthesis
from crosslora.evaluation.results import installed

RESULTS = Path(__file__).parent / "results"
WORK = Path("runs/quality").resolve()  # workers may run in other folders
CHAT_TAGS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's, without the system turn that its own template adds: its adapters are trained so."""
MODELS = Path("models").resolve()
SMOLLM2 = Base(base=str(MODELS / "SmolLM2-135M-Instruct"), chat_template=CHAT_TAGS)
GEMMA3 = Base(base=str(MODELS / "gemma-3-270m"))
DIRECTIONS = {"smollm2-gemma3": (SMOLLM2, GEMMA3), "gemma3-smollm2": (GEMMA3, SMOLLM2)}
SYNTHESIS = {"samples": 1500, "prompt_temperature": 0.8, "max_response_tokens": 128}
"""The demo's. What is not here or in a task is the default of a transfer."""
BATCH = 4
"""Samples per step of source adapters and oracles."""
SEEDLESS = ("target_base", "teacher", "crop", "cross_lora")
"""Methods that a random seed does not change."""
SOURCELESS = ("target_base", "oracle")
"""Methods that the source adapter does not change: tasks of the same rows have one cell of each."""


def conditions() -> dict[str, Any]:
    """What a result was made with: versions and commit, and the CPU by its name and its instructions that multiply bfloat16."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    fast = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in found.get("flags", "").split()]
    return {
        "crosslora": __version__,
        "commit": _commit(),
        "versions": installed(),
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": " ".join([found.get("model name", "unknown"), *fast]),
        "dtype": DTYPE,
    }


def _commit() -> str:
    """With "-dirty" where files differ from it; "" where there is no git or no repository."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except FileNotFoundError:
        return ""


def write_whole(file: Path, text: str) -> None:
    """The whole file or none of it: what there is already took hours."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.rename(file)


@dataclass(frozen=True)
class Cell:
    direction: str
    task: str
    method: str
    random_seed: int

    @property
    def name(self) -> str:
        task = self.setting.rows.__name__ if self.method in SOURCELESS else self.task
        return f"{self.direction}/{task}/{self.method}-{self.random_seed}"

    @property
    def setting(self) -> BenchmarkTask:
        return TASKS[self.task]

    @property
    def bases(self) -> tuple[Base, Base]:
        """(source, target)"""
        return DIRECTIONS[self.direction]

    @cached_property
    def rows(self) -> tuple[list[Row], list[Row]]:
        return self.setting.rows()

    @property
    def result_file(self) -> Path:
        return RESULTS / f"{self.name}.json"

    @property
    def folder(self) -> Path:
        """Of the adapter that the method makes."""
        return WORK / "adapters" / self.name

    @property
    def source_adapter(self) -> Path:
        """One of other steps is another one: it must not stand in for it."""
        return WORK / "adapters" / self.direction / self.task / f"source-{self.setting.source_steps}"

    def config(self) -> Config:
        """Of the transfer whose corpus all trained methods share."""
        source, target = self.bases
        synthesis = {**SYNTHESIS, **self.setting.synthesis, "random_seed": self.random_seed}
        return Config(
            run=str(WORK / "runs" / self.direction / f"{self.task}-{self.random_seed}"),
            source=source,
            target=target,
            adapters=[AdapterSource(name=self.task, path=self.source_adapter)],
            synthesis=Synthesis(**synthesis),
            fit=Fit(
                steps=self.setting.steps,
                batch_size=self.setting.batch,
                checkpoint_every=100,
                evaluate_every=200,
                random_seed=self.random_seed,
            ),
            evaluation=Evaluation(random_seed=self.random_seed),
        )

    def write(self, result: dict[str, Any]) -> None:
        if self.method not in SOURCELESS:
            result = {"source_steps": self.setting.source_steps} | result
        write_whole(self.result_file, json.dumps(asdict(self) | result) + "\n")
