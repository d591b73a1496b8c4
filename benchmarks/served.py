"""A finished run judged twice, through its endpoint and by vLLM alone; writes benchmarks/served.json.

    python -m benchmarks.served RUN --task-data DIR

Both answer the same items: the run's own tasks, 200 questions of GSM8K and one of 20 of MMLU (DIR as for `crosslora
evaluate`), for the teacher and the student. By itself vLLM runs in a process of its own, without Ray, Serve and HTTP: the
harness's own vLLM backend, and a plain LLM for the run's tasks; with --plain-lora also without crosslora's form of LoRA on
CPU, which rounds elsewhere. In --dtype float32 rounding hardly makes a difference. `difference` is served - alone over
the items with its standard error; `identical` the share of greedy answers that are the same text, or of questions with the
same choice.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alone import alone
from crosslora import cluster
from crosslora.adapter import read_adapter
from crosslora.adapter_places import kept_source
from crosslora.config import Base, Config, Task
from crosslora.endpoint import serve_models
from crosslora.evaluation.client import ask
from crosslora.evaluation.evaluate import adapter_folders, model_of, resources_of
from crosslora.evaluation.harness import (
    LONGEST,
    Benchmark,
    Benchmarks,
    ask_harness,
    find_benchmarks,
    headline,
)
from crosslora.evaluation.results import SOURCE_BASE, STUDENT, TARGET_BASE, TEACHER, installed
from crosslora.evaluation.tasks import Answer, answer_tokens, read_items, score
from crosslora.models import load_tokenizer, resolve
from crosslora.precision import decided
from crosslora.progress import say
from crosslora.run_folder import RunFolder, config_of_run
from crosslora.text.pair import TokenizerPair
from crosslora.text.templates import ChatFormat
from crosslora.vllm_settings import environment, lora_options

HERE = Path(__file__).resolve().parent
ITEMS = {"gsm8k": 200, "mmlu": 702}


@dataclass(frozen=True)
class Given:
    """What a model answered to the items of a task."""

    metric: str
    scores: list[float]
    answers: list[Any]


@dataclass(frozen=True)
class Side:
    """A base and the adapter that is judged."""

    base: Base
    base_name: str
    adapter: Path


@dataclass(frozen=True)
class Questions:
    config: Config
    items: dict[str, int]
    """Of the harness's tasks."""
    task_data: Path
    plain_lora: bool

    def benchmarks(self) -> list[Any]:
        return [find_benchmarks([name], self.task_data, count) for name, count in self.items.items()]

    def own(self) -> Sequence[Task]:
        return self.config.evaluation.tasks


def served(side: Side, questions: Questions, chat: ChatFormat) -> dict[str, Given]:
    given, name = {}, side.adapter.name
    model = model_of(questions.config, side.base, side.base_name, {name: side.adapter}, LONGEST)
    with serve_models([model], resources_of(questions.config)) as endpoint:
        for task in questions.own():
            items = read_items(task)
            answers = ask(endpoint.url, name, items, chat, answer_tokens(task, items, chat), 32)
            given[task.name] = _own(task, answers)
        for benchmarks in questions.benchmarks():
            samples = ask_harness(endpoint.url, name, resolve(side.base), chat.stop_ids, benchmarks)
            given |= _of_samples(samples, benchmarks)
    return given


def given_by_vllm(side: Side, questions: Questions, stop_ids: frozenset[int]) -> dict[str, Given]:
    """The same by vLLM alone, in this process."""
    os.environ |= environment(len(os.sched_getaffinity(0)))
    import lm_eval
    import vllm
    from vllm import SamplingParams

    # the harness asks for the package's version, and the CPU build's package has another name
    known = metadata.version

    def package_version(distribution_name: str) -> str:
        return vllm.__version__ if distribution_name == "vllm" else known(distribution_name)

    metadata.version = package_version
    from lm_eval.models import vllm_causallms

    tokenizer = load_tokenizer(resolve(side.base))
    chat = ChatFormat(tokenizer, side.base.chat_template)
    lora = lora_options([side.adapter])
    ours = {} if questions.plain_lora else {"worker_extension_cls": "crosslora.vllm_worker.EndsWithReplica"}
    engine = vllm_causallms.VLLM(
        resolve(side.base),
        dtype=questions.config.evaluation.dtype,
        max_model_len=LONGEST,
        add_bos_token=tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
        lora_local_path=str(side.adapter),
        max_lora_rank=lora["max_lora_rank"],
        lora_target_modules=lora["lora_target_modules"],  # a wrapped lm_head breaks on prompt logprobs
        enforce_eager=True,
        max_num_batched_tokens=512,
        max_num_seqs=64,
        **ours,
    )

    def generate(task: Task) -> list[Answer]:
        items = read_items(task)
        prompts = [{"prompt_token_ids": chat.prompt_ids(item.prompt)} for item in items]
        sampling = SamplingParams(
            temperature=0, max_tokens=answer_tokens(task, items, chat), stop_token_ids=sorted(stop_ids)
        )
        outputs = engine.model.generate(prompts, sampling, lora_request=engine.lora_request)
        return [
            Answer(o.outputs[0].text, o.outputs[0].finish_reason == "stop", len(o.outputs[0].token_ids), 0, 0)
            for o in outputs
        ]

    given = {task.name: _own(task, generate(task)) for task in questions.own()}
    for benchmarks in questions.benchmarks():
        definitions = [benchmark.definition for benchmark in benchmarks.of_harness.values()]
        found = lm_eval.simple_evaluate(
            model=engine, tasks=definitions, samples=benchmarks.samples, bootstrap_iters=0
        )
        given |= _of_samples(found["samples"], benchmarks)
    return given


def _own(task: Task, answers: list[Answer]) -> Given:
    scores = score(task.metrics[0], answers, read_items(task))
    return Given(task.metrics[0], scores.tolist(), [answer.text for answer in answers])


def _of_samples(samples: dict[str, list[dict[str, Any]]], benchmarks: Benchmarks) -> dict[str, Given]:
    """Answers are texts, or the likeliest choice."""

    def answer(row: dict[str, Any]) -> Any:
        first = row["resps"][0][0]
        return first if isinstance(first, str) else int(np.argmax([choice[0][0] for choice in row["resps"]]))

    def given(name: str, benchmark: Benchmark) -> Given:
        metric, scores = headline(samples, benchmark)
        return Given(metric, scores.tolist(), [answer(row) for row in samples[name]])

    return {name: given(name, benchmark) for name, benchmark in benchmarks.of_harness.items()}


def compared(one: Given, two: Given) -> dict[str, Any]:
    difference = np.array(one.scores) - np.array(two.scores)
    same = [a == b for a, b in zip(one.answers, two.answers, strict=True)]
    return {
        "metric": one.metric,
        "n": len(difference),
        "served": float(np.mean(one.scores)),
        "alone": float(np.mean(two.scores)),
        "difference": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
        "identical": float(np.mean(same)),
    }


def judge(run: str, questions: Questions) -> Iterator[tuple[str, Any]]:
    """Teacher and student of the first adapter of a run: by task both scores and how alike they are."""
    config = questions.config
    folder = RunFolder.open(run)
    source = config.adapters[0]
    pair = TokenizerPair.load(config.source, config.target)
    with tempfile.TemporaryDirectory() as temporary:
        adapter = read_adapter(kept_source(folder, source.name).copy(Path(temporary) / "source"))
        exported = folder.sub(f"export/{source.name}")
        folders = adapter_folders(config, adapter, pair, exported, Path(temporary))
        sides = [
            (Side(config.source, SOURCE_BASE, folders[TEACHER]), pair.teacher),
            (Side(config.target, TARGET_BASE, folders[STUDENT]), pair.student),
        ]
        for side, chat in sides:
            by_vllm = alone(given_by_vllm, side, questions, chat.stop_ids)
            with cluster.session(config.cluster):
                by_endpoint = served(side, questions, chat)
            yield (
                side.adapter.name,
                {task: compared(given, by_vllm[task]) for task, given in by_endpoint.items()},
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--items", type=json.loads, default=ITEMS, help="JSON of task and number of items")
    parser.add_argument("--plain-lora", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="the run's own unless given")
    parser.add_argument("--out", type=Path, default=HERE / "served.json")
    given = parser.parse_args()
    config = config_of_run(given.run)
    if given.dtype:
        evaluation = config.evaluation.model_copy(update={"dtype": given.dtype})
        config = config.model_copy(update={"evaluation": evaluation})
    config = decided(config)
    questions = Questions(config, given.items, given.task_data, given.plain_lora)
    result: dict[str, Any] = {
        "versions": installed(),
        "dtype": config.evaluation.dtype,
        "plain_lora": given.plain_lora,
        "models": {},
    }
    for model, tasks in judge(given.run, questions):
        result["models"][model] = tasks
        given.out.write_text(json.dumps(result, indent=2) + "\n")
        say(f"{model}: {json.dumps(tasks)}")


if __name__ == "__main__":
    main()
