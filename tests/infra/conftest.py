"""The manifests, read."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).resolve().parents[2] / "infra"


@dataclass(frozen=True)
class Pod:
    """A pod template and where it was found."""

    where: str
    template: dict[str, Any]

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.template["metadata"]["labels"])

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self.template["spec"])


class _NoDuplicates(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys; Kubernetes refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if len(keys) != len(set(keys)):
            raise yaml.YAMLError(f"a key twice among {keys}, {node.start_mark}")
        return super().construct_mapping(node, deep)


def _load_all(path: Path) -> list[dict[str, Any]]:
    return list(yaml.load_all(path.read_text(), _NoDuplicates))


def clusters(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for document in documents:
        if document["kind"] in ("RayService", "RayJob"):
            yield document["spec"].get("rayClusterConfig") or document["spec"]["rayClusterSpec"]


@pytest.fixture(scope="session")
def documents() -> list[dict[str, Any]]:
    """Every manifest of infra/kuberay."""
    files = sorted(path for path in (INFRA / "kuberay").glob("*.yaml") if path.name != "kustomization.yaml")
    return [document for path in files for document in _load_all(path)]


@pytest.fixture(scope="session")
def one(documents: list[dict[str, Any]]) -> Any:
    """`one(kind, name=None)`: the one manifest of this kind."""

    def find(kind: str, name: str | None = None) -> dict[str, Any]:
        [found] = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"].get("name"))]
        return found

    return find


@pytest.fixture(scope="session")
def pods(documents: list[dict[str, Any]]) -> list[Pod]:
    """Every pod template."""
    found = [
        Pod(f"{d['kind']} {d['metadata']['name']}", d["spec"]["template"])
        for d in documents
        if d["kind"] == "StatefulSet"
    ]
    for cluster in clusters(documents):
        found.append(Pod("head", cluster["headGroupSpec"]["template"]))
        found += [Pod(f"worker {group['groupName']}", group["template"]) for group in cluster["workerGroupSpecs"]]
    return found


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((INFRA.parent / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def load_all() -> Any:
    """`load_all(path)`: a YAML file's documents, no key twice in a mapping."""
    return _load_all
