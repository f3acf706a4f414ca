"""The composer: the process that makes the compositions that were asked for, one after the other, and then ends.

Where examples go before queries, it also finds out what they do for tasks of which that is not known, as a task or an
adapter came since: it asks them as `lorauter catalog build --examples` does.

It is a named actor beside the deployments, which `CatalogEditor` starts where something waits to be made and which
outlives it. What it is given is `compose` in the settings; without a GPU it takes the time of the cores that nobody
else wants. It holds nothing that is not in the store: where it dies, what it was at is lost, and is told to be, and
what waits is made by the next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import ray

from deployments.adapter_cache import NAMESPACE
from deployments.composition_jobs import UNDER_WAY, CompositionJob, CompositionJobs, waiting
from deployments.config import AppConfig
from deployments.devices import own_gpus_only
from deployments.openai_answers import error_answer
from deployments.rights import check_tasks, serving
from deployments.told import Audience
from lorauter.adapters import AdapterRepository, open_store
from lorauter.adapters.provenance import Composition
from lorauter.catalog import Catalog, change_catalog, with_adapter, with_shown, without_adapters
from lorauter.catalog.provenance import task_digests
from lorauter.catalog.shown import unchecked
from lorauter.defaults import base_model_aliases, resolve_model
from lorauter.engine.config import EngineConfig
from lorauter.errors import AdapterNotFound, AdapterRejected, Conflict, LorauterError, ServiceUnavailable

if TYPE_CHECKING:
    from lorauter.compositions.make import Made
    from lorauter.compositions.written import CompositionProvenance

logger = logging.getLogger("lorauter.composer")

_BEAT_S = 3.0  # between two words of a composition's progress
_ATTEMPTS = 6  # to say how it ended
_LAST = 19  # in the queue for a core


def setup_of(config: AppConfig) -> str:
    """Tells what a service composes from and for: its adapters, its base model and what that takes."""
    of = [config.base_model, config.base_model_aliases, config.adapters, config.engine.max_rank]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:12]


def start_composer(config: AppConfig) -> Any:
    """The actor's handle; it is started if it is not there."""
    return (
        ray.remote(ComposerActor)
        .options(
            name=f"composer-{hashlib.sha256(f'{config.catalog} {setup_of(config)}'.encode()).hexdigest()[:12]}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=0,
            **config.compose.model_dump(),
        )
        .remote(config)
    )


def check_name(repository: AdapterRepository, task: str, adapter: str) -> None:
    """Raise Conflict where the store has an adapter of this name that was not composed for the task; StoreError,
    AdapterUnavailable."""
    try:
        of = Composition.of(repository.manifest(adapter).provenance)
    except AdapterNotFound:
        return
    except AdapterRejected:
        of = None
    if of is None or of.task != task:
        raise Conflict(
            f"the store has an adapter {adapter!r} that was not composed for task {task!r}, and it stays; remove it "
            "(DELETE /v1/adapters/{name}), or give the task another name"
        )


class _Cancelled(Exception):
    """Nobody wants it any more."""


@dataclass
class _Told:
    """What the process that makes a composition and who speaks of it tell each other."""

    progress: float = 0.0
    over: bool = False

    def step(self, done: int, total: int, what: str) -> None:
        """`lorauter.compositions.make.Progress`. Raises _Cancelled."""
        if self.over:
            raise _Cancelled
        self.progress = done / total if total else 0.0


class ComposerActor:
    """The actor's body.

    Args:
        config: the app's configuration.
    """

    def __init__(self, config: AppConfig) -> None:
        own_gpus_only()
        assert config.catalog is not None  # or nothing could be asked for
        self._config = config
        self._setup = setup_of(config)
        self._store = open_store(config.catalog)
        self._jobs = CompositionJobs(self._store)
        self._repository = AdapterRepository(open_store(config.adapters))
        self._last: Catalog | None = None
        self._tried: set[str] = set()  # catalogs' versions

    def run(self) -> None:
        """Make all that waits, and end; whoever asks for one meanwhile finds no actor, and starts the next."""
        if not self._config.compose.num_gpus:
            with suppress(OSError):
                os.nice(_LAST)
        try:
            self.work()
        finally:
            ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    def work(self) -> None:
        """Do all that waits. Raises StoreError, CatalogError."""
        while True:
            if wanted := waiting(self._jobs.all(), self._setup):
                self._make(wanted[0])
            elif not self._asked_after_examples():
                return

    def _asked_after_examples(self) -> bool:
        """Whether there were tasks that had to be asked after their examples; what that told is in the catalog then."""
        self._last = catalog = Catalog.load(self._store, known=self._last)
        count, names = unchecked(catalog)
        if not names or catalog.version in self._tried:
            return False
        self._tried.add(catalog.version)
        logger.info("asking tasks after %d of their examples: %s", count, ", ".join(names[:10]))
        from lorauter.engine import load_engine  # torch and transformers take a while
        from lorauter.evaluation.answering import adapters_in
        from lorauter.evaluation.left_out import ask_again

        try:
            config = self._config
            settings = replace(config.engine, device="auto", max_slowdown=None, max_queue=EngineConfig().max_queue)
            aliases = (*config.base_model_aliases, *base_model_aliases(config.base_model))
            with closing(load_engine(resolve_model(config.base_model), settings, aliases=aliases)) as engine:
                found = ask_again(catalog, names, count, engine, adapters_in(self._repository, catalog.adapters))
            before = {name: _asked_of(catalog, name) for name in names}

            def edit(now: Catalog) -> Catalog:
                return with_shown(now, {name: of for name, of in found.items() if _asked_of(now, name) == before[name]})

            self._last = change_catalog(self._store, edit, known=catalog)
        except Exception:  # no example is shown for these tasks, as before
            logger.exception("what examples do for %s is not known", ", ".join(names[:10]))
        return True

    def _make(self, job: CompositionJob) -> None:
        def begun(before: CompositionJob) -> CompositionJob:
            if before.status != "queued":  # it was cancelled, or another composer has begun
                return before
            return replace(before, status="running", began=time.time(), heard=time.time())

        job = self._jobs.change(job.id, begun)
        if job.status != "running":
            return
        logger.info("composition %s of task %r begins", job.id, job.task)
        try:
            with self._beating(job) as told, tempfile.TemporaryDirectory(prefix="lorauter-") as work:
                result = self._composed(job, told, Path(work))
                end = job.ending("done", progress=1.0, result=result)
        except _Cancelled:
            logger.info("composition %s was cancelled", job.id)
            return
        except Exception as error:  # noqa: BLE001 (whatever it is, the others are to be made)
            ours = _in_our_words(error)
            end = job.ending("failed", error={who: error_answer(ours, who)[1]["error"] for who in get_args(Audience)})
        logger.info("composition %s is %s: %s", job.id, end.status, end.result or end.error)
        self._end(end)

    def _composed(self, job: CompositionJob, told: _Told, work: Path) -> dict[str, Any]:
        """Make a composition, and take it in where it holds; returns what came of it."""
        from lorauter.compositions.config import ComposeConfig  # torch and transformers take a while
        from lorauter.compositions.pool import compose_for
        from lorauter.evaluation.answering import adapters_in

        config = self._config
        began = Catalog.load(self._store)
        self._check(job, began, began)
        foreign = [name for name in began.adapters if not job.caller.permits(name)]
        pool = without_adapters(began, foreign) if foreign else began
        settings = ComposeConfig(max_rank=min(ComposeConfig().max_rank, config.engine.max_rank))
        [made] = compose_for(
            pool,
            [job.task],
            adapters_in(self._repository, pool.adapters),
            work,
            model=config.base_model,
            aliases=config.base_model_aliases,
            config=settings,
            progress=told.step,
            report=lambda what: logger.warning("composition %s: %s", job.id, what),
        )
        result = {"kept": made.holds, "scores": _scores(made.provenance)}
        if not made.holds:
            return {**result, "reason": _why_not(made)}
        return result | self._taken_in(job, made, began)

    def _taken_in(self, job: CompositionJob, made: Made, began: Catalog) -> dict[str, Any]:
        """Push an adapter and catalogue it; where something it stands on has changed, neither."""

        def publishing(before: CompositionJob) -> CompositionJob:
            if before.status != "running":
                raise _Cancelled
            return replace(before, status="publishing", progress=1.0, heard=time.time())

        self._check(job, began, Catalog.load(self._store, known=began))
        self._jobs.change(job.id, publishing)
        manifest = self._repository.push(made.folder)

        def edit(before: Catalog) -> Catalog:
            self._check(job, began, before)
            self._repository.check_current(manifest)
            return with_adapter(before, manifest)

        catalog = change_catalog(self._store, edit, adapters=[job.adapter], known=began)
        return {
            "version": manifest.version,
            "bytes": manifest.size,
            "rank": made.provenance.rank,
            "energy": _number(made.provenance.energy),
            "sources": len(made.provenance.sources),
            "stale": job.adapter in catalog.stale,
            "catalog_version": catalog.version,
        }

    def _check(self, job: CompositionJob, began: Catalog, now: Catalog) -> None:
        """Raise unless a catalog has the task and the composition as they were.

        Raises:
            Conflict: it has not, or another adapter has the composition's name.
            PermissionDenied: somebody else's adapter serves the task by now.
            StoreError, AdapterUnavailable.
        """
        before, after = (_examples(catalog, job.task) for catalog in (began, now))
        if after is None:
            raise Conflict(f"task {job.task!r} was removed meanwhile; put it again, and then ask again")
        if before != after:
            raise Conflict(f"the examples or the metric of task {job.task!r} were changed meanwhile; ask again")
        if began.adapters.get(job.adapter) != now.adapters.get(job.adapter):
            raise Conflict(f"somebody else changed adapter {job.adapter!r} meanwhile; look at it, and ask again")
        check_tasks(job.caller, [job.task], serving(now, [job.task]))
        check_name(self._repository, job.task, job.adapter)

    @contextmanager
    def _beating(self, job: CompositionJob) -> Iterator[_Told]:
        """Say every now and then how far it is, and hear whether it was cancelled."""
        told, stop = _Told(), threading.Event()

        def word(before: CompositionJob) -> CompositionJob:
            if before.status not in UNDER_WAY:
                return before
            return replace(before, heard=time.time(), progress=max(before.progress, round(told.progress, 3)))

        def beat() -> None:
            while not stop.wait(_BEAT_S):
                try:
                    told.over = self._jobs.change(job.id, word).status not in UNDER_WAY
                except LorauterError as error:
                    logger.warning("composition %s: its progress cannot be told: %s", job.id, error)

        thread = threading.Thread(target=beat, daemon=True, name="composition-heard")
        thread.start()
        try:
            yield told
        finally:
            stop.set()
            thread.join()

    def _end(self, end: CompositionJob) -> None:
        """Say how it ended, unless it was cancelled before."""
        for attempt in range(_ATTEMPTS):
            try:
                self._jobs.change(end.id, lambda before: end if before.status in UNDER_WAY else before)
                return
            except LorauterError as error:
                logger.warning("composition %s: its end cannot be told: %s", end.id, error)
                time.sleep(2**attempt)


def _examples(catalog: Catalog, task: str) -> str | None:
    """A digest of a task's examples and metric; None where it is not there."""
    place = catalog.place(task)
    return None if place is None else task_digests([catalog.tasks[place].task])[task]


def _asked_of(catalog: Catalog, task: str) -> tuple[str | None, list[tuple[str, str | None]]]:
    """What an answer to a task's examples depends on: these, and the adapters that were made for it."""
    place = catalog.place(task)
    declared = () if place is None else catalog.entries[place].declared
    return _examples(catalog, task), [(name, catalog.adapters.get(name)) for name in declared]


def _in_our_words(error: Exception) -> LorauterError:
    import torch

    if isinstance(error, LorauterError):
        return error
    logger.error("a composition failed", exc_info=error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return ServiceUnavailable("there was not enough memory to compose; give the composer more (`compose`)")
    return ServiceUnavailable(f"the composer failed ({type(error).__name__}); its log says more")


def _scores(of: CompositionProvenance) -> dict[str, Mapping[str, Any]]:
    """What left-out examples had before and after."""
    likelihood = {"before": of.score_before, "after": of.score_after, "gain": of.gain, "error": of.error}
    return {
        "log_likelihood": {name: _number(value) for name, value in likelihood.items()},
        "right": {"before": _number(of.right_before), "after": _number(of.right_after), "exact": of.exact},
    }


def _why_not(made: Made) -> str:
    gain, error = made.provenance.gain, made.provenance.error
    return (
        f"the log-likelihood of left-out examples is better by {gain:.3f} than under the router's own mixtures, and "
        f"would have to be by more than {made.margin * error:.3f} ({made.margin:g} of its standard errors): those stay"
    )


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
