"""What cannot be started says why, where Ray Serve tells of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from deployments.config import AccessSettings
from deployments.embedder import QueryEmbedder
from deployments.model import LoraModel
from deployments.retriever import TaskRetriever
from deployments.router import Router

pytestmark = pytest.mark.integration


def test_serves_status_ends_with_the_cause(service: Any, tmp_path: Path) -> None:
    """As `serve status` and a RayService show it, for each part that can fail, all on one cluster."""
    (tmp_path / "keys.yaml").write_text("- {name: a, sha256: no-hash}")
    tiny = tmp_path / "gpt2"
    tiny.mkdir()
    (tiny / "config.json").write_text('{"model_type": "gpt2"}')
    # A start costs seconds of CPU time, so most are given up after the first; two are told of between their starts.
    again = {"ray_actor_options": {"num_cpus": 0}}
    few = {**again, "max_constructor_retry_count": 1}
    embedder = service.part("QueryEmbedder")
    retriever, model = TaskRetriever.options(**few), LoraModel.options(**few)
    anew = {"num_cpus": 0, "runtime_env": {"env_vars": {"LORAUTER_HOME": str(tmp_path / "home")}}}
    # Of a machine on which nothing was served before.
    first = TaskRetriever.options(**{**few, "ray_actor_options": anew})
    uri = service.config.catalog.removesuffix("/catalog")

    def changed(**values: Any) -> Any:
        return service.config.model_copy(update=values)

    keys = changed(access=AccessSettings(keys_file=str(tmp_path / "keys.yaml")))
    parts = {
        "no-catalog": (retriever.bind(changed(catalog=f"{uri}/none"), embedder), "lorauter catalog build"),
        "no-bucket": (retriever.bind(changed(catalog="s3://none/x"), embedder), "there is no bucket 'none'"),
        "no-adapters": (first.bind(changed(adapters=f"{uri}/none"), embedder), "which holds no adapter"),
        "another-base": (retriever.bind(changed(base_model="org/x"), embedder), "base_model_aliases"),
        "no-encoder": (QueryEmbedder.options(**few).bind(str(tmp_path / "none")), "neither a folder nor a Hugging"),
        "no-model": (LoraModel.options(**again).bind(changed(base_model=str(tiny))), "base model"),
        "keys": (Router.options(**again).bind(keys, None, None, model, None), "0.sha256"),
    }
    targets = [serve.RunTarget(app, name, f"/{name}") for name, (app, _) in parts.items()]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    causes: dict[str, str] = {}
    try:
        deadline = time.monotonic() + 480
        while len(causes) < len(parts):
            assert time.monotonic() < deadline, causes
            applications = serve.status().applications  # once for all: it takes a tenth of a second of CPU time
            for name in parts.keys() - causes.keys():
                for deployment in applications[name].deployments.values():
                    last = deployment.message.strip().splitlines()[-1:]
                    if last and " cannot start: " in last[0] and name not in causes:
                        causes[name] = last[0]
                        serve.delete(name, _blocking=False)  # else it is started again
            time.sleep(1)
        for name, (_, said) in parts.items():
            assert said in causes[name]
    finally:
        for name in parts.keys() - causes.keys():
            serve.delete(name, _blocking=False)
