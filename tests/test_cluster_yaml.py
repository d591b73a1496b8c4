import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

from crosslora import __version__
from crosslora.serve import Settings, ray_service

ROOT = Path(__file__).parent.parent
CRDS = "CROSSLORA_KUBERAY_CRDS"
PLACES = ["s3://BUCKET/run"]


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def test_follows_rays_schema(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"max_worker": 4}, schema)


def test_is_complete_with_rays_defaults(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_image_has_the_ray_and_python_of_the_project(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ray_requirement = next(r for r in map(Requirement, project["dependencies"]) if r.name == "ray")
    version, python, _ = cluster["docker"]["image"].partition(":")[2].split("-")
    assert version in ray_requirement.specifier
    python_version = f"{python.removeprefix('py')[0]}.{python.removeprefix('py')[1:]}"
    assert python_version in Requirement(f"python{project['requires-python']}").specifier


def test_gpu_workers_get_the_checkout(cluster: dict[str, Any]) -> None:
    assert cluster["head_node_type"] in cluster["available_node_types"]
    assert (ROOT / cluster["file_mounts"]["/home/ray/crosslora"] / "pyproject.toml").is_file()
    assert "/home/ray/crosslora[gpu,harness]" in cluster["setup_commands"][0]


def test_spot_workers_have_a_fallback(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    for name in ("small", "large"):
        spot, on_demand = types[f"{name}_spot"]["node_config"], types[name]["node_config"]
        assert spot.pop("InstanceMarketOptions") == {"MarketType": "spot"}
        assert spot == on_demand


def test_the_sample_of_a_rayservice_is_what_the_command_writes() -> None:
    sample = ROOT / "deploy/kuberay/rayservice.yaml"
    assert sample.read_text() == ray_service(Settings(places=PLACES, gpus=1))


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_kuberay_manifests_have_the_ray_of_the_project(kind: str, cluster: dict[str, Any]) -> None:
    manifest = manifest_of(kind)
    spec = manifest["spec"] if kind == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    version = cluster["docker"]["image"].partition(":")[2].split("-")[0]
    assert spec["rayVersion"] == version
    assert f"FROM {cluster['docker']['image']}\n" in (ROOT / "deploy/Dockerfile").read_text()
    entrypoint = manifest["spec"].get("entrypoint", "python ray_jobs/transfer.py").split()
    assert (ROOT / entrypoint[1]).is_file()


@pytest.fixture(scope="module")
def kuberay() -> dict[str, dict[str, Any]]:
    """Kind -> the schema of its ray.io/v1, as strict as `kubectl apply`."""
    if CRDS not in os.environ:
        pytest.skip(f"set {CRDS} to helm-chart/kuberay-operator/crds of github.com/ray-project/kuberay")
    files = Path(os.environ[CRDS]).glob("ray.io_*.yaml")
    definitions = [yaml.load(file.read_text(), yaml.CSafeLoader)["spec"] for file in files]
    return {
        definition["names"]["kind"]: without_unknown_fields(version["schema"]["openAPIV3Schema"])
        for definition in definitions
        for version in definition["versions"]
        if version["name"] == "v1"
    }


def without_unknown_fields(schema: Any) -> Any:
    """The schema, and all that it holds, refusing what it does not name: Kubernetes would drop that."""
    if isinstance(schema, list):
        return [without_unknown_fields(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: without_unknown_fields(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


def manifest_of(kind: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / f"deploy/kuberay/{kind.lower()}.yaml").read_text())
    return loaded


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_manifests_follow_kuberays_schema(kind: str, kuberay: dict[str, dict[str, Any]]) -> None:
    manifest = manifest_of(kind)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(manifest, kuberay[kind])


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": True, "gpus": 2, "autoscaling": {"min_replicas": 1, "max_replicas": 4}},
        {"replicas": 2, "threads": 4},
    ],
)
def test_any_rayservice_that_is_written_follows_kuberays_schema(
    changes: dict[str, Any], kuberay: dict[str, dict[str, Any]]
) -> None:
    written = yaml.safe_load(ray_service(Settings(places=PLACES, **changes)))
    jsonschema.validate(written, kuberay["RayService"])


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_a_field_that_kuberay_does_not_know_is_found(kind: str, kuberay: dict[str, dict[str, Any]]) -> None:
    manifest = manifest_of(kind)
    spec = manifest["spec"]
    nodes = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    nodes["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePulPolicy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePulPolicy"):
        jsonschema.validate(manifest, kuberay[kind])


def test_images_are_of_this_version() -> None:
    image = re.compile(r"REGISTRY/crosslora:([\w.]+)")
    for file in [
        *(ROOT / "deploy/kuberay").glob("*.yaml"),
        ROOT / "deploy/Dockerfile",
        ROOT / "docs/cluster.md",
    ]:
        assert all(version == __version__ for version in image.findall(file.read_text())), file
