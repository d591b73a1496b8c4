"""The whole run on one page: plan, synthesize, filter, fit, export, evaluate.

Every stage is a pure function of its inputs and keeps its results in the run folder under a digest of them. Done
work is never done again; a run that was killed goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from crosslora import cluster
from crosslora.adapter import Adapter, read_adapter
from crosslora.adapter_places import keep_source
from crosslora.config import AdapterSource, Config
from crosslora.endpoint import free_port, refuse_a_second_server
from crosslora.errors import UserError
from crosslora.evaluation.evaluate import evaluate, refuse_what_is_too_long
from crosslora.evaluation.tasks import read_items
from crosslora.export import export
from crosslora.identity import base_identity, prompt_identity, source_identity, task_identity
from crosslora.models import embedding_place, resolve, trainable_config
from crosslora.plan import make_plan
from crosslora.progress import say
from crosslora.redo import Redo, check_stage
from crosslora.run_folder import STAGES, RunFolder, Stage, below, digest
from crosslora.teacher.corpus import read_samples, write_verdicts
from crosslora.teacher.filters import KEPT, count_by_verdict, verdicts
from crosslora.teacher.prompts import check_prompts, read_prompts
from crosslora.teacher.synthesize import check_room, synthesize
from crosslora.text.pair import TokenizerPair
from crosslora.training.fit import fit
from crosslora.vllm_settings import lora_options

AMOUNT = {"samples", "minutes"}
"""How much is generated: with other values synthesis goes on from what it has, once `--redo filter` says so where it was filtered."""
GENERATION = {
    "prompts",
    "top_k",
    "prompt_temperature",
    "response_temperature",
    "max_prompt_tokens",
    "max_response_tokens",
    "engine",
    "dtype",
    "shard_size",
    "random_seed",
}
HOW_IT_IS_FITTED = {
    "workers",
    "zero_stage",
    "micro_batches",
    "gradient_checkpointing",
    "checkpoint_every",
    "max_failures",
}
"""What changes no result beyond rounding: a fit that was begun with other values of these goes on."""
FILTERS = {"min_adapter_effect", "max_similarity", "held_out", "min_kept", "random_seed"}


@dataclass(frozen=True)
class TransferredAdapter:
    """One adapter on the target base."""

    name: str
    folder: str
    """An ordinary PEFT folder: a path or, where the run is one, a URI."""
    results: dict[str, Any]
    """What results.json holds."""


@dataclass(frozen=True)
class TransferResult:
    run: str
    adapters: list[TransferredAdapter]
    """Those that went through all stages."""


def transfer(config: Config, redo: str | None = None, until: str | None = None) -> TransferResult:
    """Move every adapter of the configuration to the target base.

    `redo` names a stage whose results, and those of the stages after it, are made again: STAGE of every adapter of the
    configuration, or STAGE/NAME of one. `until` names the last stage to run. Raises UserError for what the user can
    mend; finished stages are kept.
    """
    again = Redo.parse(redo, [source.name for source in config.adapters])
    check_stage("--until", until)
    folder = RunFolder.open(config.run)
    with folder.writing():
        check_inputs(config)
        plan = make_plan(config)
        for source in config.adapters:
            _check_former(config, source, folder, again.first(source.name))
        for warning in plan.warnings:
            say(f"[yellow]warning:[/yellow] {escape(warning)}")
        with cluster.session(config.cluster):
            done = redo is None and len(_evaluated(config, folder)) == len(config.adapters)
            if until in (None, STAGES[-1]) and not done:
                refuse_a_second_server()
            cluster.check_here(config, _to_do(config, folder, again, until))
            for name in again.names:  # after all checks: what is refused loses nothing
                again.forget(folder, name)
            folder.write_json("run.json", {"config": config.model_dump(mode="json")})
            folder.write_json("plan.json", plan.as_dict())
            for source in config.adapters:
                _transfer_one(config, source, folder, until)
    return TransferResult(config.run, [_moved(folder, name) for name in _evaluated(config, folder)])


def _to_do(config: Config, folder: RunFolder, again: Redo, until: str | None) -> list[str]:
    """Stages that some adapter still has before it."""
    last = STAGES.index(until) if until else len(STAGES)
    open_ = [
        {stage for stage in STAGES if not folder.exists(f"{stage}/{source.name}/manifest.json")}
        | set(STAGES[STAGES.index(first) :] if (first := again.first(source.name)) else ())
        for source in config.adapters
    ]
    return [stage for stage in STAGES[: last + 1] if any(stage in stages for stages in open_)]


def _evaluated(config: Config, folder: RunFolder) -> list[str]:
    names = [source.name for source in config.adapters]
    return [name for name in names if folder.exists(f"evaluate/{name}/manifest.json")]


def check_inputs(config: Config) -> None:
    """What a late stage would stumble over, said before the first one starts. Raises UserError."""
    tasks = [(task, read_items(task)) for task in config.evaluation.tasks]
    prompts = config.synthesis.prompts
    for path, field in ((prompts.seeds_file, "seeds_file"), (prompts.prompts_file, "prompts_file")):
        if path is not None:
            read_prompts(path, field)
    free_port("127.0.0.1", config.evaluation.port)
    for adapter in config.adapters:
        read_adapter(adapter.path)
    lora_options([adapter.path for adapter in config.adapters])  # evaluation serves them with vLLM
    trainable_config(resolve(config.target, weights=False))
    pair = TokenizerPair.load(config.source, config.target)
    check_prompts(prompts, pair.teacher)
    check_room(config, pair.teacher)
    for base, chat in ((config.source, pair.teacher), (config.target, pair.student)):
        embedding_place(resolve(base))
        refuse_what_is_too_long(tasks, base, chat, "evaluation.tasks")


def _check_former(config: Config, source: AdapterSource, folder: RunFolder, redo: str | None) -> None:
    """Refuse a run whose stages, those from `redo` on aside, were made from other inputs."""
    adapter, former = read_adapter(source.path), None
    for stage in STAGES[: STAGES.index(redo)] if redo else STAGES:
        name = f"{stage}/{source.name}"
        if not folder.exists(f"{name}/inputs.json"):
            return
        former = folder.stage(name, INPUTS[stage](config, adapter, former))
        if not former.done:
            return


def _transfer_one(config: Config, source: AdapterSource, folder: RunFolder, until: str | None) -> None:
    say(f"[bold]{source.name}[/bold]")
    for stage in _stages(config, source, folder):
        if stage.name == f"{until}/{source.name}":
            return


def _moved(folder: RunFolder, name: str) -> TransferredAdapter:
    return TransferredAdapter(
        name, below(folder.uri, f"export/{name}"), folder.read_json(f"evaluate/{name}/results.json")
    )


def _stages(config: Config, source: AdapterSource, folder: RunFolder) -> Iterator[Stage]:
    """Runs a stage, or finds it done, and yields it."""
    name = source.name
    adapter = read_adapter(source.path)
    corpus = folder.stage(f"synthesize/{name}", INPUTS["synthesize"](config, adapter, None))
    _once(corpus, lambda: synthesize(config, source.path, corpus), _is_as_much(config, corpus))
    keep_source(folder, source)
    yield corpus
    filtered = folder.stage(f"filter/{name}", INPUTS["filter"](config, adapter, corpus))
    _once(filtered, lambda: filter_corpus(config, corpus, filtered))
    counts = filtered.manifest()["counts"]
    say("  samples: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    yield filtered
    parts = (corpus.name, filtered.name)
    fitted = folder.stage(f"fit/{name}", INPUTS["fit"](config, adapter, filtered))
    _once(fitted, lambda: fit(config, source.path, parts, fitted))
    yield fitted
    exported = folder.stage(f"export/{name}", INPUTS["export"](config, adapter, fitted))
    _once(exported, lambda: export(config, adapter, fitted, exported, filtered.manifest()))
    yield exported
    evaluated = folder.stage(f"evaluate/{name}", INPUTS["evaluate"](config, adapter, exported))
    kl = fitted.manifest()["held_out_kl"]
    _once(evaluated, lambda: evaluate(config, adapter, parts, exported, kl, evaluated))
    yield evaluated


def _synthesis_inputs(config: Config, adapter: Adapter, former: Any) -> dict[str, Any]:
    settings = config.synthesis.model_dump(mode="json")
    # what the files hold counts, not where they lie: a job unpacks them elsewhere every time
    weights = config.synthesis.prompts.model_dump(exclude={"seeds_file", "prompts_file"})
    return {
        "teacher": source_identity(config.source, adapter),
        "synthesis": {key: settings[key] for key in sorted(GENERATION)} | {"prompts": weights},
        "prompt_files": prompt_identity(config.synthesis.prompts),
    }


def _filter_inputs(config: Config, adapter: Adapter, corpus: Stage) -> dict[str, Any]:
    settings = config.synthesis.model_dump(mode="json")
    return {
        "corpus": corpus.digest,
        "synthesis": {key: settings[key] for key in sorted(AMOUNT)},
        "filters": {key: settings[key] for key in sorted(FILTERS)},
    }


def filter_corpus(config: Config, corpus: Stage, filtered: Stage) -> dict[str, Any]:
    """One verdict per sample; raises UserError where too few are kept. The samples stay as they are."""
    samples = read_samples(corpus.folder, corpus.name)
    rows = verdicts(samples, config.synthesis)
    counts = count_by_verdict(rows)
    kept = counts.get(KEPT, 0)
    if kept < config.synthesis.min_kept:
        removed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if verdict != KEPT)
        raise UserError(
            f"filter: {kept} of {len(samples)} samples were kept, synthesis.min_kept asks for "
            f"{config.synthesis.min_kept} (removed: {removed or 'none; the teacher wrote no prompts'}); raise "
            "synthesis.samples or synthesis.minutes, give seed examples or prompts, or loosen the filter"
        )
    write_verdicts(filtered.folder, filtered.name, rows)
    return filtered.finish({"counts": counts, "verdicts": digest(rows)})


def _fit_inputs(config: Config, adapter: Adapter, filtered: Stage) -> dict[str, Any]:
    return {
        "corpus": filtered.manifest(),
        "adapter": adapter.digest,
        "target": base_identity(config.target),
        "fit": config.fit.model_dump(mode="json", exclude=HOW_IT_IS_FITTED),
    }


def _export_inputs(config: Config, adapter: Adapter, fitted: Stage) -> dict[str, Any]:
    target = config.target  # as the adapter and its card name it
    return {"fit": fitted.manifest(), "base": target.base, "revision": target.revision}


def _evaluation_inputs(config: Config, adapter: Adapter, exported: Stage) -> dict[str, Any]:
    elsewhere: Any = {"port": True, "concurrency": True, "tasks": {"__all__": {"path"}}}
    settings = config.evaluation.model_dump(mode="json", exclude=elsewhere)
    return {
        "adapter": exported.manifest(),
        "evaluation": settings,
        "tasks": [task_identity(task) for task in config.evaluation.tasks],
    }


INPUTS: dict[str, Callable[[Config, Adapter, Any], dict[str, Any]]] = {
    "synthesize": _synthesis_inputs,
    "filter": _filter_inputs,
    "fit": _fit_inputs,
    "export": _export_inputs,
    "evaluate": _evaluation_inputs,
}
"""What a stage is made from: (configuration, source adapter, the stage before it)."""


def _is_as_much(config: Config, corpus: Stage) -> bool:
    """Whether a finished synthesis had as many samples to generate, and as much time."""
    if not corpus.done:
        return False
    made, minutes = corpus.manifest(), config.synthesis.minutes
    had_time = made["minutes"] is None or (minutes is not None and minutes <= made["minutes"])
    return bool(made["samples"] == config.synthesis.samples and had_time)


def _once(stage: Stage, work: Any, enough: bool = True) -> None:
    if stage.done and enough:
        say(f"  {stage.name}: done before")
        return
    if stage.done:
        stage.reopen()
    stage.event("start")
    work()
    stage.event("done")
