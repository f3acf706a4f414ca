"""CatalogEditor: adds and removes adapters and tasks while the service runs, one change after the other.

Every change is a new version of the catalog, made of the current one and published; the retrievers find it there. One
replica at most, which Serve starts for the first change; where somebody else publishes meanwhile (the command line),
the change is made again of theirs. Knows nothing of HTTP and keys.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig
from lorauter.adapters import AdapterManifest, AdapterRepository, LoraWeights, open_store
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE
from lorauter.catalog import Catalog, change_catalog, with_adapter, with_tasks, without_adapters, without_tasks
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.encoder import Embeddings
from lorauter.errors import AdapterNotFound, InvalidRequest, TaskNotFound
from lorauter.tasks import Task

_AT_ONCE = 16
_IDLE_S = 300.0

Files = Mapping[str, NDArray[np.uint8]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Embedded:
    """An encoder that knows the texts that were embedded before."""

    name: str
    vectors: Mapping[str, Embeddings]

    def encode(self, texts: Sequence[str]) -> Embeddings:
        return np.stack([self.vectors[text] for text in texts])


@serve.deployment(
    autoscaling_config={
        "min_replicas": 0,
        "initial_replicas": 0,
        "max_replicas": 1,
        "downscale_delay_s": _IDLE_S,
        "upscale_delay_s": 0,
    },
    max_ongoing_requests=16,
    ray_actor_options={"num_cpus": 0},
    health_check_period_s=5,
)
class CatalogEditor:
    """Changes the catalog and the adapters' store.

    Args:
        config: the app's configuration.
        embedder: handle of QueryEmbedder.
        model: handle of LoraModel, which knows what an adapter has to fit.
    """

    def __init__(self, config: AppConfig, embedder: DeploymentHandle[Any], model: DeploymentHandle[Any]) -> None:
        assert config.catalog is not None  # or there is nothing to edit
        self._store = open_store(config.catalog)
        self._repository = AdapterRepository(open_store(config.adapters))
        self._embedder = embedder
        self._model = model
        self._worker = ThreadPoolExecutor(1)  # changes wait for each other, and one that began ends, whoever hung up

    async def put_task(self, task: Task) -> dict[str, Any]:
        """Add a task, or replace the one of its name. Raises CatalogError, StoreError."""
        texts = [PROBE_TEXT, *dict.fromkeys(example.input for example in task.validation)]
        vectors: dict[str, Embeddings] = {}
        for start in range(0, len(texts), _AT_ONCE):  # few at once, as queries wait for the same encoder
            some = texts[start : start + _AT_ONCE]
            vectors |= zip(some, await self._embedder.embed.remote(some), strict=True)
        encoder = _Embedded(await self._embedder.name.remote(), vectors)
        catalog = await self._alone(
            lambda: self._change(lambda before: with_tasks(before, [task], encoder), tasks=[task.name])
        )
        [entry] = [entry for entry in catalog.tasks if entry.name == task.name]
        served = [adapter.name for adapter in entry.adapters]
        return {"id": task.name, "object": "task", "adapters": served, "catalog_version": catalog.version}

    async def remove_task(self, name: str) -> dict[str, Any]:
        """Take a task out. Raises TaskNotFound, InvalidRequest (it is the last), CatalogError, StoreError."""

        def without(before: Catalog) -> Catalog:
            names = {entry.name for entry in before.tasks}
            if name not in names:
                raise TaskNotFound(name)
            if names == {name}:
                raise InvalidRequest(f"task {name!r} is the catalog's last; add another first", param="name")
            return without_tasks(before, [name])

        catalog = await self._alone(lambda: self._change(without, tasks=[name]))
        return {"id": name, "object": "task", "deleted": True, "catalog_version": catalog.version}

    async def put_adapter(self, name: str, files: Files | None) -> dict[str, Any]:
        """Take in an adapter, or another version of it: of these files, or else as the store has it.

        Raises:
            AdapterRejected: it is no adapter that the engine would serve.
            AdapterNotFound: there are no files, and none of this name in the store.
            AdapterUnavailable, CatalogError, StoreError.
        """
        shape, max_rank = await self._model.shape.remote()
        warnings: list[str] = []

        def take_in() -> tuple[AdapterManifest, Catalog]:
            manifest = push()

            def with_it(before: Catalog) -> Catalog:
                self._repository.check_current(manifest)
                return with_adapter(before, manifest)

            return manifest, self._change(with_it, adapters=[name])

        def push() -> AdapterManifest:
            if files is None:
                manifest = self._repository.manifest(name)
                check(self._repository.load(manifest))
                return manifest
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / name
                folder.mkdir()
                for file in (CONFIG_FILE, WEIGHTS_FILE):
                    files[file].tofile(folder / file)
                check(LoraWeights.load(folder, name=name, version="pushed"))
                return self._repository.push(folder)

        def check(weights: LoraWeights) -> None:
            warnings[:] = *weights.warnings, *weights.check_fits(shape, max_rank=max_rank)

        manifest, catalog = await self._alone(take_in)
        serves = [entry.name for entry in catalog.tasks if name in {adapter.name for adapter in entry.adapters}]
        head = {"id": name, "object": "adapter", "version": manifest.version, "bytes": manifest.size}
        told = {"warnings": warnings} if warnings else {}
        return {**head, "rank": manifest.rank, "tasks": serves, "catalog_version": catalog.version, **told}

    async def remove_adapter(self, name: str) -> dict[str, Any]:
        """Take an adapter out of the catalog, then out of the store.

        Raises:
            AdapterNotFound: neither has one of this name.
            AdapterUnavailable, CatalogError, StoreError.
        """

        known = False

        def without(before: Catalog) -> Catalog:
            nonlocal known
            known = name in before.adapters
            return without_adapters(before, [name]) if known else before

        def remove() -> Catalog:
            catalog = self._change(without, adapters=[name])
            try:
                self._repository.remove(name)
            except AdapterNotFound:
                if not known:
                    raise
            return catalog

        catalog = await self._alone(remove)
        return {"id": name, "object": "adapter", "deleted": True, "catalog_version": catalog.version}

    async def _alone(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def _change(
        self, edit: Callable[[Catalog], Catalog], *, tasks: Sequence[str] = (), adapters: Sequence[str] = ()
    ) -> Catalog:
        return change_catalog(self._store, edit, tasks=tasks, adapters=adapters)
