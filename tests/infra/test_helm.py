"""infra/helm: the chart is linted and rendered by Helm, and the schema and manifests made of it are up to date."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from deployments.app import assemble
from deployments.batch.config import BatchConfig
from deployments.launch import ServeFile

INFRA = Path(__file__).resolve().parents[2] / "infra"
CHART = INFRA / "helm" / "lorauter"
HELM = Path(sys.executable).parent / "helm"
KUBERAY = Draft202012Validator(yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text()))
OPERATORS = ("RayService", "RayJob", "PodMonitor")
EVERYTHING = ("--set", "batch.create=true")


def helm(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HELM, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def render(*options: object, release: str = "lorauter") -> dict[tuple[str, str], dict[str, Any]]:
    """The chart's objects by kind and name."""
    made = helm("template", release, CHART, *options)
    assert made.returncode == 0, made.stderr
    documents = [document for document in yaml.safe_load_all(made.stdout) if document]
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def check(documents: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Every object fits its schema."""
    for (kind, _), document in documents.items():
        if kind in OPERATORS:
            KUBERAY.validate(document)
        else:
            kubernetes_validate.validate(document, "1.33", strict=True)


@pytest.fixture(scope="module")
def make() -> Any:
    """infra/helm/make.py."""
    spec = importlib.util.spec_from_file_location("helm_make", INFRA / "helm" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_of_the_values_is_of_the_settings_that_there_are(make: Any) -> None:
    assert json.loads((CHART / "values.schema.json").read_text()) == json.loads(json.dumps(make.schema())), (
        "run: python infra/helm/make.py"
    )


@pytest.mark.parametrize("name", ["networkpolicy", "podmonitor", "rayjob", "rayservice", "redis", "serviceaccount"])
def test_the_manifests_are_the_rendered_chart(make: Any, name: str) -> None:
    assert name in make.MADE
    made = (INFRA / "kuberay" / f"{name}.yaml").read_text()
    assert made == make.manifest(name), "run: python infra/helm/make.py"


def test_no_template_is_without_a_manifest(make: Any) -> None:
    assert {path.stem for path in (CHART / "templates").glob("*.yaml")} == set(make.MADE)


@pytest.mark.parametrize("values", [[], ["-f", CHART / "values-cpu.yaml"], EVERYTHING], ids=["default", "cpu", "batch"])
def test_helm_finds_nothing_to_say_and_the_objects_are_valid(values: list[object]) -> None:
    linted = helm("lint", "--strict", "--quiet", CHART, *values)
    assert linted.returncode == 0, linted.stdout
    check(render(*values))


def test_the_versions_are_the_projects(project: dict[str, Any]) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["project"]["version"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("config.engine.max_batch=many", "config.engine.max_batch"),
        ("config.engine.max_batsh=4", "max_batsh is not allowed"),
        ("config.api.metrics_of=all", "config.api.metrics_of"),
        ("deployments.Ruoter.num_replicas=1", "Ruoter is not allowed"),
        ("cpu.minReplica=1", "minReplica is not allowed"),
        ("gpu.maxReplicas=0", "gpu.maxReplicas"),
        ("cacheSize=30 gigabytes", "cacheSize"),
        ("image.pullPolicy=Sometimes", "image.pullPolicy"),
        ("networkPolicy=sure", "networkPolicy"),
        ("replicas=3", "replicas is not allowed"),
    ],
)
def test_a_wrong_value_is_refused(values: str, said: str) -> None:
    refused = helm("template", "lorauter", CHART, "--set", values)
    assert refused.returncode != 0
    assert said in refused.stderr


def test_without_gpus_the_models_go_onto_the_cpu_workers(tmp_path: Path) -> None:
    service = render("-f", CHART / "values-cpu.yaml")["RayService", "lorauter"]["spec"]
    [group] = service["rayClusterConfig"]["workerGroupSpecs"]
    assert group["groupName"] == "cpu"
    pod = group["template"]["spec"]
    assert "nvidia.com/gpu" not in json.dumps(pod)
    path = tmp_path / "serve.yaml"
    path.write_text(service["serveConfigV2"])
    file = ServeFile.read(path)
    assert assemble(file.config, file.overrides)
    model = file.overrides["LoraModel"]["ray_actor_options"]
    assert model == {"num_cpus": 6, "num_gpus": 0, "resources": {"cpu_worker": 0.01}}
    assert file.config.engine.threads == model["num_cpus"] <= float(pod["containers"][0]["resources"]["limits"]["cpu"])
    assert file.config.cache.directory in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]


def test_two_releases_in_one_namespace_keep_apart() -> None:
    other = render(*EVERYTHING, "--set", "keysSecret=k,redis.secret=s", release="other")
    check(other)
    assert not {name for _, name in other if not name.startswith("other")}
    for document in other.values():
        text = json.dumps({**document, "spec": {**document.get("spec", {}), "serveConfigV2": "", "entrypoint": ""}})
        named = {part for part in text.split('"') if part.startswith("lorauter")}
        assert named <= {"lorauter:0.1.0-cpu", "lorauter:0.1.0-cuda"}, named
    assert other["RayService", "other"]["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"] == (
        "other-redis:6379"
    )


def test_what_is_left_out_is_not_there() -> None:
    without = ["serviceAccount.create=false,serviceAccount.name=mine", "networkPolicy=false", "podMonitor.create=false"]
    documents = render("--set", ",".join([*without, "redis.create=false,redis.address=redis.example:6380"]))
    assert set(documents) == {("RayService", "lorauter")}
    cluster = documents["RayService", "lorauter"]["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "redis.example:6380"
    assert cluster["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == "mine"


def test_settings_reach_every_pod_they_are_for() -> None:
    options = "envFrom[0].secretRef.name=stores,image.pullPolicy=Always,image.repository=registry.example/l"
    options += ",imagePullSecrets[0].name=pull,gpu.nodeSelector.pool=a,config.access=null,config.cache=null"
    documents = render("--set", options, *EVERYTHING)
    check(documents)
    cluster = documents["RayService", "lorauter"]["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        [container] = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "stores"}}]
        assert container["imagePullPolicy"] == "Always"
        assert container["image"].startswith("registry.example/l:0.1.0-")
        assert pod["imagePullSecrets"] == [{"name": "pull"}]
    gpu = groups[2]["template"]["spec"]
    assert gpu["nodeSelector"] == {"pool": "a"}
    mounts = {mount["name"]: mount["mountPath"] for mount in gpu["containers"][0]["volumeMounts"]}
    assert mounts == {
        "ray-logs": "/tmp/ray",
        "keys": "/etc/lorauter/keys",
        "adapters": "/home/ray/.cache/lorauter/adapters",
    }


def test_a_batch_has_the_services_model_and_its_own_settings(tmp_path: Path) -> None:
    options = "config.base_model=hf://org/m@main,batch.config.shard_rows=64"
    documents = render("--set", options, *EVERYTHING)
    check(documents)
    job = documents["RayJob", "lorauter-batch-1"]["spec"]
    assert "--config /etc/lorauter/batch/batch.yaml" in job["entrypoint"]
    path = tmp_path / "batch.yaml"
    path.write_text(documents["ConfigMap", "lorauter-batch"]["data"]["batch.yaml"])
    config = BatchConfig.read(path)
    assert (config.base_model, config.shard_rows, config.encoder) == ("hf://org/m@main", 64, "default")
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    [mount] = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] == "batch"]
    assert f"{mount['mountPath']}/batch.yaml" in job["entrypoint"]
