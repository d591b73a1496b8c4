"""What `crosslora serve` makes of its options: models, an application, files for a cluster."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from crosslora import endpoint
from crosslora.adapter_places import common_source
from crosslora.config import Base
from crosslora.errors import UserError
from crosslora.serve import Settings, application, models, settings, write_config
from tests.tiny import tiny_llama, tiny_lora
from tests.tiny_pair import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter `tiny` is exported."""
    folder = tmp_path_factory.mktemp("pair")
    target = tiny_llama(folder / "target")
    run = folder / "run"
    tiny_lora(run / "source/tiny", tiny_llama(folder / "source"), 1, r=4)
    tiny_lora(run / "export/tiny", target, 2)
    (run / "export/tiny/manifest.json").write_text("{}")
    (run / "run.json").write_text(json.dumps({"config": tiny_config(folder, run).model_dump(mode="json")}))
    return run


def test_the_teacher_stands_on_the_source_base(run: Path) -> None:
    target, source = models(Settings(places=[str(run)], teacher=True, dtype="float32"))
    assert (target.rules.model, source.rules.model) == ("target", "source")
    assert [*target.places.listed()] == ["tiny"] and [*source.places.listed()] == ["tiny-teacher"]
    assert source.chat_template and target.chat_template is None, "its adapters bring their own"
    assert (target.rules.lora["max_lora_rank"], source.rules.lora["max_lora_rank"]) == (8, 8)


def test_only_a_run_has_a_teacher(run: Path) -> None:
    with pytest.raises(UserError, match=r"export/tiny: holds no run\.json"):
        models(Settings(places=[f"{run}/export/tiny"], teacher=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{max_replica: 2}", "no setting 'max_replica'"),
        ("{min_replicas: 3, max_replicas: 2}", "must be greater than or equal to"),
        ("[1", "no YAML"),
        ("7", "valid dictionary"),
    ],
)
def test_autoscaling_that_ray_does_not_know_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--autoscaling .*{message}"):
        settings(autoscaling=text, places=["run"])


def test_places_are_absolute_and_names_differ(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert Settings(places=["export", "s3://bucket/run"]).places == [f"{run}/export", "s3://bucket/run"]
    tiny_lora(run / "export/tiny-teacher", run.parent / "target", 2)
    (run / "export/tiny-teacher/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="two models would be named 'tiny-teacher'"):
        models(Settings(places=[str(run)], teacher=True))
    shutil.rmtree(run / "export/tiny-teacher")


def test_a_base_that_an_adapter_names_by_a_path_from_here_is_found_elsewhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    tiny_lora(tmp_path / "mine", run.parent / "target", 3)
    file = tmp_path / "mine/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "target"}))
    given = Settings(places=[str(tmp_path / "mine")])
    (model,) = models(given)
    assert (model.base.base, model.rules.base) == (str(run.parent / "target"), Base(base="target"))
    written, _ = write_config(given, tmp_path / "new", "127.0.0.1", 8123)
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(written.read_text())).applications
    assert application.args["base"] == str(run.parent / "target")


def test_the_configuration_is_one_for_serve_and_for_kuberay(run: Path, tmp_path: Path) -> None:
    given = settings("{max_replicas: 3}", places=[str(run)], teacher=True, gpus=2)
    serve_yaml, service_yaml = write_config(given, tmp_path / "new", "127.0.0.1", 8123)
    config = ServeDeploySchema.model_validate(yaml.safe_load(serve_yaml.read_text()))
    assert (config.http_options.host, config.http_options.port) == ("127.0.0.1", 8123)
    assert Settings.model_validate(config.applications[0].args) == given
    service = yaml.safe_load(service_yaml.read_text())["spec"]
    in_pod = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    assert (in_pod.http_options.host, in_pod.http_options.port) == ("0.0.0.0", 8000)
    assert in_pod.applications == config.applications
    assert service["rayClusterConfig"]["rayVersion"] == ray.__version__
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 6), "one pod per engine"
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "2"
    with pytest.raises(UserError, match="--port 0"):
        write_config(given, tmp_path / "new", "127.0.0.1", 0)


def test_an_engine_on_cpu_has_the_threads_of_its_pod(run: Path, tmp_path: Path) -> None:
    given = settings(None, places=[str(run)])
    service = yaml.safe_load(write_config(given, tmp_path, "127.0.0.1", 8000)[1].read_text())["spec"]
    threads = yaml.safe_load(service["serveConfigV2"])["applications"][0]["args"]["threads"]
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == str(threads)


def test_the_application_has_an_engine_and_a_shelf_per_base(run: Path) -> None:
    built = application(
        {"places": [str(run)], "teacher": True, "threads": 1, "autoscaling": {"max_replicas": 2}}
    )
    front = built._bound_deployment
    options, shelf, lifeline, beside = front.init_args
    assert (front.name, shelf._bound_deployment.name) == ("vllm-0", "shelf-0")
    assert beside._bound_deployment.name == "vllm-1" and lifeline is None
    assert front._deployment_config.autoscaling_config.max_replicas == 2
    assert options["served_model_name"] == ["target"]


def test_replicas_may_start_again_and_again() -> None:
    """Each connects to the program that started it."""
    with endpoint._lifeline() as address:
        for _ in range(300):
            socket.create_connection(address, timeout=5).close()
        with socket.create_connection(address, timeout=5) as last:
            last.settimeout(0.2)
            with pytest.raises(TimeoutError):
                last.recv(1)


def test_the_way_out_fits_what_is_wrong_with_an_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="stop what listens there"):
            endpoint.free_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="an IPv4 address of this machine"):
        endpoint.free_port("203.0.113.1", 0)  # of documentation (RFC 5737)


def test_runs_of_one_source_with_two_chat_templates_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "run.json").read_text())
    config["config"]["source"]["chat_template"] = "{{ messages }}"
    (other / "run.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="different chat templates of their source"):
        common_source([str(run), str(other)])
