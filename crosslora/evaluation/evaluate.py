"""Evaluation through served endpoints: first the teacher, then everything that stands on the target base."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from crosslora.adapter import Adapter, write_adapter
from crosslora.config import HELD_OUT, Base, Config, Evaluation, Task
from crosslora.endpoint import Model, Resources, serve_models
from crosslora.errors import UserError
from crosslora.evaluation.baselines import baseline
from crosslora.evaluation.client import ask
from crosslora.evaluation.likelihood import PASSAGE_TOKENS, reference_nats, text_nats
from crosslora.evaluation.report import write_report
from crosslora.evaluation.results import (
    PLAIN_TEXT,
    SOURCE_BASE,
    STUDENT,
    TARGET_BASE,
    TEACHER,
    Answers,
    Nats,
    collect,
)
from crosslora.evaluation.tasks import Answer, Item, answer_tokens, read_items
from crosslora.models import context_length, resolve
from crosslora.precision import decided
from crosslora.projection.build import build_transfer
from crosslora.run_folder import RunFolder, Stage
from crosslora.teacher.corpus import read_corpus
from crosslora.text.pair import TokenizerPair
from crosslora.text.templates import ChatFormat

ROOM = 8
"""Tokens that an endpoint has beyond the longest text."""
Asked = dict[str, dict[str, Any]]
"""model -> `answers` and `nats`, as JSON holds them"""


def evaluate(
    config: Config,
    adapter: Adapter,
    corpus: tuple[str, str],
    exported: Stage,
    held_out_kl: dict[str, float],
    stage: Stage,
) -> dict[str, Any]:
    """Serve, ask, score, report; returns the manifest. Results are in results.json and its reports.

    `held_out_kl`: what fitting measured, KL(teacher || target base) and KL(teacher || student), nats per token.
    """
    pair = TokenizerPair.load(config.source, config.target)
    tasks = _tasks(config, stage.folder, corpus)
    with tempfile.TemporaryDirectory() as temporary:
        student = exported.folder.sub(exported.name)
        folders = adapter_folders(config, adapter, pair, student, Path(temporary))
        teacher = {TEACHER: folders.pop(TEACHER)}
        asked = _ask(config, config.source, SOURCE_BASE, teacher, pair.teacher, tasks, [TEACHER], stage)
        tasks, asked = _with_teacher_references(config, pair.student, tasks, asked)
        models = [TARGET_BASE, *folders]
        asked |= _ask(config, config.target, TARGET_BASE, folders, pair.student, tasks, models, stage)
    results = collect(decided(config), tasks, _answers(asked), _nats(asked), held_out_kl)
    stage.folder.write_json(f"{stage.name}/results.json", results)
    write_report(stage, results)
    return stage.finish({"models": list(asked)})


def _answers(asked: Asked) -> Answers:
    return {
        model: {task: [Answer(**answer) for answer in given] for task, given in said["answers"].items()}
        for model, said in asked.items()
    }


def _nats(asked: Asked) -> Nats:
    return {
        model: {text: np.array(values) for text, values in said["nats"].items()}
        for model, said in asked.items()
        if said["nats"]
    }


def _tasks(config: Config, folder: RunFolder, corpus: tuple[str, str]) -> list[tuple[Task, list[Item]]]:
    """The user's tasks, and the held-out prompts, whose references the teacher is still to give."""
    tasks = [(task, read_items(task)) for task in config.evaluation.tasks]
    held_out = dict.fromkeys(sample.prompt for sample in read_corpus(folder, *corpus)[1])
    prompts = [Item(prompt, "") for prompt in held_out]
    if config.evaluation.held_out_items and prompts:
        task = Task(
            name=HELD_OUT,
            path=Path(corpus[0]),
            metrics=["exact_match", "rouge_l"],
            max_tokens=config.synthesis.max_response_tokens,  # of the teacher: its answers are not known yet
        )
        tasks.append((task, prompts[: config.evaluation.held_out_items]))
    return tasks


def _with_teacher_references(
    config: Config, chat: ChatFormat, tasks: list[tuple[Task, list[Item]]], asked: Asked
) -> tuple[list[tuple[Task, list[Item]]], Asked]:
    """Held-out prompts have no label: agreement with the teacher's own greedy answer is what is scored.

    Those that it did not end, and those that are too long for the target, are left out, with its answers to them.
    """
    context = _context(config.target) - ROOM

    def fits(item: Item) -> bool:
        return len(chat.prompt_ids(item.prompt)) + len(chat.answer_ids(item.reference)) <= context

    labelled = [(task, items) for task, items in tasks if task.name != HELD_OUT]
    for task, items in tasks[len(labelled) :]:  # the held-out prompts stand at the end
        given = asked[TEACHER]["answers"][HELD_OUT]
        referred = [Item(item.prompt, said["text"]) for item, said in zip(items, given, strict=True)]
        kept = [i for i, item in enumerate(referred) if given[i]["ended"] and fits(item)]
        answers = asked[TEACHER]["answers"] | {HELD_OUT: [given[i] for i in kept]}
        asked = asked | {TEACHER: asked[TEACHER] | {"answers": answers}}
        if referred := [referred[i] for i in kept]:
            wanted = answer_tokens(task.model_copy(update={"max_tokens": None}), referred, chat)
            room = context - max(len(chat.prompt_ids(item.prompt)) for item in referred)
            labelled.append((task.model_copy(update={"max_tokens": max(min(wanted, room), 1)}), referred))
    if not labelled:
        raise UserError(
            "evaluation.held_out_items: the teacher ended no answer to a held-out prompt that the target has room for; "
            "give evaluation.tasks"
        )
    return labelled, asked


def adapter_folders(
    config: Config, adapter: Adapter, pair: TokenizerPair, student: RunFolder, folder: Path
) -> dict[str, Path]:
    """Local folders of teacher, baselines and student, below `folder`."""
    folders: dict[str, Path] = {name: folder / name for name in config.evaluation.baselines}
    if folders:
        source_folder, target_folder = resolve(config.source), resolve(config.target)
        seed = config.evaluation.random_seed
        transfer = build_transfer(adapter, config.source, config.target, pair, seed)
        for name, place in folders.items():
            factors = baseline(name, transfer, source_folder, target_folder, seed)
            write_adapter(place, factors, config.target.base)
    folders[STUDENT] = student.copy(folder / STUDENT)
    write_adapter(folder / TEACHER, adapter.factors, config.source.base)  # in the form that every vLLM reads
    return {TEACHER: folder / TEACHER, **folders}


def _ask(
    config: Config,
    base: Base,
    base_name: str,
    adapters: dict[str, Path],
    chat: ChatFormat,
    tasks: list[tuple[Task, list[Item]]],
    models: list[str],
    stage: Stage,
) -> Asked:
    """Serve one base with its adapters and ask `models`. Each has a file, written when it has said all: an evaluation
    that was interrupted does not ask it again."""
    files = {model: f"{stage.name}/answers/{model}.json" for model in models}
    if missing := [model for model in models if not stage.folder.exists(files[model])]:
        passage = min(PASSAGE_TOKENS, context_length(resolve(base), PASSAGE_TOKENS) - ROOM)
        longest = max(longest_conversation(tasks, chat), passage) + ROOM
        served = model_of(config, base, base_name, adapters, longest)
        with serve_models([served], resources_of(config), port=config.evaluation.port) as endpoint:
            for model in missing:
                said = _said(config.evaluation, endpoint.url, model, tasks, chat, passage)
                stage.folder.write_json(files[model], said)
    return {model: stage.folder.read_json(file) for model, file in files.items()}


def _said(
    settings: Evaluation,
    url: str,
    model: str,
    tasks: list[tuple[Task, list[Item]]],
    chat: ChatFormat,
    passage: int,
) -> dict[str, Any]:
    """What a model answers; of all but the baselines also how likely the references and plain text are to it."""
    is_baseline = model in settings.baselines
    answers = {
        task.name: ask(
            url,
            model,
            items[: settings.baseline_items] if is_baseline else items,
            chat,
            answer_tokens(task, items, chat),
            settings.concurrency,
        )
        for task, items in tasks
    }
    nats: dict[str, np.ndarray] = {}
    if not is_baseline:
        # the teacher gives the held-out prompts their references
        known = [(task, items) for task, items in tasks if not (task.name == HELD_OUT and model == TEACHER)]
        nats = {
            task.name: reference_nats(url, model, items, chat, settings.concurrency) for task, items in known
        }
        nats[PLAIN_TEXT] = text_nats(url, model, chat, settings.concurrency, passage)
    return {
        "answers": {task: [asdict(answer) for answer in given] for task, given in answers.items()},
        "nats": {text: values.tolist() for text, values in nats.items()},
    }


def longest_conversation(tasks: list[tuple[Task, list[Item]]], chat: ChatFormat) -> int:
    """Tokens of the longest prompt with its answer or reference."""
    lengths = (
        len(chat.prompt_ids(item.prompt)) + max(room, len(chat.answer_ids(item.reference)))
        for task, items in tasks
        for room in [answer_tokens(task, items, chat)]
        for item in items
    )
    return max(lengths, default=1)


def refuse_what_is_too_long(
    tasks: list[tuple[Task, list[Item]]], base: Base, chat: ChatFormat, field: str
) -> None:
    """Raises UserError where a conversation does not fit into the context of the base."""
    needed, context = longest_conversation(tasks, chat) + ROOM, _context(base)
    if needed > context:
        raise UserError(
            f"{field}: a prompt with its answer takes up to {needed} tokens, {base.name} has room for {context}; leave "
            "out the longest, or lower the task's max_tokens"
        )


def _context(base: Base) -> int:
    return context_length(resolve(base, weights=False), unknown=1 << 30)


def model_of(
    config: Config, base: Base, base_name: str, adapters: dict[str, Path], max_model_len: int
) -> Model:
    """A base and adapters of an evaluation, as an endpoint serves them."""
    return Model.of_folders(base, base_name, [*adapters.values()], config.evaluation.dtype, max_model_len)


def resources_of(config: Config) -> Resources:
    """What every endpoint of an evaluation is started with."""
    return Resources(
        num_gpus=config.gpus_per_engine_and_node,
        nodes=config.synthesis.pipeline_parallel,
        wait_seconds=config.cluster.wait_seconds,
    )
