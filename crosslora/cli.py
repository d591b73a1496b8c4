"""The `crosslora` command. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from crosslora import __version__
from crosslora.errors import said_in_a_sentence

app = typer.Typer(
    help="Move a LoRA adapter to another base model without its training data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML configuration, such as examples/snips/demo.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override, such as -s fit.steps=100."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"crosslora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Exit codes: 0 done, 1 failed, 2 something you can mend (one sentence says what)."""


@app.command()
def transfer(
    config: ConfigPath,
    overrides: Overrides = None,
    redo: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE[/NAME]", help="Make this stage and what follows again, of all adapters or of one."
        ),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    as_json: Json = False,
) -> None:
    """Run all stages: synthesize, filter, fit, export, evaluate. The same command goes on after an interruption."""
    from crosslora.compare import compare, show
    from crosslora.config import load_config
    from crosslora.pipeline import transfer as run
    from crosslora.run_folder import below

    result = run(load_config(config, overrides), redo, until)
    if as_json:
        _print_json(
            {adapter.name: {"folder": adapter.folder, **adapter.results} for adapter in result.adapters}
        )
        return
    if result.adapters:
        show(compare([result.run], [adapter.name for adapter in result.adapters]))
    for adapter in result.adapters:
        print(f"adapter: {adapter.folder}")
        print(f"report:  {below(result.run, f'evaluate/{adapter.name}/report.html')}")


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a configuration without loading anything."""
    from crosslora.config import load_config

    load_config(config, overrides)
    print(f"{config}: valid")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="KIND", help="Also for GPUs of this kind, such as H100-80GB.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many.  [default: as few as will do]")] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Also see whether the Ray cluster can hold it as it is now; without one, this machine.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a transfer will do and need, from headers (a GGUF base is converted first): on GPUs also settings that fit,
    hours and cost."""
    from crosslora import cluster
    from crosslora.config import load_config
    from crosslora.errors import UserError
    from crosslora.plan import make_plan
    from crosslora.plan_table import show
    from crosslora.progress import say

    if gpus is not None and gpu is None:
        raise UserError(f"--gpus {gpus}: of which kind? add --gpu, such as --gpu H100-80GB")
    settings = load_config(config, overrides)
    made = make_plan(settings, gpu, gpus)
    if check:
        with cluster.session(settings.cluster):
            cluster.check(settings)
        say("the Ray cluster can hold it")
    if as_json:
        _print_json(made.as_dict())
    else:
        show(made)


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="Run folder: a path or URI.")], as_json: Json = False
) -> None:
    """Show how far a run is."""
    from crosslora.run_folder import RunFolder, stage_states

    states = stage_states(RunFolder.open(run))
    if as_json:
        _print_json(states)
        return
    for stage, state in states.items():
        print(f"{stage:32} {state}")


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="Run folder: a path or URI.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="With commas: tasks of lm-evaluation-harness, and files of prompts and completions as FILE.jsonl or "
            "FILE.jsonl:METRIC (exact_match, f1, rouge_l, json_slots, json_field:NAME, regex:PATTERN)."
        ),
    ] = "mmlu,gsm8k",
    task_data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Take mmlu and gsm8k from DIR/mmlu/test/*.csv and DIR/gsm8k_*.jsonl."
        ),
    ] = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="About so many items of a benchmark or file.  [default: all]")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Ask this OpenAI-compatible endpoint (of `crosslora serve RUN --teacher`, say), and no baselines: "
            "http://127.0.0.1:8000/v1, its key in OPENAI_API_KEY.  [default: serve everything for the time of it]"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put standard benchmarks to the teacher, the target base, the baselines and the student of a finished run.

    They are served here, or on the Ray cluster that RAY_ADDRESS names."""
    from crosslora.evaluation.harness import evaluate_run, show

    names = re.split(r",(?!(?:\\.|[^(\[{\\])*[)\]}])", tasks)  # a comma in brackets belongs to a pattern
    results = evaluate_run(run, [name.strip() for name in names], task_data, items, url)
    if as_json:
        _print_json(results)
    else:
        show(results)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders: paths or URIs.")],
    as_json: Json = False,
) -> None:
    """Show the scores of finished runs side by side, with 95% intervals."""
    from dataclasses import asdict

    from crosslora.compare import compare as run
    from crosslora.compare import show

    rows = run(runs)
    if as_json:
        _print_json([asdict(row) for row in rows])
    else:
        show(rows)


@app.command()
def serve(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_ADAPTER...", help="Runs, PEFT folders, or folders of PEFT folders: paths or URIs."
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model; left out, the one that the adapters name.")
    ] = None,
    teacher: Annotated[
        bool,
        typer.Option(
            "--teacher", help="Serve the source base with the source adapters too; the places are runs."
        ),
    ] = False,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to others.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="What the engines compute in; auto: bfloat16 where the device multiplies it."),
    ] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=16, help="Longest prompt and answer, in tokens.  [default: up to 4096]")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of a replica; 0 serves on CPU.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a replica.  [default: an equal share of all]")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Engines of a base side by side, on any node.")] = 1,
    autoscaling: Annotated[
        str | None,
        typer.Option(
            metavar="YAML",
            help="Ray Serve's autoscaling settings, in place of --replicas: '{min_replicas: 1, max_replicas: 4}'.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="CROSSLORA_API_KEY", help="Token that every request to /v1 must then carry."),
    ] = None,
    write_config: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Serve nothing; write DIR/serve.yaml for `serve deploy` and DIR/rayservice.yaml for KubeRay, "
            "which listens on port 8000 of all addresses.",
        ),
    ] = None,
) -> None:
    """Serve moved adapters and their base, OpenAI-compatible, until Ctrl-C. What lies in the places is what is served:
    adapters may come, change and go meanwhile."""
    from crosslora import serve as serve_command

    settings = serve_command.settings(
        places=places,
        base=base,
        teacher=teacher,
        dtype=dtype,
        max_model_len=max_model_len,
        gpus=gpus,
        threads=threads,
        replicas=replicas,
        autoscaling=autoscaling,
    )
    if write_config is None:
        serve_command.serve(settings, host, port, api_key)
    else:
        for path in serve_command.write_config(settings, write_config, host, port):
            print(path)
        if api_key:
            print("the API key is not in there: set CROSSLORA_API_KEY in the environment of the cluster")


@app.command()
def convert(
    gguf: Annotated[Path, typer.Argument(help="A GGUF file.")],
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face folder is written.")],
) -> None:
    """Turn a GGUF model into a local Hugging Face folder."""
    from crosslora.gguf import convert as run

    run(gguf, folder)
    print(f"{folder}: ready")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Entry point of the console script."""
    with said_in_a_sentence():
        app()
