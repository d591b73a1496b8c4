"""Standard benchmarks: lm-evaluation-harness against the endpoints of a run's teacher, target base, baselines, student."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from crosslora import cluster
from crosslora.adapter import read_adapter
from crosslora.adapter_places import OF_TEACHER, kept_source
from crosslora.config import AdapterSource, Base, Config, Task
from crosslora.endpoint import serve_models
from crosslora.errors import UserError
from crosslora.evaluation.client import ask, served_models
from crosslora.evaluation.evaluate import (
    ROOM,
    adapter_folders,
    longest_conversation,
    model_of,
    refuse_what_is_too_long,
    resources_of,
)
from crosslora.evaluation.harness_tasks import DEFINED, local_tasks, spread
from crosslora.evaluation.metrics import bootstrap_interval, paired_difference, recovered_gain
from crosslora.evaluation.results import SOURCE_BASE, STUDENT, TARGET_BASE, TEACHER
from crosslora.evaluation.tasks import answer_tokens, read_items, score
from crosslora.models import context_length, load_tokenizer, resolve
from crosslora.progress import output, say
from crosslora.run_folder import RunFolder, config_of_run
from crosslora.text.pair import TokenizerPair
from crosslora.text.templates import ChatFormat

FILE = ".jsonl"
LONGEST = 2048
"""Tokens of a prompt and its answer; the harness cuts longer prompts on the left."""
USUAL_ANSWER = 256
"""Tokens that the harness leaves for an answer; a task that wants more gets a longer context."""
Scores = dict[str, tuple[str, np.ndarray]]
"""task -> its metric, and the score of every item [n]"""

Samples = dict[str, list[dict[str, Any]]]
"""task of the harness -> a record of every item"""


@dataclass(frozen=True)
class Benchmark:
    """What the user names: a task of the harness, or a group or tag of several."""

    definition: Any
    """What the harness is given: the name, or the whole configuration with its data."""
    tasks: Sequence[str]
    """Names of the harness's tasks that it is."""
    metric: str


@dataclass(frozen=True)
class Benchmarks:
    of_harness: dict[str, Benchmark]
    samples: dict[str, list[int]] | None = None
    """Which items of each task the harness is to take; None for all that there are in the data."""
    longest: int = LONGEST
    """Tokens of a prompt and its answer."""
    own: Sequence[Task] = ()
    """Prompt/completion files, asked as chats."""


def find_benchmarks(names: Sequence[str], task_data: Path | None, items: int | None) -> Benchmarks:
    """Tasks of the harness by name, and FILE.jsonl or FILE.jsonl:METRIC.

    With `task_data` the data of named tasks comes from that folder (see harness_tasks), without it from the hub.
    Raises UserError for tasks that are not known, unusable data, and where the harness is not installed.
    """
    own = [_own_task(name, items) for name in names if FILE in name]
    named = [name for name in names if FILE not in name]
    all_names = [*named, *(task.name for task in own)]
    if twice := next((name for name in all_names if all_names.count(name) > 1), None):
        raise UserError(
            f"--tasks: two tasks are named {twice!r}; rename a file, or run the command once for each"
        )
    if not named:
        return Benchmarks({}, own=own)
    return replace(_of_harness(named, task_data, items), own=own)


def _own_task(text: str, items: int | None) -> Task:
    file, _, metric = text.partition(f"{FILE}:")
    path = Path(file.removesuffix(FILE) + FILE)
    try:
        task = Task(name=path.stem, path=path, metrics=[metric or "exact_match"], items=items)
    except ValidationError as error:
        raise UserError(f"--tasks {text}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    read_items(task, "--tasks")  # refused before anything is served
    return task


def _of_harness(names: Sequence[str], task_data: Path | None, items: int | None) -> Benchmarks:
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; `pip install '.[harness]'`")
    if task_data is not None:
        definitions = local_tasks(names, task_data, items)
        metrics = [definition["metric_list"][0]["metric"] for definition in definitions]
        found = zip(names, definitions, metrics, strict=True)
        return Benchmarks({name: Benchmark(definition, [name], metric) for name, definition, metric in found})
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"--tasks {name}: the harness has no such task; `lm-eval ls tasks` lists them")
    try:  # fetches the data: what cannot be had is said before an engine starts
        loaded = {name: manager.load([name])["tasks"] for name in names}
    except ImportError as error:
        raise UserError(f"--tasks {','.join(names)}: {error}; install that package") from error
    except Exception as error:  # the hub client raises a different class for every cause
        raise UserError(
            f"--tasks {','.join(names)}: the data could not be fetched from the hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); check the network, or, for {' and '.join(DEFINED)}, give --task-data"
        ) from error
    counted = Counter(task for tasks in loaded.values() for task in tasks)
    if shared := sorted(task for task, count in counted.items() if count > 1):
        raise UserError(
            f"--tasks {','.join(names)}: several of these hold {shared[0]}; leave one of them out"
        )
    asked = [
        task.get_config("generation_kwargs") or {} for tasks in loaded.values() for task in tasks.values()
    ]
    answer = max(int(settings.get("max_gen_toks", USUAL_ANSWER)) for settings in asked)
    return Benchmarks(
        {name: Benchmark(name, list(tasks), _mean_metric(name, tasks)) for name, tasks in loaded.items()},
        None if items is None else _chosen(loaded.values(), items),
        LONGEST + max(answer - USUAL_ANSWER, 0),
    )


def _chosen(benchmarks: Iterable[dict[str, Any]], items: int) -> dict[str, list[int]]:
    """Of each benchmark about so many items, evenly spread over its tasks and at least one of each."""
    chosen = {}
    for tasks in benchmarks:
        sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
        for name, size in sizes.items():
            chosen[name] = spread(range(size), max(1, round(items * size / sum(sizes.values()))))
    return chosen


def _mean_metric(name: str, tasks: dict[str, Any]) -> str:
    """The first metric that is a mean over the items of every task of a benchmark, as intervals and differences need it."""
    metrics: list[dict[str, Any]] = [task.aggregation() for task in tasks.values()]
    means = [metric for metric in metrics[0] if all(_is_mean(of_task.get(metric)) for of_task in metrics)]
    if not means:
        of_all = " and ".join(sorted({metric for of_task in metrics for metric in of_task}))
        raise UserError(
            f"--tasks {name}: none of {of_all} is a mean over the items of all its tasks, which is compared here; "
            "leave it out, or name its tasks"
        )
    return means[0]


def _is_mean(joined_by: Any) -> bool:
    return getattr(joined_by, "__name__", "") == "mean"  # some are no functions


def evaluate_run(
    place: str, names: Sequence[str], task_data: Path | None, items: int | None, url: str | None = None
) -> dict[str, dict[str, Any]]:
    """Results of every adapter of a finished run, which are also added to RUN/harness/NAME/results.json.

    With `url` an endpoint that runs already is asked, for the models that `crosslora serve RUN --teacher` names.
    Raises UserError for a folder that holds no finished run, and an endpoint that does not serve it, besides what
    `find_benchmarks` raises.
    """
    folder, config = RunFolder.open(place), config_of_run(place)
    for source in config.adapters:
        if not folder.exists(f"export/{source.name}/manifest.json"):
            raise UserError(f"{place}: {source.name} is not exported; run `crosslora transfer` to its end")
    benchmarks = find_benchmarks(names, task_data, items)
    most = config.evaluation.baseline_items  # baselines hardly ever stop writing
    fewer = find_benchmarks(names, task_data, min(items or most, most))
    by_model = {STUDENT: benchmarks, TARGET_BASE: benchmarks, TEACHER: benchmarks}
    by_model |= dict.fromkeys(config.evaluation.baselines, fewer)
    pair = TokenizerPair.load(config.source, config.target)
    if url is None:
        own = [(task, read_items(task)) for task in benchmarks.own]
        refuse_what_is_too_long(own, config.source, pair.teacher, "--tasks")
        refuse_what_is_too_long(own, config.target, pair.student, "--tasks")
    results = {}
    for source in config.adapters:
        if url is None:
            # the run may have been made on a cluster that is gone; RAY_ADDRESS names the one to join
            with cluster.session(config.cluster.model_copy(update={"address": None})):
                scores = _serve_and_ask(config, source, folder, pair, by_model)
        else:
            scores = _ask_served(config, source, pair, by_model, url.rstrip("/"))
        by_task = {name: {model: given[name] for model, given in scores.items()} for name in scores[STUDENT]}
        results[source.name] = {"tasks": {name: _task_result(models) for name, models in by_task.items()}}
        _add(folder, f"harness/{source.name}/results.json", results[source.name]["tasks"])
    return results


def _add(folder: RunFolder, file: str, tasks: dict[str, Any]) -> None:
    """What was asked before stays."""
    before = folder.read_json(file)["tasks"] if folder.exists(file) else {}
    folder.write_json(file, {"tasks": before | tasks})


def _ask_served(
    config: Config, source: AdapterSource, pair: TokenizerPair, by_model: dict[str, Benchmarks], url: str
) -> dict[str, Scores]:
    """Ask a running endpoint for those of the models that it has."""
    names = {TEACHER: f"{source.name}{OF_TEACHER}", TARGET_BASE: config.target.name, STUDENT: source.name}
    served = served_models(url)
    if missing := [names[model] for model in (TARGET_BASE, STUDENT) if names[model] not in served]:
        raise UserError(
            f"--url {url}: does not serve {' and '.join(missing)} (but {', '.join(served) or 'nothing'}); start it with "
            f"`crosslora serve RUN --teacher`"
        )
    sides = {TEACHER: (config.source, pair.teacher)}
    own = [(task, read_items(task)) for task in by_model[STUDENT].own]
    for model, name in names.items():
        needed = longest_conversation(own, sides.get(model, (config.target, pair.student))[1])
        if needed > served.get(name, needed):  # vLLM would cut the answers without a word
            raise UserError(
                f"--url {url}: a prompt with its answer takes up to {needed} tokens, {name} has room for {served[name]}; "
                "start it with a larger --max-model-len"
            )
    return {
        model: _ask_all(url, name, by_model[model], *sides.get(model, (config.target, pair.student)), config)
        for model, name in names.items()
        if name in served
    }


def _serve_and_ask(
    config: Config,
    source: AdapterSource,
    folder: RunFolder,
    pair: TokenizerPair,
    by_model: dict[str, Benchmarks],
) -> dict[str, Scores]:
    with tempfile.TemporaryDirectory() as temporary:
        adapter = read_adapter(kept_source(folder, source.name).copy(Path(temporary) / "source"))
        exported = folder.sub(f"export/{source.name}")
        folders = adapter_folders(config, adapter, pair, exported, Path(temporary))
        teacher = {TEACHER: folders.pop(TEACHER)}
        scores = _scores(config, config.source, SOURCE_BASE, teacher, by_model, pair.teacher)
        return scores | _scores(config, config.target, TARGET_BASE, folders, by_model, pair.student)


def _scores(
    config: Config,
    base: Base,
    base_name: str,
    adapters: dict[str, Path],
    by_model: dict[str, Benchmarks],
    chat: ChatFormat,
) -> dict[str, Scores]:
    """Serve one base with its adapters, and put to each of them its benchmarks."""
    asked = by_model[STUDENT]
    longest = longest_conversation([(task, read_items(task)) for task in asked.own], chat) + ROOM
    longest = max(longest, min(asked.longest, context_length(resolve(base, weights=False), asked.longest)))
    served = model_of(config, base, base_name, adapters, longest)
    with serve_models([served], resources_of(config)) as endpoint:
        return {
            model: _ask_all(endpoint.url, model, by_model[model], base, chat, config)
            for model in endpoint.models
            if model in by_model
        }


def _ask_all(
    url: str, model: str, benchmarks: Benchmarks, base: Base, chat: ChatFormat, config: Config
) -> Scores:
    """All tasks, to one model on `base`."""
    samples = ask_harness(url, model, resolve(base, weights=False), chat.stop_ids, benchmarks)
    concurrency = config.evaluation.concurrency
    return {
        **{name: headline(samples, benchmark) for name, benchmark in benchmarks.of_harness.items()},
        **{task.name: _ask(url, model, task, chat, concurrency) for task in benchmarks.own},
    }


def _ask(url: str, model: str, task: Task, chat: ChatFormat, concurrency: int) -> tuple[str, np.ndarray]:
    items = read_items(task)
    answers = ask(url, model, items, chat, answer_tokens(task, items, chat), concurrency)
    return task.metrics[0], score(task.metrics[0], answers, items)


def ask_harness(
    url: str, model: str, tokenizer_folder: str, stop_ids: frozenset[int], benchmarks: Benchmarks
) -> Samples:
    """Put the harness's benchmarks to one model of an OpenAI-compatible endpoint; OPENAI_API_KEY is its key, if it wants
    one. Raises UserError where the endpoint refuses a request."""
    if not benchmarks.of_harness:
        return {}
    import lm_eval
    from aiohttp import ClientError

    from crosslora.evaluation.choices import ChoicesAtOnce

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    say(f"  {model}")
    tokenizer = load_tokenizer(tokenizer_folder)
    client = ChoicesAtOnce(
        stop_ids,
        model=model,
        base_url=f"{url}/completions",
        tokenizer=tokenizer_folder,
        tokenizer_backend="huggingface",
        # by the tokenizer's own rule; left to itself, the harness never adds one
        add_bos_token=tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
        num_concurrent=64,
        max_retries=8,  # half a minute: a dead engine is replaced meanwhile
        max_length=min(benchmarks.longest, *(served_models(url).values())),
        timeout=3600,
    )
    try:
        found = lm_eval.simple_evaluate(
            model=client,
            tasks=[benchmark.definition for benchmark in benchmarks.of_harness.values()],
            samples=benchmarks.samples,
            bootstrap_iters=0,
        )
    except ClientError as error:
        raise UserError(f"{url}: does not answer {model} ({error}); its log says why") from error
    samples: Samples = found["samples"]
    return samples


def headline(samples: Samples, benchmark: Benchmark) -> tuple[str, np.ndarray]:
    """Metric of a benchmark and its value for every item of all its tasks, by the first answer filter."""
    rows = [row for task in sorted(benchmark.tasks) for row in samples[task]]
    kept = [row for row in rows if row["filter"] == rows[0]["filter"]]
    return benchmark.metric, np.array([float(row[benchmark.metric]) for row in kept])


def _task_result(models: dict[str, tuple[str, np.ndarray]]) -> dict[str, Any]:
    """As a task in results.json, with the paired difference of student and target base and with standard errors."""
    metric, values = models[STUDENT][0], {model: scores for model, (_, scores) in models.items()}
    difference = paired_difference(values[STUDENT], values[TARGET_BASE])
    return {
        "metric": metric,
        "n": len(values[STUDENT]),
        "models": {
            model: {"n": len(scores), "metrics": {metric: _summary(scores)}}
            for model, scores in values.items()
        },
        "student_minus_base": dict(zip(("mean", "low", "high"), difference, strict=True)),
        "rho_teacher": asdict(recovered_gain(values[STUDENT], values[TARGET_BASE], values[TEACHER]))
        if TEACHER in values
        else None,
    }


def _summary(scores: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(scores)
    error = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else 0.0
    return {"mean": float(scores.mean()), "low": low, "high": high, "standard_error": error}


def show(results: dict[str, dict[str, Any]]) -> None:
    """A table for people."""
    caption = "mean and standard error; student - target base: paired difference, 95% interval"
    table = Table(caption=caption)
    for column in ("adapter", "task", "model"):
        table.add_column(column)
    for column in ("n", "score", "student - target base"):
        table.add_column(column, justify="right")
    for adapter, result in results.items():
        for name, task in result["tasks"].items():
            for model, given in task["models"].items():
                score, change = given["metrics"][task["metric"]], task["student_minus_base"]
                difference = f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
                table.add_row(
                    *(escape(text) for text in (adapter, f"{name} ({task['metric']})", model)),
                    str(given["n"]),
                    f"{score['mean']:.3f} ± {score['standard_error']:.3f}",
                    difference if model == STUDENT else "",
                )
    output().print(table)
