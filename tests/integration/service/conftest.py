"""One Ray cluster and one model for the whole package, which take a fifth of a core also where nobody asks."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import ray
import yaml
from catalogued import catalog_adapters
from local_s3 import free_port
from ray import serve

from deployments.adapter_cache import CacheSpec, running_caches
from deployments.app import REPORTS, assemble
from deployments.cluster import LOCAL, connect
from deployments.config import AccessSettings, AppConfig
from deployments.limits import limits_actor
from deployments.model import LoraModel
from deployments.router import Router
from lorauter.catalog import Catalog, current_version
from lorauter.keys import hash_key, new_key
from lorauter.names import AdapterKey

LOGS = {"encoding": "JSON", "log_level": "INFO"}
APP = "lorauter"
REPLICAS: dict[str, Any] = {"Router": 2, "QueryEmbedder": 1, "TaskRetriever": 2, "LoraModel": 1}


@dataclass(frozen=True)
class Service:
    """The running service as its tests see it."""

    url: str
    config: AppConfig
    store: Path  # the folder behind the S3 prefix of the adapters
    disk: Path  # the folder of the node's adapter cache

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120)

    @cached_property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    @cached_property
    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key="unused", max_retries=0, timeout=120)

    def close(self) -> None:
        """Close what was not closed where it was used."""
        for name in ("openai", "anthropic"):
            if client := vars(self).get(name):
                client.close()

    @property
    def cache(self) -> Any:
        """The handle of the node's AdapterCache actor."""
        [actor] = running_caches(CacheSpec(self.config.adapters, self.config.cache))
        return actor

    def key(self, name: str) -> AdapterKey:
        """The version of an adapter that is served."""
        return AdapterKey(name, Catalog.load(self.config.catalog or "").adapters[name])

    def catalog(self, *names: str) -> str:
        """Have adapters served in their newest versions, by every replica; returns the catalog's."""
        version = catalog_adapters(self.url, self.config.adapters, *names)
        self.settle()
        return version

    def settle(self) -> None:
        """Wait until every replica serves the catalog that is published: one tells so, and all have looked again."""
        deadline = time.monotonic() + 180
        with self.http as client:
            while client.get("/v1/tasks").json()["catalog_version"] != current_version(self.config.catalog):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        time.sleep(2 * self.config.catalog_refresh_s + 0.5)

    def part(self, name: str) -> Any:
        """The handle of one of its deployments."""
        return serve.get_deployment_handle(name, APP)

    def beside(self, config: AppConfig, *, model: Mapping[str, Any], router: Mapping[str, Any]) -> Any:
        """An app of a LoraModel and an ingress of its own, with these options of Serve, whose other parts are this
        one's."""
        answering = LoraModel.options(request_router_config=REPORTS, **model).bind(config)
        others = [self.part(name) for name in ("QueryEmbedder", "TaskRetriever")]
        return Router.options(**router).bind(config, *others, answering, self.part("CatalogEditor"))

    def ask(self, model: str, text: str = "Is the sky blue?", **options: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **options}
        with self.http as client:
            return client.post("/v1/chat/completions", json=body)

    def ask_together(self, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
        """Send chats at the same moment."""

        async def send() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
                return await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for body in bodies])

        return asyncio.run(send())


@pytest.fixture(scope="package")
def service(s3_server: Any, published: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    work = tmp_path_factory.mktemp("service")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.env.items():
            patch.setenv(name, value)
        config = AppConfig.parse(
            {
                "adapters": f"{published}/adapters",
                "catalog": f"{published}/catalog",
                "catalog_refresh_s": 0.4,
                "engine": {
                    "max_batch": 8,
                    "max_model_len": 1024,
                    "max_rank": 32,
                    "threads": 1,  # another worker needs a core, and two threads that wait for each other take twice
                },
                "cache": {"directory": str(work / "disk")},
                "api": {"max_body_bytes": 100_000},
            }
        )
        port = free_port()
        connect(LOCAL, num_cpus=4)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=LOGS)
        replicas = {name: {"num_replicas": number} for name, number in REPLICAS.items()}
        serve.run(assemble(config, replicas), name=APP, logging_config=LOGS)
        store = s3_server.root / published.removeprefix("s3://") / "adapters"
        with closing(Service(f"http://127.0.0.1:{port}", config, store, work / "disk" / "cache-0")) as running:
            yield running
        serve.shutdown()
        ray.shutdown()
    shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class Secured:
    """A second ingress, of two replicas, that asks for keys, before the same model."""

    url: str
    file: Path
    keys: dict[str, str]

    def write(self) -> None:
        rows = [{"name": name, "sha256": hash_key(key), **KEYS.get(name, {})} for name, key in self.keys.items()]
        partial = self.file.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(rows))
        partial.replace(self.file)

    def client(self, name: str, **headers: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[name]}", **headers}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)


KEYS: dict[str, dict[str, Any]] = {
    "all": {},
    "films": {"adapters": ["sst*", "senti*"]},
    "few": {"requests_per_minute": 5},
    "frugal": {"tokens_per_minute": 120},
    "operator": {"roles": ["admin"]},
    "films-admin": {"roles": ["admin"], "adapters": ["sst*", "senti*"]},
}


@pytest.fixture(scope="package")
def secured(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    file = tmp_path_factory.mktemp("access") / "keys.yaml"
    secured = Secured(f"{service.url}/secured", file, {name: new_key() for name in KEYS})
    secured.write()
    config = service.config.model_copy(update={"access": AccessSettings(keys_file=str(file))})
    names = ("QueryEmbedder", "TaskRetriever", "LoraModel", "CatalogEditor")
    router = Router.options(
        num_replicas=2, ray_actor_options={"num_cpus": 0.1}, deployment_actors=[limits_actor()]
    ).bind(config, *map(service.part, names))
    serve.run(router, name="secured", route_prefix="/secured", logging_config={"encoding": "JSON"})
    yield secured
    serve.delete("secured")
