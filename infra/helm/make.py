"""Makes what follows from the chart: its schema of values, and the manifests of infra/kuberay for who has no Helm.

    python infra/helm/make.py

The chart's `config` is lorauter's own settings, so its schema is theirs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from deployments.app import DEPLOYMENTS
from deployments.config import AppConfig

HELM = Path(__file__).resolve().parent
CHART, MANIFESTS = HELM / "lorauter", HELM.parent / "kuberay"
MADE = ("networkpolicy", "podmonitor", "rayjob", "rayservice", "redis", "serviceaccount")
HEAD = "# Made of infra/helm/lorauter by infra/helm/make.py: what is changed here for good is changed there.\n"


def schema() -> dict[str, Any]:
    """The JSON schema of values.yaml."""
    config = _bare(json.loads(json.dumps(AppConfig.model_json_schema())))
    definitions = config.pop("$defs")
    text, flag, count = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
    named, anything = {"type": "object", "additionalProperties": text}, {"type": "object"}
    listed = {"type": "array", "items": {"type": "object"}}
    resources = _closed({"requests": anything, "limits": anything}, ["requests", "limits"])
    placed = {"resources": resources, "nodeSelector": named, "tolerations": listed}
    workers = {"minReplicas": count, "maxReplicas": {**count, "minimum": 1}, **placed}
    size = {"type": "string", "pattern": "^[0-9.]+([kMGTPE]i?)?$"}
    uri = {"type": "string", "minLength": 1}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **_closed(
            {
                "global": anything,
                "image": _closed({"repository": uri, "cpuTag": text, "cudaTag": text, "pullPolicy": _POLICY}),
                "imagePullSecrets": listed,
                "rayVersion": uri,
                "serviceAccount": _closed({"create": flag, "name": text, "annotations": named}),
                "env": listed,
                "envFrom": listed,
                "config": config,
                "keysSecret": uri,
                "deployments": _closed(dict.fromkeys(DEPLOYMENTS, anything), list(DEPLOYMENTS)),
                "autoscaler": _closed({"idleTimeoutSeconds": count, "resources": resources}),
                "head": _closed(placed),
                "cpu": _closed(workers),
                "gpu": _closed({"enabled": flag, **workers}),
                "logsSize": size,
                "cacheSize": size,
                "redis": _closed({"create": flag, "address": text, "secret": uri, "image": uri, "storage": size}),
                "networkPolicy": flag,
                "podMonitor": _closed({"create": flag, "labels": named}),
                "batch": _closed(
                    {
                        "create": flag,
                        "generateName": flag,
                        "input": uri,
                        "output": uri,
                        "workers": {**count, "minimum": 1},
                        "config": anything,
                    }
                ),
            }
        ),
        "$defs": definitions,
    }


_POLICY = {"enum": ["", "Always", "IfNotPresent", "Never"]}


def _bare(schema: Any) -> Any:
    """A schema without words, which change more often than what it allows."""
    if isinstance(schema, dict):
        return {
            key: {name: _bare(of) for name, of in value.items()} if key in ("properties", "$defs") else _bare(value)
            for key, value in schema.items()
            if key not in ("title", "description", "default")
        }
    return [_bare(item) for item in schema] if isinstance(schema, list) else schema


def _closed(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    """An object of these properties alone."""
    shape: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    return {**shape, "required": required} if required else shape


def rendered(name: str, *options: str) -> str:
    """A template of the chart as `helm template` makes it, for the release lorauter."""
    helm = Path(sys.executable).parent / "helm"
    command = [str(helm), "template", "lorauter", str(CHART), "--show-only", f"templates/{name}.yaml", *options]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 (our own chart)
    source = f"# Source: lorauter/templates/{name}.yaml\n"
    documents = made.removeprefix("---\n").replace(source, "").replace("---\n---\n", "---\n")
    return HEAD + documents


def manifest(name: str) -> str:
    """A manifest of infra/kuberay."""
    return rendered(name, "--set", "batch.create=true,batch.generateName=true")


def main() -> None:
    """Write them."""
    (CHART / "values.schema.json").write_text(json.dumps(schema(), indent=1) + "\n")
    for name in MADE:
        (MANIFESTS / f"{name}.yaml").write_text(manifest(name))


if __name__ == "__main__":
    main()
