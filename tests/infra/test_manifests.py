"""infra/kuberay as far as no cluster is needed: schemas, the Serve configuration, and that the parts fit each other."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT, DEFAULT_DASHBOARD_PORT

from deployments.app import DEPLOYMENTS, assemble
from deployments.launch import ServeFile
from lorauter_cli.main import app

INFRA = Path(__file__).resolve().parents[2] / "infra"
KUBERNETES = "1.33"
CRDS = ("RayService", "RayJob", "PodMonitor")
SCHEMA = Draft202012Validator(yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text()))


def quantity(text: str | int) -> float:
    """A Kubernetes quantity in its unit."""
    number, unit = re.fullmatch(r"([0-9.]+)(m|Mi|Gi|)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}[unit]


@pytest.fixture
def serve_file(one: Any, tmp_path: Path) -> ServeFile:
    """The RayService's Serve configuration, read as `lorauter serve` would."""
    path = tmp_path / "serve_config.yaml"
    path.write_text(one("RayService")["spec"]["serveConfigV2"])
    return ServeFile.read(path)


def test_kubernetes_own_objects_are_valid(documents: list[dict[str, Any]]) -> None:
    own = [document for document in documents if document["kind"] not in CRDS]
    assert {d["kind"] for d in own} == {"Namespace", "ServiceAccount", "Service", "StatefulSet", "NetworkPolicy"}
    for document in own:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_pod_templates_are_valid(pods: list[Any]) -> None:
    assert len(pods) == 6
    for pod in pods:
        document = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod.template}
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_objects_of_operators_are_valid(documents: list[dict[str, Any]]) -> None:
    found = [document for document in documents if document["kind"] in CRDS]
    assert {document["kind"] for document in found} == set(CRDS)
    for document in found:
        SCHEMA.validate(document)


@pytest.mark.parametrize("change", ["unknown", "missing", "type"])
def test_the_schema_of_operators_objects_bites(one: Any, change: str) -> None:
    service = deepcopy(one("RayService"))
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    if change == "unknown":
        group["minReplica"] = 1
    elif change == "missing":
        del group["groupName"]
    else:
        group["rayStartParams"]["num-cpus"] = 4
    assert not SCHEMA.is_valid(service)


def test_kustomization_names_every_manifest_but_the_job() -> None:
    folder = INFRA / "kuberay"
    named = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml", "rayjob.yaml"}
    assert sorted(named) == sorted(there)


def test_serve_config_is_the_shipped_one_with_stores_in_s3(serve_file: ServeFile) -> None:
    shipped = ServeFile.read(INFRA.parent / "serve_config.yaml")
    config = serve_file.config
    assert config.adapters.startswith("s3://")
    assert config.catalog.startswith("s3://")
    assert config.access.closed
    ours = {name: getattr(config, name) for name in ("adapters", "catalog", "cache", "access", "compose")}
    assert config == shipped.config.model_copy(update=ours)
    # The default catalog is the package's own, which nobody edits.
    assert set(serve_file.overrides) == {*shipped.overrides, "CatalogEditor"} == set(DEPLOYMENTS)
    assert serve_file.host == "0.0.0.0"
    assert assemble(config, serve_file.overrides)  # Serve takes each deployment's options


def node(group: Mapping[str, Any]) -> dict[str, float]:
    """What `ray start` gives a worker of the group, by KubeRay's rules."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    custom = json.loads(json.loads(group["rayStartParams"]["resources"].strip("'")))
    return {"CPU": quantity(limits["cpu"]), "GPU": quantity(limits.get("nvidia.com/gpu", 0)), **custom}


def test_each_deployment_fits_one_kind_of_worker_up_to_its_largest_scale(one: Any, serve_file: ServeFile) -> None:
    groups = {g["groupName"]: g for g in one("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    nodes = {name: node(group) for name, group in groups.items()}
    used: dict[str, dict[str, float]] = {name: {"CPU": 0.0, "GPU": 0.0} for name in groups}
    expected = dict.fromkeys(DEPLOYMENTS, "cpu") | {"LoraModel": "gpu"}
    for deployment, options in serve_file.overrides.items():
        actor = options["ray_actor_options"]
        demand = {"CPU": actor["num_cpus"], "GPU": actor.get("num_gpus", 0), **actor["resources"]}
        fitting = [n for n, has in nodes.items() if all(has.get(key, 0) >= need for key, need in demand.items())]
        assert fitting == [expected[deployment]], deployment
        for key in used[fitting[0]]:
            most = options.get("autoscaling_config", {"max_replicas": 1})["max_replicas"]
            used[fitting[0]][key] += demand[key] * most
        if "autoscaling_config" not in options:
            assert options["num_replicas"] == 1
        elif deployment != "LoraModel":
            assert options["max_replicas_per_node"] == 1
            assert options["autoscaling_config"]["max_replicas"] <= groups["cpu"]["maxReplicas"]
    for name, demand in used.items():
        for key, need in demand.items():
            assert need <= nodes[name][key] * groups[name]["maxReplicas"], (name, key)


def test_the_node_cache_has_its_room(one: Any, serve_file: ServeFile) -> None:
    gpu = one("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"]
    [mount] = [m for m in gpu["containers"][0]["volumeMounts"] if m["mountPath"] == serve_file.config.cache.directory]
    [volume] = [v for v in gpu["volumes"] if v["name"] == mount["name"]]
    assert quantity(volume["emptyDir"]["sizeLimit"]) > serve_file.config.cache.disk_bytes


def test_every_container_is_bounded_and_unprivileged(pods: list[Any], one: Any) -> None:
    for pod in pods:
        assert pod.spec["securityContext"]["runAsNonRoot"] is True, pod.where
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod.where
        mounted = {volume["name"] for volume in pod.spec.get("volumes", [])} | {"data"}
        for container in pod.spec["containers"]:
            assert set(container["resources"]["requests"]) >= {"cpu", "memory"}, pod.where
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert requests["memory"] == limits["memory"], pod.where
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, pod.where
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, pod.where
            assert re.fullmatch(r"[a-z/]+:[0-9][\w.-]+", container["image"]), container["image"]
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= mounted, pod.where
    for kind, key in (("RayService", "rayClusterConfig"), ("RayJob", "rayClusterSpec")):
        options = one(kind)["spec"][key]["autoscalerOptions"]
        assert options["resources"]["limits"]["memory"]
        assert options["securityContext"]["allowPrivilegeEscalation"] is False


def test_images_and_ray_are_the_projects_versions(pods: list[Any], one: Any, project: dict[str, Any]) -> None:
    version = project["project"]["version"]
    for pod in pods:
        [image] = [container["image"] for container in pod.spec["containers"]]
        gpu = "nvidia.com/gpu" in pod.spec["containers"][0]["resources"]["limits"]
        if not pod.where.startswith("StatefulSet"):
            assert image == f"lorauter:{version}-{'cuda' if gpu else 'cpu'}", pod.where
    [ray] = [r for r in map(Requirement, project["project"]["dependencies"]) if r.name == "ray"]
    for kind, key in (("RayService", "rayClusterConfig"), ("RayJob", "rayClusterSpec")):
        assert one(kind)["spec"][key]["rayVersion"] in ray.specifier


def test_the_gpu_group_alone_asks_for_gpus(pods: list[Any]) -> None:
    for pod in pods:
        limits = pod.spec["containers"][0]["resources"]["limits"]
        asks = pod.where == "worker gpu"
        assert (limits.get("nvidia.com/gpu") == 1) is asks, pod.where
        assert any(t["key"] == "nvidia.com/gpu" for t in pod.spec.get("tolerations", [])) is asks, pod.where


def test_the_service_account_is_everywhere(pods: list[Any], one: Any) -> None:
    account = one("ServiceAccount")["metadata"]
    assert re.fullmatch(r"arn:aws:iam::\d{12}:role/\w+", account["annotations"]["eks.amazonaws.com/role-arn"])
    ray_pods = [pod for pod in pods if not pod.where.startswith("StatefulSet")]
    assert {pod.spec["serviceAccountName"] for pod in ray_pods} == {account["name"]}


def test_redis_is_what_the_gcs_uses(one: Any) -> None:
    options = one("RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    service, server = one("Service"), one("StatefulSet")
    container = server["spec"]["template"]["spec"]["containers"][0]
    host, port = options["redisAddress"].split(":")
    assert host == service["metadata"]["name"] == server["spec"]["serviceName"]
    assert int(port) == service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == server["spec"]["selector"]["matchLabels"] == labels
    [password] = [e["valueFrom"] for e in container["env"] if e["name"] == "REDISCLI_AUTH"]
    assert password == options["redisPassword"]["valueFrom"]
    assert "requirepass $REDISCLI_AUTH" in container["args"][0]


def selects(selector: Mapping[str, Any], pod: Any) -> bool:
    return bool(selector["matchLabels"].items() <= pod.labels.items())


def test_pod_monitors_see_every_ray_pod_once(documents: list[dict[str, Any]], pods: list[Any]) -> None:
    monitors = [document["spec"] for document in documents if document["kind"] == "PodMonitor"]
    for pod in pods:
        seen = [monitor for monitor in monitors if selects(monitor["selector"], pod)]
        if pod.where.startswith("StatefulSet"):
            assert not seen
            continue
        assert len(seen) == 1, pod.where
        ports = {port["name"] for port in pod.spec["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in seen[0]["podMetricsEndpoints"]} <= ports, pod.where


def test_network_policies_cover_every_pod(documents: list[dict[str, Any]], pods: list[Any]) -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "NetworkPolicy"}
    for pod in pods:
        names = [name for name, policy in policies.items() if selects(policy["podSelector"], pod)]
        assert names == ["lorauter-redis" if pod.where.startswith("StatefulSet") else "lorauter"], pod.where
    heads = [pod for pod in pods if pod.where == "head"]
    assert all(selects(policies["lorauter-redis"]["ingress"][0]["from"][0]["podSelector"], pod) for pod in heads)
    open_to_all = [rule for rule in policies["lorauter"]["ingress"] if "from" not in rule]
    assert open_to_all == [{"ports": [{"port": 8000}]}]


def test_probes_ask_what_ray_answers(pods: list[Any], serve_file: ServeFile) -> None:
    answered = {
        f"localhost:{DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}/api/local_raylet_healthz",
        f"localhost:{DEFAULT_DASHBOARD_PORT}/api/gcs_healthz",
        f"localhost:{serve_file.port}/-/healthz",
    }
    asked = set()
    for pod in pods:
        for kind in ("readinessProbe", "livenessProbe"):
            probe = pod.spec["containers"][0].get(kind, {"exec": {"command": [""]}})
            asked |= set(re.findall(r"http://(\S+)", probe["exec"]["command"][-1]))
    assert asked == answered


def test_the_job_calls_the_batch_command(one: Any) -> None:
    program, command, *options = shlex.split(one("RayJob")["spec"]["entrypoint"])
    assert (program, command) == ("lorauter", "batch")
    given = {option.split("=")[0] for option in options if option.startswith("--")}
    known = {name for parameter in typer.main.get_command(app).commands[command].params for name in parameter.opts}  # type: ignore[attr-defined]
    assert {"--input", "--output", "--catalog", "--adapters"} <= given <= known
    gpu = one("RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert int(options[options.index("--workers") + 1]) == gpu["maxReplicas"]
    assert int(options[options.index("--gpus") + 1]) == 1


def test_the_policy_grants_the_stores_in_use_and_no_more(one: Any, serve_file: ServeFile) -> None:
    statements = json.loads((INFRA / "kuberay" / "s3-policy.json").read_text())["Statement"]
    granted = {resource for s in statements if s["Sid"] == "Read" for resource in s["Resource"]}
    used = (serve_file.config.adapters, serve_file.config.catalog)
    assert granted == {f"arn:aws:s3:::{uri.removeprefix('s3://')}/*" for uri in used}
    assert not any("*" in action for s in statements for action in [s["Action"]] if isinstance(action, str))


def test_no_secret_is_in_the_manifests(documents: list[dict[str, Any]], pods: list[Any]) -> None:
    assert not [document for document in documents if document["kind"] == "Secret"]
    for pod in pods:
        for variable in pod.spec["containers"][0].get("env", []):
            if re.search("KEY|SECRET|PASSWORD|TOKEN|AUTH", variable["name"]):
                assert "value" not in variable, pod.where
