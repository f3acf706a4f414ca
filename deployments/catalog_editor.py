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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.access import Caller
from deployments.changes import Change
from deployments.compositions import Compositions
from deployments.config import AppConfig
from deployments.logs import join_serve_logs
from deployments.rights import check_tasks, serving
from lorauter.adapters import AdapterManifest, AdapterRepository, LoraWeights, open_store
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE
from lorauter.catalog import (
    Catalog,
    change_catalog,
    use_version,
    with_adapter,
    with_tasks,
    without_adapters,
    without_tasks,
)
from lorauter.catalog.catalog import PROBE_TEXT, pointed_version, read_adapters
from lorauter.catalog.whitening import States
from lorauter.encoder import Embeddings
from lorauter.errors import AdapterNotFound, AdapterRejected, CatalogError, InvalidRequest, ReadOnlyStore, TaskNotFound
from lorauter.tasks import Task
from lorauter.uris import called

_AT_ONCE = 16
_IDLE_S = 300.0

Files = Mapping[str, NDArray[np.uint8]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Read:
    """A model of states that knows the texts that were read before."""

    name: str
    known: Mapping[str, States]

    def states(self, texts: Sequence[str]) -> States:
        return np.stack([self.known[text] for text in texts])


@dataclass(frozen=True)
class _Embedded:
    """An encoder that knows the texts that were embedded before, and what was read of them."""

    name: str
    vectors: Mapping[str, Embeddings]
    reader: _Read | None

    def encode(self, texts: Sequence[str]) -> Embeddings:
        return np.stack([self.vectors[text] for text in texts])


@dataclass(frozen=True)
class _Taken:
    """An adapter that is in the store and may be served, and what of it has no effect."""

    manifest: AdapterManifest
    warnings: tuple[str, ...]


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
        join_serve_logs()
        assert config.catalog is not None  # or there is nothing to edit
        self._store = open_store(config.catalog)
        self._repository = AdapterRepository(open_store(config.adapters))
        self._embedder = embedder
        self._state_model = config.state_model
        self._model = model
        self._last: Catalog | None = None  # as it was made or read: the next change reads what differs from it
        self._compositions = Compositions(config, self._store, self._repository, self._current)
        self._worker = ThreadPoolExecutor(1)  # changes wait for each other, and one that began ends, whoever hung up

    async def change(self, caller: Caller, changes: Sequence[Change]) -> dict[str, Any]:
        """Make all of the changes in one version of the catalog, or none; what goes from it then goes from the store.

        Raises:
            PermissionDenied: the caller may not change one of the tasks, as the catalog is that is changed.
            TaskNotFound, AdapterNotFound: what is to go, or an adapter that is to come, is not there.
            AdapterRejected: one that is to come is none that the engine would serve.
            InvalidRequest: no task would be left.
            Conflict: somebody else changed one of these meanwhile.
            AdapterUnavailable, CatalogError, StoreError.
        """
        encoder = await self._encoder([change.task for change in changes if change.task is not None])
        coming = [change.name for change in changes if change.kind == "adapter" and not change.remove]
        check = await self._check() if coming else None

        def take(name: str) -> _Taken:
            assert check is not None
            manifest = self._repository.manifest(name)
            return _Taken(manifest, check(self._repository.load(manifest)))

        return await self._changed(lambda: self._apply(caller, changes, encoder, {name: take(name) for name in coming}))

    async def put_task(self, caller: Caller, task: Task) -> dict[str, Any]:
        """Add a task, or replace the one of its name. Raises as `change`."""
        return _single(await self.change(caller, [Change("task", task.name, task=task)]))

    async def remove_task(self, caller: Caller, name: str) -> dict[str, Any]:
        """Take a task out. Raises as `change`."""
        return _single(await self.change(caller, [Change("task", name, remove=True)]))

    async def remove_adapter(self, caller: Caller, name: str) -> dict[str, Any]:
        """Take an adapter out of the catalog, then out of the store. Raises as `change`."""
        return _single(await self.change(caller, [Change("adapter", name, remove=True)]))

    async def put_adapter(self, caller: Caller, name: str, files: Files | None) -> dict[str, Any]:
        """Take in an adapter, or another version of it: of these files, or else as the store has it.

        Raises as `change`.
        """
        change = Change("adapter", name)
        if files is None:
            return _single(await self.change(caller, [change]))
        check = await self._check()

        def push() -> _Taken:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / name
                folder.mkdir()
                for file in (CONFIG_FILE, WEIGHTS_FILE):
                    files[file].tofile(folder / file)
                warnings = check(LoraWeights.load(folder, name=name, version="pushed"))
                return _Taken(self._repository.push(folder), warnings)

        return _single(await self._changed(lambda: self._apply(caller, [change], None, {name: push()})))

    async def use_version(self, version: str) -> dict[str, Any]:
        """Make another version the current one, as it is; says which of its adapters the store has no more.

        Raises:
            CatalogVersionNotFound: it is not there.
            CatalogError: it is damaged.
            Conflict: another version became current meanwhile.
            AdapterUnavailable, StoreError.
        """

        def use() -> dict[str, Any]:
            before: Mapping[str, str] = {}
            with suppress(CatalogError):  # what is current may be what is to be mended
                before = read_adapters(self._store, pointed_version(self._store) or "")
            catalog = use_version(self._store, version)
            back = [name for name in catalog.adapters if name not in before]
            return {
                "id": catalog.version,
                "object": "catalog.version",
                "catalog_version": catalog.version,
                "missing_adapters": self._missing(back, catalog),
            }

        return await self._alone(use)

    async def compose(self, caller: Caller, task: str) -> dict[str, Any]:
        """Ask for a task's composition. Raises as `Compositions.ask`."""
        asked = await self._alone(lambda: self._compositions.ask(caller, task))
        self._compositions.see_to_them()
        return asked

    async def compositions(self, caller: Caller) -> dict[str, Any]:
        """Those that were asked for. Raises StoreError."""
        self._compositions.see_to_them()
        return await asyncio.to_thread(self._compositions.list, caller)

    async def composition(self, caller: Caller, id: str) -> dict[str, Any]:
        """One of them. Raises CompositionNotFound, StoreError."""
        self._compositions.see_to_them()
        return await asyncio.to_thread(self._compositions.get, caller, id)

    async def cancel_composition(self, caller: Caller, id: str) -> dict[str, Any]:
        """Have one made no further. Raises as `Compositions.cancel`."""
        return await asyncio.to_thread(self._compositions.cancel, caller, id)

    async def _check(self) -> Callable[[LoraWeights], tuple[str, ...]]:
        """What gives back the warnings about an adapter, or raises AdapterRejected where the engine would refuse it."""
        shape, max_rank = await self._model.shape.remote()
        return lambda weights: (*weights.warnings, *weights.check_fits(shape, max_rank=max_rank))

    async def _encoder(self, tasks: Sequence[Task]) -> _Embedded | None:
        """What knows the tasks' examples; None where there are no tasks."""
        if not tasks:
            return None
        texts = [PROBE_TEXT, *dict.fromkeys(example.input for task in tasks for example in task.validation)]
        # Their states too, unless it is known that the catalog has none, or nobody reads here.
        read = self._state_model is not None and await self._alone(self._has_states)
        vectors: dict[str, Embeddings] = {}
        states: dict[str, States] = {}
        for start in range(0, len(texts), _AT_ONCE):  # few at once, as queries wait for the same encoder
            some = texts[start : start + _AT_ONCE]
            vectors |= zip(some, await self._embedder.embed.remote(some), strict=True)
            if read:
                states |= zip(some, await self._embedder.states.remote(some), strict=True)
        reader = _Read(called(self._state_model or ""), states) if read else None
        return _Embedded(await self._embedder.name.remote(), vectors, reader)

    def _has_states(self) -> bool:
        return self._current().states is not None

    def _current(self) -> Catalog:
        self._last = Catalog.load(self._store, known=self._last)
        return self._last

    def _apply(
        self, caller: Caller, changes: Sequence[Change], encoder: _Embedded | None, taken: Mapping[str, _Taken]
    ) -> dict[str, Any]:
        manifests = [adapter.manifest for adapter in taken.values()]
        tasks = [change.task for change in changes if change.task is not None]
        no_tasks = [change.name for change in changes if change.kind == "task" and change.remove]
        no_adapters = [change.name for change in changes if change.kind == "adapter" and change.remove]
        names = [[change.name for change in changes if change.kind == kind] for kind in ("task", "adapter")]
        known: list[str] = []

        def edit(before: Catalog) -> Catalog:
            check_tasks(caller, names[0], serving(before, names[0]))
            after = before
            if encoder is not None:
                after = with_tasks(after, tasks, encoder, states=encoder.reader)
            for manifest in manifests:
                self._repository.check_current(manifest)
            if manifests:
                after = with_adapter(after, *manifests)
            known[:] = [name for name in no_adapters if name in before.adapters]
            for name in no_adapters:
                if name not in known:
                    self._check_stored(name)
            return _without(after, no_tasks, known)

        catalog = self._change(edit, tasks=names[0], adapters=names[1])
        for name in no_adapters:
            try:
                self._repository.remove(name)
            except (AdapterNotFound, ReadOnlyStore):  # one that can only be read keeps it, and nobody is served it
                if name not in known:
                    raise
        if no_adapters and pointed_version(self._store) != catalog.version:  # somebody may have taken them in again
            self._change(lambda before: _without(before, [], self._missing(no_adapters, before)))
        rows = [_row(change, catalog, taken) for change in changes]
        return {"object": "catalog.changes", "catalog_version": catalog.version, "data": rows}

    def _check_stored(self, name: str) -> None:
        """Raise AdapterNotFound where the store has no adapter of this name; AdapterUnavailable."""
        with suppress(AdapterRejected):  # a malformed one is there
            self._repository.manifest(name)

    def _missing(self, names: Sequence[str], catalog: Catalog) -> list[str]:
        """Of the names those that a catalog has, and the store has not."""
        missing = []
        for name in names:
            try:
                self._check_stored(name)
            except AdapterNotFound:
                missing += [name] if name in catalog.adapters else []
        return missing

    async def _alone(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    async def _changed(self, work: Callable[[], Result]) -> Result:
        """The same for a change, after which there may be something to find out."""
        result = await self._alone(work)
        self._compositions.see_to_them()
        return result

    def _change(
        self, edit: Callable[[Catalog], Catalog], *, tasks: Sequence[str] = (), adapters: Sequence[str] = ()
    ) -> Catalog:
        self._last = change_catalog(self._store, edit, tasks=tasks, adapters=adapters, known=self._last)
        return self._last


def _without(catalog: Catalog, tasks: Sequence[str], adapters: Sequence[str]) -> Catalog:
    """A catalog without some of it. Raises TaskNotFound, InvalidRequest (no task would be left)."""
    for name in tasks:
        if catalog.place(name) is None:
            raise TaskNotFound(name)
    if len(catalog) <= len(set(tasks)):
        raise InvalidRequest(f"task {tasks[0]!r} is the catalog's last; add another first", param="name")
    catalog = without_tasks(catalog, tasks) if tasks else catalog
    return without_adapters(catalog, adapters) if adapters else catalog


def _row(change: Change, catalog: Catalog, taken: Mapping[str, _Taken]) -> dict[str, Any]:
    """What is answered of a change that was made."""
    head: dict[str, Any] = {"id": change.name, "object": change.kind}
    if change.remove:
        return {**head, "deleted": True}
    if change.kind == "task":
        return {**head, "adapters": serving(catalog, [change.name])[change.name]}
    manifest, warnings = taken[change.name].manifest, list(taken[change.name].warnings)
    head |= {"version": manifest.version, "bytes": manifest.size}
    serves = [catalog.names[place] for place in catalog.served_by(lambda name: name == change.name).nonzero()[0]]
    return {**head, "rank": manifest.rank, "tasks": serves, **({"warnings": warnings} if warnings else {})}


def _single(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request that made one change."""
    return {**answer["data"][0], "catalog_version": answer["catalog_version"]}
