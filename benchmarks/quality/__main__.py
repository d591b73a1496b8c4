"""Run cells of the quality benchmark, one JSON file each; finished ones are kept.

    python -m benchmarks.quality --tasks snips --methods default oracle --random-seeds 0 1 2
    python -m benchmarks.quality --summary

From the root of a checkout, after `make models`. Without arguments: every direction, task and method with three random
seeds, which takes many hours on two cores; it can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool

from rich.markup import escape

from benchmarks.alone import alone
from benchmarks.quality.answers import greedy, nats
from benchmarks.quality.cells import DIRECTIONS, SEEDLESS, Cell, conditions
from benchmarks.quality.methods import METHODS, make_source_adapter
from benchmarks.quality.summary import summarise
from benchmarks.quality.tasks import TASKS
from crosslora.errors import UserError
from crosslora.evaluation.tasks import Item, score
from crosslora.progress import say


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--random-seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--summary", action="store_true", help="only write table and chart of what there is")
    given = parser.parse_args()
    failed = []
    for cell in () if given.summary else cells(given):
        if not cell.result_file.exists():
            say(f"[bold]{cell.name}[/bold]")
            try:
                run(cell)
            except (UserError, BrokenProcessPool) as error:  # refused, or killed for its memory
                say(f"[red]{cell.name}: {escape(str(error))}[/red]")
                failed.append(cell.name)
    summarise()
    if failed:
        sys.exit(f"not made: {', '.join(failed)}")


def cells(given: argparse.Namespace) -> Iterator[Cell]:
    """One random seed after the other, so that a run that is stopped has something of everything."""
    for seed in given.random_seeds:
        for task in given.tasks:
            for direction in given.directions:
                for method in given.methods:
                    if seed == given.random_seeds[0] or method not in SEEDLESS:
                        yield Cell(direction, task, method, 0 if method in SEEDLESS else seed)


def run(cell: Cell) -> None:
    make_source_adapter(cell)
    report = METHODS[cell.method](cell)
    base = cell.bases[0] if cell.method == "teacher" else cell.bases[1]
    adapter = {"target_base": None, "teacher": cell.source_adapter}.get(cell.method, cell.folder)
    test = cell.rows[1]
    scores = {"nats": [-value for value in alone(nats, base, adapter, test)]}
    ended = None
    if others := [metric for metric in cell.setting.metrics if metric != "nats"]:
        answers = alone(greedy, base, adapter, test, cell.setting.max_tokens)
        items = [Item(row["prompt"], row["completion"]) for row in test]
        scores |= {metric: score(metric, answers, items).tolist() for metric in others}
        ended = sum(answer.ended for answer in answers) / len(answers)
    cell.write(
        conditions()
        | {
            "n": len(test),
            "ended": ended,
            "report": report,
            "scores": {metric: [round(value, 4) for value in values] for metric, values in scores.items()},
        }
    )
    headline = cell.setting.metrics[0]
    say(f"  {headline} {sum(scores[headline]) / len(test):.3f}")


if __name__ == "__main__":
    main()
