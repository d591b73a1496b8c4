"""The one configuration tree: strict, frozen, read from YAML with dotted command-line overrides.

Relative paths resolve from the folder of the YAML file. Every default stands here and nowhere else.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from crosslora.errors import UserError

Dtype = Literal["auto", "float32", "bfloat16"]
"""What a model computes in; auto: bfloat16 on GPUs and on CPUs that multiply it (as the CPU where the command or job runs
does), else float32."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Base(_Section):
    """A base model, and the prompt format it is used with."""

    base: str
    """Hub id, local folder, or GGUF file."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); None is the default branch."""
    chat_template: str | None = None
    """Jinja text, or a file that holds it. None: the tokenizer's own, or the plain one where it has none."""

    @property
    def name(self) -> str:
        """What an endpoint calls it."""
        return Path(self.base).name.removesuffix(".gguf")

    @property
    def full_name(self) -> str:
        return f"{self.base}@{self.revision}" if self.revision else self.base


class AdapterSource(_Section):
    name: str
    path: Path

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                "use letters, digits, '.', '_' and '-' (the name becomes a folder and a model id)"
            )
        return name


class Prompts(_Section):
    """Where the teacher's prompts come from, mixed by weight."""

    self: float = Field(1.0, ge=0)
    """The teacher continues what its chat template writes before a user turn; for one that answers there, the source
    base writes prompts of no domain."""
    seeds: float = Field(0.0, ge=0)
    """The source base goes on with a list of seed examples; needs `seeds_file`."""
    file: float = Field(0.0, ge=0)
    """Unlabelled prompts of yours; needs `prompts_file`."""
    seeds_file: Path | None = None
    """JSON lines with a `prompt` field: a few real prompts."""
    prompts_file: Path | None = None
    """JSON lines with a `prompt` field, used as they are; each is answered several times where there are too few."""

    @model_validator(mode="after")
    def _complete(self) -> Prompts:
        if self.self + self.seeds + self.file <= 0:
            raise ValueError("at least one of self, seeds and file needs a weight above 0")
        for strategy, weight, name, path in (
            ("seeds", self.seeds, "seeds_file", self.seeds_file),
            ("file", self.file, "prompts_file", self.prompts_file),
        ):
            if weight > 0 and path is None:
                raise ValueError(f"{name} is missing: its strategy has a weight above 0")
            if weight == 0 and path is not None:
                raise ValueError(f"{name} is not used: give {strategy} a weight above 0, or leave it out")
        return self


class Synthesis(_Section):
    prompts: Prompts = Prompts()
    samples: int = Field(2400, ge=8)
    """Samples to generate, before filtering: the budget in samples."""
    minutes: float | None = Field(None, gt=0)
    """Stop handing out work after so many minutes: the budget in time, of every start anew."""
    top_k: int = Field(16, ge=1, le=256)
    """Teacher alternatives stored per position."""
    prompt_temperature: float = Field(1.0, ge=0)
    response_temperature: float = Field(0.7, ge=0)
    max_prompt_tokens: int = Field(128, ge=4)
    max_response_tokens: int = Field(256, ge=4)
    min_adapter_effect: float = 0.02
    """Nats per token by which the adapter must make its response likelier, else the sample says nothing about it."""
    max_similarity: float = Field(0.9, ge=0.1, le=0.95)
    """Jaccard similarity (5-grams of characters) above which a prompt counts as a near-duplicate."""
    held_out: float = Field(0.05, gt=0, lt=0.5)
    """Share of the kept samples that fitting never trains on."""
    min_kept: int = Field(64, ge=2)
    """Fewest samples that must survive the filters."""
    engine: Literal["vllm", "transformers"] = "vllm"
    dtype: Dtype = "auto"
    engines: int = Field(1, ge=1)
    """Engines that run side by side, each a Ray actor; one without a place joins when there is room."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of one node over which every layer of an engine is spread."""
    pipeline_parallel: int = Field(1, ge=1)
    """Nodes over which the layers are spread, for a base that does not fit into one. GPUs per engine: the product."""
    shard_size: int = Field(600, ge=8)
    """Samples per shard: what a failure loses at most, per engine."""
    random_seed: int = Field(0, ge=0)


class Fit(_Section):
    steps: int = Field(600, ge=1)
    batch_size: int = Field(8, ge=1)
    """Samples per optimizer step, over all workers."""
    micro_batches: int = Field(1, ge=1)
    """Gradient accumulation: parts into which a worker's share of the batch is cut."""
    learning_rate: float = Field(1e-3, gt=0)
    """For a target with weights as large as Gemma 3 270M's; with others it is scaled (crosslora/training/rate.py)."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; it then falls linearly to zero."""
    residual: bool = True
    """Learn dA and dB beside the projection (design: A_t = A_s P_in^T + dA)."""
    rehearsal: float = Field(0.2, ge=0, le=0.9)
    """Share of the examples that is the target base's own text, so that the student leaves other text alone."""
    max_tokens: int = Field(1024, ge=16)
    """Longest prompt plus response, in student tokens; longer samples are left out."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Least share of student response tokens that must get a teacher distribution."""
    checkpoint_every: int = Field(20, ge=1)
    evaluate_every: int = Field(100, ge=1)
    """Steps between two looks at the held-out samples; the best look is what is exported."""
    patience: int = Field(4, ge=1)
    """Looks without improvement after which fitting stops."""
    dtype: Dtype = "auto"
    workers: int = Field(1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 1
    gradient_checkpointing: bool = False
    max_failures: int = Field(2, ge=0)
    """Restarts from the last checkpoint before giving up."""
    random_seed: int = Field(0, ge=0)


PLAIN_METRICS = ("exact_match", "f1", "json_slots", "rouge_l")


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex:{pattern} is no regular expression ({error})") from error


class Task(_Section):
    """Prompt/completion JSON lines that every model answers."""

    name: str = Field(min_length=1)
    path: Path
    metrics: list[str] = Field(["exact_match"], min_length=1)
    """exact_match, f1, json_slots, rouge_l, json_field:NAME or regex:PATTERN; the first is the headline."""
    items: int | None = Field(None, ge=1)
    """Use only the first so many rows."""
    max_tokens: int | None = Field(None, ge=1)
    """Of an answer, which scores 0 where it is cut off; None: twice what the longest reference takes, but not
    more than 1024 unless that reference does."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, metrics: list[str]) -> list[str]:
        for metric in metrics:
            name, _, argument = metric.partition(":")
            if name not in ("json_field", "regex") if argument else metric not in PLAIN_METRICS:
                raise ValueError(
                    f"{metric!r} is none of {', '.join(PLAIN_METRICS)}, json_field:NAME, regex:PATTERN"
                )
            if name == "regex":
                _check_pattern(argument)
        return metrics


HELD_OUT = "held_out"
"""The task of agreeing with the teacher on held-out synthetic prompts."""


class Evaluation(_Section):
    tasks: list[Task] = []
    held_out_items: int = Field(100, ge=0)
    """Held-out synthetic prompts on which agreement with the teacher is measured."""
    baselines: list[Literal["random", "crop", "closed_form"]] = ["random", "crop", "closed_form"]
    baseline_items: int = Field(100, ge=1)
    """Most items of a task that a baseline answers: most never stop writing, which takes longer than all the rest."""
    dtype: Dtype = "auto"
    concurrency: int = Field(128, ge=1)
    port: int = Field(0, ge=0, le=65535)
    """Port of the endpoint that is started for the evaluation; 0 picks a free one."""
    random_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _something(self) -> Evaluation:
        if not self.tasks and not self.held_out_items:
            raise ValueError("nothing to evaluate: give tasks, or held_out_items above 0")
        names = [HELD_OUT, *(task.name for task in self.tasks)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two tasks are named {twice!r} ({HELD_OUT!r} is taken); rename one")
        return self


class Cluster(_Section):
    address: str | None = None
    """Ray cluster to use: None starts one in this process (or uses RAY_ADDRESS), "auto" joins the running one."""
    gpus_per_engine: int = Field(0, ge=0)
    """GPUs of one engine's tensor-parallel rank, whole ones: vLLM takes what a card has. 0 runs vLLM's CPU build."""
    gpus_per_worker: int = Field(0, ge=0, le=1)
    """1: every fit worker has a GPU of its own; 0 trains on CPU."""
    wait_seconds: float = Field(600, gt=0)
    """How long to wait for the cluster to provide what a stage needs."""


class Config(_Section):
    """A transfer: which adapters, from which base to which, how, and where the run is kept."""

    run: str
    """Run folder: a local path or any URI that pyarrow.fs opens."""
    source: Base
    adapters: Annotated[list[AdapterSource], Field(min_length=1)]
    target: Base
    synthesis: Synthesis = Synthesis()
    fit: Fit = Fit()
    evaluation: Evaluation = Evaluation()
    cluster: Cluster = Cluster()

    @property
    def gpus_per_engine_and_node(self) -> float:
        """What an engine takes of every node that it is spread over."""
        return self.synthesis.tensor_parallel * self.cluster.gpus_per_engine

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) < len(names):
            raise ValueError(f"adapters: names must differ, got {names}")
        share = self.fit.workers * self.fit.micro_batches
        if self.fit.batch_size % share:
            raise ValueError(
                f"fit.batch_size: {self.fit.batch_size} does not divide into workers x micro_batches = {share}; "
                "set it to a multiple of that"
            )
        for name in ("tensor_parallel", "pipeline_parallel"):
            if getattr(self.synthesis, name) > 1 and self.cluster.gpus_per_engine == 0:
                raise ValueError(f"synthesis.{name}: needs GPUs; set cluster.gpus_per_engine: 1")
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and apply `dotted.key=value` overrides; raises UserError with every problem in one sentence."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the path of a YAML configuration") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); mend the file") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: holds no mapping at the top; start with the keys run, source, adapters, target"
        )
    for override in overrides or []:
        _apply(tree, override)
    return parse_config(tree, path.parent)


def parse_config(tree: dict[str, Any], folder: Path) -> Config:
    """Validate a plain mapping; relative paths are taken from `folder`."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors())) from None
    return _resolve_paths(config, folder)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: not of the form section.key=value, such as fit.steps=100")
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, override)
    try:
        node[int(last) if isinstance(node, list) else last] = yaml.safe_load(text)
    except (TypeError, ValueError, IndexError, yaml.YAMLError) as error:
        raise UserError(
            f"override {override!r}: no such place, or not a YAML value; mend the override"
        ) from error


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return node[int(part)]
    if not isinstance(node, dict):
        raise UserError(f"override {override!r}: {part!r} does not stand below a section")
    return node.setdefault(part, {})


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "configuration"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key{_nearest(problem['loc'])}"
    if problem["type"] == "missing":
        return f"{place}: is missing; add it"
    given = "" if isinstance(problem["input"], dict | list | BaseModel) else f" (got {problem['input']!r})"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}{given}"


def _nearest(place: tuple[Any, ...]) -> str:
    section: Any = Config
    for part in place[:-1]:
        if isinstance(part, int):
            continue
        section = _section_of(section.model_fields[part].annotation)
    near = difflib.get_close_matches(str(place[-1]), section.model_fields, n=1, cutoff=0.5)
    known = ", ".join(section.model_fields)
    return f"; did you mean {near[0]}?" if near else f"; known keys here: {known}"


def _section_of(annotation: Any) -> Any:
    """The section class behind `Section`, `list[Section]` or an annotated form of these."""
    arguments = [a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)]
    return arguments[0] if arguments else annotation


def _below(folder: Path, given: Path | str) -> Path:
    """What is given as a path, from the folder; raises UserError where it cannot be one."""
    try:
        place = folder / Path(given).expanduser()
        place.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that is not there
        raise UserError(f"configuration: {str(given)[:60]!r} is no path ({error}); mend it") from error
    return place


def _resolve_paths(config: Config, folder: Path) -> Config:
    def path(value: Path | None) -> Path | None:
        return None if value is None else _below(folder, value).resolve()

    def base(section: Base) -> Base:
        local = _below(folder, section.base)
        return section.model_copy(
            update={
                "base": str(local.resolve()) if local.exists() else section.base,
                "chat_template": _template_text(section.chat_template, folder),
            }
        )

    prompts = config.synthesis.prompts
    prompts = prompts.model_copy(
        update={"seeds_file": path(prompts.seeds_file), "prompts_file": path(prompts.prompts_file)}
    )
    tasks = [task.model_copy(update={"path": path(task.path)}) for task in config.evaluation.tasks]
    adapters = [adapter.model_copy(update={"path": path(adapter.path)}) for adapter in config.adapters]
    run = config.run if "://" in config.run else str(_below(folder, config.run).resolve())
    return config.model_copy(
        update={
            "run": run,
            "source": base(config.source),
            "target": base(config.target),
            "adapters": adapters,
            "synthesis": config.synthesis.model_copy(update={"prompts": prompts}),
            "evaluation": config.evaluation.model_copy(update={"tasks": tasks}),
        }
    )


def _template_text(template: str | None, folder: Path) -> str | None:
    if template is None or "{" in template:
        return template
    try:
        return _below(folder, template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no such file, no text, no name of a file
        raise UserError(
            f"chat_template: {template!r} is neither Jinja text nor a readable file ({error}); "
            "give one of the two"
        ) from error
