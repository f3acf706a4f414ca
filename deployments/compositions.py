"""Compositions as `CatalogEditor` has them: asks for them, tells how they are, cancels them, and has them made.

A caller sees those whose adapters it may use. They are made by `deployments.composer`, which is started here and left
alone. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError

from deployments.access import Caller
from deployments.composer import check_name, setup_of, start_composer
from deployments.composition_jobs import UNDER_WAY, CompositionJob, CompositionJobs, waiting
from deployments.config import AppConfig
from deployments.rights import check_tasks, serving
from lorauter.adapters import AdapterRepository
from lorauter.adapters.provenance import composed_name
from lorauter.adapters.repository import MANIFEST_FILE
from lorauter.adapters.store import ObjectStore
from lorauter.catalog import Catalog
from lorauter.catalog.shown import unchecked
from lorauter.errors import (
    CompositionNotFound,
    Conflict,
    InvalidRequest,
    LorauterError,
    Overloaded,
    StoreError,
    TaskNotFound,
)

logger = logging.getLogger("lorauter.catalog")

_MOST = 64  # that wait at the same time
_AGAIN_S = 5.0


class Compositions:
    """Those of a catalog.

    Args:
        config: the app's configuration.
        store: the catalog's.
        repository: the adapters.
        current: the catalog as it is published.
    """

    def __init__(
        self, config: AppConfig, store: ObjectStore, repository: AdapterRepository, current: Callable[[], Catalog]
    ) -> None:
        self._config = config
        self._setup = setup_of(config)
        self._jobs = CompositionJobs(store)
        self._repository = repository
        self._current = current
        self._tried: set[str] = set()
        self._seeing: asyncio.Task[None] | None = None

    def ask(self, caller: Caller, task: str) -> dict[str, Any]:
        """Ask for a task's composition, which `see_to_them` then has made. One may ask at a time.

        Raises:
            TaskNotFound: the catalog has no such task.
            PermissionDenied: the caller may not change it.
            InvalidRequest: it has but one example, or there is nothing to compose it of.
            Conflict: one of the task is under way, or another adapter has the composition's name.
            Overloaded: too many wait.
            StoreError: of a store that is read only, or cannot be written, too.
            CatalogError.
        """
        catalog = self._current()
        place = catalog.place(task)
        if place is None:
            raise TaskNotFound(task[:128])
        check_tasks(caller, [task], serving(catalog, [task]))
        if catalog.entries[place].examples < 2:
            raise InvalidRequest(
                f"task {task!r} has one validation example; a composition needs two at least, to leave one out",
                param="task",
            )
        if not any(caller.permits(name) and name not in catalog.composed for name in catalog.adapters):
            raise InvalidRequest("there is no adapter to compose from; put one first", param="task")
        adapter = composed_name(task)
        check_name(self._repository, task, adapter)
        with self._repository.store.locked(f"{adapter}/{MANIFEST_FILE}"):
            pass  # it can be written: who finds that it cannot in twenty minutes' time has lost them
        jobs = self._jobs.all()
        under_way = [job for job in jobs if job.status in UNDER_WAY and not job.is_lost(self._setup)]
        if same := [job for job in under_way if job.task == task]:
            raise Conflict(
                f"a composition of task {task!r} is under way ({same[0].id}); wait for it, or cancel it "
                f"(POST /v1/compositions/{same[0].id}/cancel)"
            )
        if len(under_way) >= _MOST:
            raise Overloaded(f"{_MOST} compositions are under way, and no more are taken", retry_after_s=60.0)
        job = CompositionJob.of(caller, task, adapter, self._setup)
        self._jobs.add(job)
        return self._shown(job, caller, jobs)

    def list(self, caller: Caller) -> dict[str, Any]:
        """All that the caller may see, the latest first. Raises StoreError."""
        jobs = self._jobs.all()
        rows = [self._shown(job, caller, jobs) for job in reversed(jobs) if caller.permits(job.adapter)]
        return {"object": "list", "data": rows}

    def get(self, caller: Caller, id: str) -> dict[str, Any]:
        """One of them. Raises CompositionNotFound, StoreError."""
        return self._shown(self._seen(caller, id), caller, self._jobs.all())

    def cancel(self, caller: Caller, id: str) -> dict[str, Any]:
        """Have one made no further.

        Raises:
            CompositionNotFound, StoreError.
            Conflict: it has ended, or is just being published.
        """
        self._seen(caller, id)

        def cancelled(job: CompositionJob) -> CompositionJob:
            if job.status == "cancelled":
                return job
            if job.status not in ("queued", "running") and not job.is_lost(self._setup):
                raise Conflict(
                    f"composition {id} is {job.status}, and not to be cancelled any more; "
                    f"DELETE /v1/adapters/{job.adapter} takes away what it made"
                )
            return job.ending("cancelled")

        return self._shown(self._jobs.change(id, cancelled), caller, ())

    def see_to_them(self) -> None:
        """Have a composer at work as long as one of them waits, or a task's examples; without waiting for it."""
        if self._seeing is None or self._seeing.done():
            self._seeing = asyncio.get_running_loop().create_task(self._see())

    async def _see(self) -> None:
        while True:
            try:
                if not await asyncio.to_thread(self._is_wanted):
                    return
                composer = await asyncio.to_thread(start_composer, self._config)
                await composer.run.remote()
            except RayError as error:  # so it ends every time, and for worse reasons too
                logger.info("the composer has ended: %s", error)
            except StoreError as error:
                logger.warning("what is to be composed cannot be seen: %s", error)
            except LorauterError as error:  # a broken catalog, which does not mend itself
                logger.warning("nothing is composed: %s", error)
                return
            await asyncio.sleep(_AGAIN_S)  # until its name is free

    def _is_wanted(self) -> bool:
        """Whether a composer has something to do; for a catalog's examples it is asked once."""
        if waiting(self._jobs.all(), self._setup):
            return True
        catalog = self._current()
        if catalog.version in self._tried or not unchecked(catalog)[1]:
            return False
        self._tried.add(catalog.version)
        return True

    def _seen(self, caller: Caller, id: str) -> CompositionJob:
        job = self._jobs.get(id)
        if not caller.permits(job.adapter):
            raise CompositionNotFound(id)
        return job

    def _shown(self, job: CompositionJob, caller: Caller, jobs: Sequence[CompositionJob]) -> dict[str, Any]:
        ahead = sum(
            other.id < job.id and other.status in UNDER_WAY and not other.is_lost(self._setup) for other in jobs
        )
        return job.shown(caller.audience, self._setup, ahead)
