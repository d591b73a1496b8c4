"""What `crosslora evaluate` refuses before it serves anything, and how it sums up."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api import metrics

from crosslora.errors import UserError
from crosslora.evaluation.harness import (
    Benchmark,
    _add,
    _chosen,
    _mean_metric,
    _task_result,
    evaluate_run,
    find_benchmarks,
    headline,
)
from crosslora.run_folder import RunFolder


def test_a_task_that_the_harness_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="--tasks mmlou: the harness has no such task"):
        find_benchmarks(["gsm8k", "mmlou"], None, None)


def test_files_of_prompts_are_tasks(tmp_path: Path) -> None:
    file = tmp_path / "check.jsonl"
    file.write_text('{"prompt": "p", "completion": {"a:b": 1}}\n' * 3)
    (task,) = find_benchmarks([f"{file}:json_field:a:b"], None, 2).own
    assert (task.name, task.path, task.metrics, task.items) == ("check", file, ["json_field:a:b"], 2)
    (task,) = find_benchmarks([str(file)], None, None).own
    assert task.metrics == ["exact_match"]
    with pytest.raises(UserError, match=r"--tasks .*check\.jsonl:bleu: 'bleu' is none of exact_match, f1"):
        find_benchmarks([f"{file}:bleu"], None, None)
    with pytest.raises(UserError, match="cannot be read"):
        find_benchmarks([str(tmp_path / "none.jsonl")], None, None)


def test_folders_without_a_finished_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run\.json"):
        evaluate_run(str(tmp_path), ["mmlu"], None, None)
    config = {
        "run": str(tmp_path),
        "source": {"base": "a/b"},
        "adapters": [{"name": "mine", "path": "p"}],
        "target": {"base": "c/d"},
    }
    (tmp_path / "run.json").write_text(json.dumps({"config": config}))
    with pytest.raises(UserError, match="mine is not exported; run `crosslora transfer` to its end"):
        evaluate_run(str(tmp_path), ["mmlu"], None, None)


def test_a_group_is_all_its_tasks_under_the_first_filter() -> None:
    def row(filter_name: str, right: float) -> dict[str, object]:
        return {"metrics": ["acc", "other"], "filter": filter_name, "acc": right, "other": 9.0}

    samples = {
        "mmlu_zoology": [row("none", 1.0)],
        "mmlu_anatomy": [row("none", 0.0), row("loose", 1.0)],
        "mmlu_pro_law": [row("none", 1.0)],
    }
    metric, scores = headline(samples, Benchmark("mmlu", ["mmlu_zoology", "mmlu_anatomy"], "acc"))
    assert (metric, scores.tolist()) == ("acc", [0.0, 1.0])


class Perplexities:
    """A task whose metrics are no means."""

    def __init__(self, **metrics: Callable[[list[float]], float]) -> None:
        self.metrics = metrics

    def aggregation(self) -> dict[str, Callable[[list[float]], float]]:
        return self.metrics


def test_a_metric_that_is_no_mean_over_items_is_refused() -> None:
    assert (
        _mean_metric("lambada", {"lambada": Perplexities(perplexity=metrics.perplexity, acc=metrics.mean)})
        == "acc"
    )
    with pytest.raises(UserError, match="--tasks wikitext: none of bits_per_byte is a mean over the items"):
        _mean_metric("wikitext", {"wikitext": Perplexities(bits_per_byte=metrics.bits_per_byte)})


def test_the_metric_of_a_group_is_one_that_all_its_tasks_have() -> None:
    choices = Perplexities(acc=metrics.mean, acc_norm=metrics.mean)
    squad = Perplexities(f1=partial(metrics.mean), acc_norm=metrics.mean)
    assert _mean_metric("group", {"choices": choices, "squad": squad}) == "acc_norm"
    with pytest.raises(UserError, match="--tasks group: none of acc and exact_match is a mean"):
        _mean_metric(
            "group", {"a": Perplexities(acc=metrics.mean), "b": Perplexities(exact_match=metrics.mean)}
        )


class Questions:
    def __init__(self, size: int) -> None:
        self.eval_docs: list[dict[str, str]] = [{}] * size


def test_items_of_a_group_are_spread_over_its_tasks() -> None:
    """`items` is of the benchmark, not of each of its tasks; every task has one at least."""
    group = {"a": Questions(100), "b": Questions(300), "c": Questions(2)}
    chosen = _chosen([group, {"alone": Questions(8)}], 40)
    assert {name: len(indices) for name, indices in chosen.items()} == {"a": 10, "b": 30, "c": 1, "alone": 8}
    assert chosen["a"] == list(range(0, 100, 10))


def test_what_was_asked_before_stays(tmp_path: Path) -> None:
    folder = RunFolder.open(str(tmp_path))
    for tasks in ({"mmlu": 1, "gsm8k": 1}, {"gsm8k": 2}):
        _add(folder, "results.json", tasks)
    assert folder.read_json("results.json") == {"tasks": {"mmlu": 1, "gsm8k": 2}}


def test_the_difference_is_paired_and_the_gain_needs_a_gain() -> None:
    base = np.tile([0.0, 1.0], 100)
    better = np.where(np.arange(200) % 10 == 0, 1.0, base)
    result = _task_result(
        {"teacher": ("acc", base), "target_base": ("acc", base), "student": ("acc", better)}
    )
    difference = result["student_minus_base"]
    assert difference["mean"] == pytest.approx(0.1) and difference["low"] > 0
    assert result["rho_teacher"]["value"] is None and "nothing to recover" in result["rho_teacher"]["reason"]
    summary = result["models"]["target_base"]["metrics"]["acc"]
    assert summary["standard_error"] == pytest.approx(0.5 / np.sqrt(199))
