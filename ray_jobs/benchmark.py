"""Tokens per second of synthesis and of fitting, at several numbers of engines and workers, as a Ray job:

ray job submit --working-dir . -- python ray_jobs/benchmark.py --config CONFIG cluster.address=auto \\
    --engines 1 2 --workers 1 2

Prints JSON and keeps it in RUN/benchmark/benchmark.json. Per GPU, or per CPU core where the configuration has none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from crosslora import cluster
from crosslora.config import Config, load_config, parse_config
from crosslora.errors import said_in_a_sentence
from crosslora.pipeline import filter_corpus
from crosslora.run_folder import RunFolder, Stage, below
from crosslora.teacher.synthesize import synthesize
from crosslora.training.fit import fit


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML configuration")
    parser.add_argument("--engines", type=int, nargs="+", default=[1])
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--samples", type=int, default=600, help="for each engine to generate, in one shard")
    parser.add_argument("--steps", type=int, default=20, help="of fitting")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as cluster.address=auto")
    arguments = parser.parse_args()
    with said_in_a_sentence():
        print(json.dumps(benchmark(load_config(arguments.config, arguments.overrides), arguments), indent=2))


def benchmark(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both series, made anew; the corpus of the most engines is what is fitted on."""
    config = config.model_copy(update={"run": below(config.run, "benchmark")})
    folder = RunFolder.open(config.run)
    fits = {n: _fit_config(config, n, arguments.steps) for n in sorted(arguments.workers)}  # or refuses
    with folder.writing(), cluster.session(config.cluster):
        for stage in ("synthesize", "filter", "fit"):
            folder.remove(stage)
        rows: dict[str, list[dict[str, Any]]] = {"synthesis": [], "fit": []}
        result = {**rows, "config": config.model_dump(mode="json")}

        def keep(series: str, row: dict[str, Any]) -> None:
            rows[series].append(row)
            folder.write_json("benchmark.json", result)  # a later row may not come about

        for n in sorted(arguments.engines):
            keep("synthesis", _synthesis(config, folder, n, arguments.samples))
        corpus = folder.stage(f"synthesize/{max(arguments.engines)}", {})
        filtered = folder.stage("filter/all", {})
        filter_corpus(config, corpus, filtered)
        for n, fit_config in fits.items():
            keep("fit", _fit(fit_config, folder, n, (corpus, filtered)))
    return result


def _synthesis(config: Config, folder: RunFolder, engines: int, samples: int) -> dict[str, Any]:
    settings = {"engines": engines, "samples": engines * samples, "shard_size": samples, "minutes": None}
    config = _with(config, "synthesis", settings)
    gpus = config.gpus_per_engine_and_node
    bundles = cluster.engine_bundles(gpus, config.synthesis.pipeline_parallel, engines)
    # of all: one that comes later would find its shard taken
    cluster.require(bundles[0], engines * len(bundles), "synthesize", config.cluster.wait_seconds)
    manifest = synthesize(config, config.adapters[0].path, folder.stage(f"synthesize/{engines}", {}))
    rate = manifest["response_tokens_per_second"]
    per_device = _per_device(rate, engines, gpus * config.synthesis.pipeline_parallel)
    return {"engines": engines, "response_tokens_per_second": rate, **per_device}


def _fit_config(config: Config, workers: int, steps: int) -> Config:
    settings = {"workers": workers, "steps": steps, "checkpoint_every": steps, "evaluate_every": steps}
    return _with(config, "fit", settings)


def _fit(config: Config, folder: RunFolder, workers: int, corpus: tuple[Stage, Stage]) -> dict[str, Any]:
    stage = folder.stage(f"fit/{workers}", {"workers": workers})
    rate = fit(config, config.adapters[0].path, (corpus[0].name, corpus[1].name), stage)["tokens_per_second"]
    return {
        "workers": workers,
        "tokens_per_second": rate,
        **_per_device(rate, workers, config.cluster.gpus_per_worker),
    }


def _with(config: Config, section: str, settings: dict[str, Any]) -> Config:
    """The configuration with other settings, checked anew."""
    tree = config.model_dump(mode="json")
    return parse_config({**tree, section: {**tree[section], **settings}}, Path.cwd())


def _per_device(rate: float, parts: int, gpus: float) -> dict[str, float]:
    if gpus:
        return {"per_gpu": round(rate / (parts * gpus), 1)}
    return {"per_core": round(rate / (parts * cluster.cpus_per_share(parts)), 1)}


if __name__ == "__main__":
    main()
