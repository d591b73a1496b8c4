"""`crosslora serve`: moved adapters and their base behind one OpenAI-compatible endpoint, until it is stopped, or as a
configuration for `serve deploy` and KubeRay."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import yaml
from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema
from rich.markup import escape

from crosslora import __version__, endpoint
from crosslora.adapter_places import Found, Places, common_base, common_source
from crosslora.adapter_watch import Rules
from crosslora.config import Base, Dtype
from crosslora.endpoint import Model, Resources, serve_models
from crosslora.errors import UserError
from crosslora.models import context_length, load_format, resolve
from crosslora.progress import say
from crosslora.replica import MAX_SEQUENCES
from crosslora.vllm_settings import refuse_cpu_with_gpu_build

LONGEST = 4096
"""Tokens of prompt and answer where the user says nothing: what a laptop's memory holds for many requests."""
KEY = "CROSSLORA_API_KEY"
POD_THREADS = 8


class Settings(BaseModel):
    """What is served, and on what; the arguments of `application`."""

    model_config = ConfigDict(extra="forbid")

    places: list[str] = Field(min_length=1)
    base: str | None = None
    teacher: bool = False
    dtype: Dtype = "auto"
    max_model_len: int | None = None
    gpus: int = 0
    threads: int | None = None
    replicas: int = 1
    autoscaling: dict[str, Any] | None = None

    @field_validator("places")
    @classmethod
    def _absolute(cls, places: list[str]) -> list[str]:
        """They are read by processes that run in other folders."""
        return [place if "://" in place else str(Path(place).absolute()) for place in places]

    @field_validator("base")
    @classmethod
    def _absolute_where_local(cls, base: str | None) -> str | None:
        return str(Path(base).absolute()) if base is not None and Path(base).exists() else base

    @field_validator("autoscaling")
    @classmethod
    def _known_to_ray(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None:
            if unknown := given.keys() - AutoscalingConfig.model_fields.keys():
                raise ValueError(f"Ray Serve has no setting {sorted(unknown)[0]!r}")
            AutoscalingConfig(**given)
            given = {"target_ongoing_requests": MAX_SEQUENCES // 2, **given}
        return given

    @property
    def resources(self) -> Resources:
        return Resources(
            num_gpus=self.gpus, threads=self.threads, replicas=self.replicas, autoscaling=self.autoscaling
        )


def settings(autoscaling: str | None, **given: Any) -> Settings:
    """From what the command line says, `autoscaling` in YAML; raises UserError where it cannot be used."""
    try:
        return Settings(autoscaling=None if autoscaling is None else yaml.safe_load(autoscaling), **given)
    except (ValidationError, yaml.YAMLError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is no YAML mapping"
        raise UserError(
            f"--autoscaling {autoscaling}: {reason}; see AutoscalingConfig in Ray Serve's documentation"
        ) from None


def serve(settings: Settings, host: str, port: int, api_key: str | None) -> None:
    """Serve until Ctrl-C. Raises UserError as `models` and `serve_models` do."""
    if (settings.autoscaling or {}).get("min_replicas") == 0:
        raise UserError("--autoscaling: min_replicas 0 would start nothing; give 1, or use --write-config")
    if not os.environ.get("RAY_ADDRESS"):
        refuse_cpu_with_gpu_build(settings.gpus, "--gpus 1")
    with serve_models(models(settings), settings.resources, host=host, port=port, api_key=api_key) as served:
        page = served.url.removesuffix("v1")
        print(f"serving {', '.join(served.models)} at {served.url}; a page to try them: {page}", flush=True)
        print("adapters may come, change and go in these places meanwhile; Ctrl-C stops it", flush=True)
        with suppress(KeyboardInterrupt):
            _tell(served.board)


def _tell(board: Any) -> None:
    """Say what comes and goes."""
    while True:
        time.sleep(1)
        for event in ray.get(board.take.remote()):
            why = f": {event['why']}" if event["why"] else ""
            say(escape(f"{event['event']} {event['adapter']}{why}"))


def models(settings: Settings) -> list[Model]:
    """The target base with the adapters of the places, and with `teacher` the source base with theirs.

    Raises UserError where a place holds no adapter, and where the adapters need several bases, tokenizers or chat
    templates.
    """
    with tempfile.TemporaryDirectory() as temporary:
        places = Places(tuple(settings.places))
        found = places.find(Path(temporary) / "found")
        base = Base(base=settings.base) if settings.base else common_base(found)
        named = None if settings.base else base
        served = [_model(settings, _absolute(base), base.name, places, found, named, found[0].format)]
        if settings.teacher:
            source = common_source(settings.places)
            places = Places(places.places, teachers=True)
            teachers = places.find(Path(temporary) / "teachers")
            name = f"{source.name}-source" if source.name == base.name else source.name
            served.append(_model(settings, source, name, places, teachers, None, None))
            taken = {base.name, *(adapter.name for adapter in found)}
            if twice := taken & {name, *(teacher.name for teacher in teachers)}:
                raise UserError(
                    f"adapters: two models would be named {min(twice)!r}; rename the adapter's folder"
                )
        return served


def _absolute(base: Base) -> Base:
    """An adapter may name its base by a path from here, and engines run in other folders."""
    local = Path(base.base)
    return base.model_copy(update={"base": str(local.absolute())}) if local.exists() else base


def _model(
    settings: Settings,
    base: Base,
    name: str,
    places: Places,
    found: Sequence[Found],
    named: Base | None,
    format: str | None,
) -> Model:
    rules = Rules(name, named, format, endpoint.limits([a.folder for a in found]))
    for adapter in found:
        rules.check(adapter)
    folder = resolve(base, weights=False)
    longest = settings.max_model_len or min(LONGEST, context_length(folder, LONGEST))
    # what moved adapters were fitted with lies beside them
    template = None if format else load_format(folder, base).tokenizer.chat_template
    return Model(base, places, rules, settings.dtype, longest, template)


def application(settings: dict[str, Any]) -> Any:
    """The same as a Ray Serve application, for `serve deploy`: every node must see the places. CROSSLORA_API_KEY in the
    cluster's environment is the bearer token."""
    checked = Settings.model_validate(settings)
    return endpoint.build(models(checked), checked.resources, os.environ.get(KEY))


def write_config(settings: Settings, folder: Path, host: str, port: int) -> list[Path]:
    """Write a configuration for `serve deploy` and a RayService for KubeRay; returns their paths.

    Raises UserError as `models` does.
    """
    if not port:
        raise UserError("--port 0: a configuration needs a port that clients know; give one")
    moved, *_ = models(settings)
    if moved.rules.base not in (None, moved.base):  # a path from here
        settings = settings.model_copy(update={"base": moved.base.base})
    written = {
        "serve.yaml": _serve_config(settings, host, port),
        "rayservice.yaml": ray_service(settings),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in written]


def _serve_config(settings: Settings, host: str, port: int) -> str:
    config = {
        "http_options": {"host": host, "port": port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": endpoint.APPLICATION,
                "route_prefix": "/",
                "import_path": f"{__name__}:application",
                "args": settings.model_dump(exclude_defaults=True),
            }
        ],
    }
    ServeDeploySchema.model_validate(config)
    return yaml.safe_dump(config, sort_keys=False)


def ray_service(settings: Settings) -> str:
    """A manifest for KubeRay, with a pod for each engine."""
    if not settings.gpus:  # the application may be built before the pods are there to be counted
        settings = settings.model_copy(update={"threads": settings.threads or POD_THREADS})
    template = Path(__file__).with_name("rayservice.yaml.j2").read_text(encoding="utf-8")
    bases = 2 if settings.teacher else 1
    environment = Environment(autoescape=False, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template).render(
        config=_serve_config(settings, "0.0.0.0", 8000).rstrip(),
        ray=ray.__version__,
        version=__version__,
        gpus=settings.gpus,
        threads=settings.threads,
        engines=bases * settings.resources.at_least,
        most=bases * settings.resources.at_most,
    )
