"""A batch job from files to files: planned, run on Ray, resumed where it was cut off, and counted."""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

import lorauter
from deployments.adapter_cache import CacheSpec, running_caches
from deployments.batch.config import BatchConfig
from deployments.batch.inputs import find_files, format_of
from deployments.batch.output import (
    MANIFEST_FORMAT,
    Output,
    check_same,
    read_manifest,
    write_manifest,
)
from deployments.batch.pins import check_pins, pin
from deployments.batch.pipeline import resolved, shards_pipeline
from deployments.batch.plan import Plan, make_plan, plan_in
from deployments.batch.reports import Reports
from deployments.batch.rows import check_clash, result_schema
from deployments.batch.stages import Done, unpacked
from deployments.batch.tally import Tally
from deployments.cluster import LOCAL, connect
from deployments.room import Watch, look
from deployments.startup import explained
from lorauter.defaults import resolve_encoder, resolve_model
from lorauter.errors import BatchError, ConfigError, LorauterError
from lorauter.models import pinned

_Outcomes = queue.Queue[Done | BaseException | None]
"""What comes out of the pipeline: shards, an error, or None in the end."""

_POLL_S = 0.5
_OBJECT_STORE = 1 << 30  # bytes, of a local Ray: shards on their way, beyond which reading waits
_MANIFEST_S = 10.0  # between two notes of the counts, so that others can see how far a job is


@dataclass
class Status:
    """How far a job is.

    Attributes:
        total, rows, errors, tokens: rows of the input; those that are done; errors and new tokens among them.
        begun, begun_tokens: rows and tokens of an earlier run.
        seconds: since the first answering worker was ready, or without any since the pipeline began.
        tally: of the shards that are done.
        workers: what each answering worker says of itself, the latest.
    """

    total: int
    rows: int = 0
    errors: int = 0
    tokens: int = 0
    begun: int = 0
    begun_tokens: int = 0
    seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def adapter_loads(self) -> int:
        """How often workers of this run read an adapter from their disks."""
        return sum(facts["loads"] for facts in self.workers.values())


def run_job(
    input: str,
    output: str,
    config: BatchConfig,
    *,
    address: str | None = None,
    notify: Callable[[str], None] = lambda text: None,
    progress: Callable[[Status], None] = lambda status: None,
) -> Status:
    """Answer the rows of an input's files, and write them to a folder; what is there already is not done again.

    Args:
        input: a file that `inputs.find_files` knows, or a folder of such, local or `s3://`.
        output: a folder, or `s3://bucket/prefix`.
        config: everything else.
        address: a running Ray cluster; None is RAY_ADDRESS's, a Ray that this process has started, or a local one
            that is started and stopped.
        notify: is told what the job is about to do.
        progress: is told twice a second, and after each shard, how far it is.

    Raises:
        ConfigError: a setting is wrong, the input is not there, the output is another job's, or the catalog's version
            that the job has been using is gone.
        BatchError: more rows failed than `max_errors`, or the workers cannot go on. What was written stays.
        StoreError: input or output cannot be reached.
    """
    config = resolved(config)
    config = config.model_copy(
        update={  # for as long as it takes
            "base_model": pinned(config.base_model),
            "encoder": pinned(config.encoder),
            "state_model": None if config.state_model is None else pinned(config.state_model),
        }
    )
    input, output = _absolute(input), _absolute(output)
    _check_places(input, output)
    before = read_manifest(output)
    store, kind, files = find_files(input, notify)
    catalog = pin(config) if before is None else {**(before.get("catalog") or {}), "uri": config.catalog}
    identity = {
        "input": {"uri": input, "files": [vars(file) for file in files]},
        "output_format": config.format or kind,
        "catalog": catalog,
        "model": None if config.route_only else config.base_model,
        "settings": config.decides(),
    }
    added = result_schema(route_only=config.route_only)
    if before is None:
        notify(f"reading through {input}")
        clashing = [] if config.format == "openai" else added.names
        plan = make_plan(store, kind, files, config.shard_rows, config.format or kind, clashing)
        if read_manifest(output) is not None:  # reading takes minutes
            raise ConfigError(f"another job has begun to write to {output} meanwhile", setting="output")
    else:
        check_same(output, {name: before.get(name) for name in identity}, identity)
        plan = plan_in(output, before)
    check_clash(plan.renamed, config)
    plain = config.prompts == "plain"
    place = Output(output, config.format or kind, plan.schema, added, plan.renamed, plain)
    manifest = {
        "format": MANIFEST_FORMAT,
        "lorauter": lorauter.__version__,
        **identity,
        "plan": plan.to_json(),
        "begun": before["begun"] if before else time.time(),
    }
    tallies = {} if before is None else place.done(len(plan.shards))
    job = _Job(plan, place, config, manifest, tallies, progress, notify)
    job.note("running")
    if tallies:
        notify(f"{len(tallies)} of {len(plan.shards)} shards are done already")
    try:
        job.check_errors()  # nor does a job that was stopped by them end well when it is started again
        if len(tallies) < len(plan.shards):
            check_pins(catalog)
            with _ray(config, address, notify):
                job.run(catalog["version"])
    except BaseException:
        with suppress(LorauterError):  # the store may be what has failed
            job.note("stopped")
        raise
    job.note("complete")
    return job.status


class _Job:
    def __init__(
        self,
        plan: Plan,
        output: Output,
        config: BatchConfig,
        manifest: dict[str, Any],
        tallies: dict[int, Tally],
        progress: Callable[[Status], None],
        notify: Callable[[str], None],
    ) -> None:
        self._notify = notify
        self._plan, self._output, self._config, self._manifest = plan, output, config, manifest
        self._tallies, self._progress = tallies, progress
        tally = Tally.sum(tallies.values())
        self.status = Status(
            total=plan.rows,
            rows=tally.rows,
            errors=tally.errors,
            tokens=tally.completion_tokens,
            begun=tally.rows,
            begun_tokens=tally.completion_tokens,
            tally=tally,
        )

    def note(self, state: str) -> None:
        """Write the manifest with the counts so far."""
        counts = {"total": self._plan.rows, "shards": len(self._tallies), **self.status.tally.to_json()}
        self._manifest |= {"state": state, "updated": time.time(), "counts": counts}
        write_manifest(self._output.uri, self._manifest)

    def check_errors(self) -> None:
        """Raise BatchError where more rows have failed than may."""
        if self._config.max_errors is not None and self.status.errors > self._config.max_errors:
            raise BatchError(
                f"{self.status.errors} rows failed, and max_errors is {self._config.max_errors}; the shards in "
                f"{self._output.uri} say why; start the job again with a larger one to go on"
            )

    def run(self, version: str) -> None:
        """Do what is not done. Raises BatchError."""
        pending = [shard for shard in self._plan.shards if shard.number not in self._tallies]
        reports = Reports(uuid.uuid4().hex)
        dataset = shards_pipeline(self._plan, pending, self._config, version, self._output, reports)
        outcomes: _Outcomes = queue.Queue()
        # Ray Data's iterator waits for whole shards, but the rows' progress, and --max-errors, shall not.
        stopped = threading.Event()
        threading.Thread(target=_consume, args=(dataset, outcomes, stopped), name="consume", daemon=True).start()
        try:
            self._follow(outcomes, reports)
        finally:
            stopped.set()
            with suppress(RayError):  # the cluster may be what has failed
                reports.clear()
        if missing := len(self._plan.shards) - len(self._tallies):
            raise BatchError(f"{missing} shards were not done; start the job again")

    def _follow(self, outcomes: _Outcomes, reports: Reports) -> None:
        """Take what comes out of the pipeline until it ends, and show how far it is."""
        started = noted = written = time.time()
        job, limit_s = ray.get_runtime_context().get_job_id(), self._config.worker_wait_s
        room = Watch(lambda actor: actor.job == job, self._notify)
        while True:
            done = None
            with suppress(queue.Empty):
                done = outcomes.get(timeout=_POLL_S)
                if done is None:  # the end; else nothing has come yet
                    break
            if isinstance(done, BaseException):
                raise BatchError(f"the workers cannot go on: {_cause(done)}") from done
            if done is not None and done.shard not in self._tallies:
                self._take(done)
                written = done.time
            self._update(reports.running(self._tallies), started, time.time())
            if room.check() > (limit_s or math.inf):
                raise BatchError(f"gave up after {limit_s:g} s (worker_wait_s) of {room.line}")
            self.check_errors()
            if done is not None and time.time() - noted > _MANIFEST_S:
                noted = time.time()
                self.note("running")
        self._update([], started, written)

    def _take(self, done: Done) -> None:
        self._tallies[done.shard] = done.tally
        self.status.tally = Tally.sum([self.status.tally, done.tally])
        if done.facts:
            self.status.workers[f"{done.facts['node']} {done.facts['worker']}"] = done.facts

    def _update(self, running: list[tuple[int, int, int]], started: float, now: float) -> None:
        status, tally = self.status, self.status.tally
        rows, tokens, errors = (sum(column) for column in zip((0, 0, 0), *running, strict=True))
        status.rows, status.tokens = tally.rows + rows, tally.completion_tokens + tokens
        status.errors = tally.errors + errors
        began = min((facts["ready"] for facts in status.workers.values()), default=started)
        status.seconds = max(now - began, 0.0)
        self._progress(status)


def _consume(dataset: ray.data.Dataset, outcomes: _Outcomes, stopped: threading.Event) -> None:
    try:
        for row in dataset.iter_rows():
            if stopped.is_set():
                return
            outcomes.put(unpacked(row))
        outcomes.put(None)
    except BaseException as error:  # noqa: BLE001 (a thread's last word)
        outcomes.put(error)


@contextmanager
def _ray(config: BatchConfig, address: str | None, notify: Callable[[str], None]) -> Iterator[None]:
    """Ray, and nothing left of the job in it afterwards. Raises ConfigError: the pools do not fit the cluster."""
    pools = [config.route_workers, *([] if config.route_only else [config.answer_workers])]
    cpus = sum(pool.workers * pool.cpus for pool in pools)
    gpus = sum(pool.workers * (pool.gpus or 0) for pool in pools)
    mine = not ray.is_initialized()
    if mine:
        address = address or os.environ.get("RAY_ADDRESS") or LOCAL
        if address == LOCAL:
            resolve_encoder(config.encoder, notify)
            if not config.route_only:
                resolve_model(config.base_model, notify)
        notify("starting Ray" if address == LOCAL else f"connecting to Ray at {address}")
        # logical CPUs: as many as the pools ask for, were there fewer
        connect(address, num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)), object_store_memory=_OBJECT_STORE)
    spec = CacheSpec(config.adapters, config.cache)
    kept = {cache._actor_id for cache in running_caches(spec)}
    try:
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for name, needed in (("CPU", cpus), ("GPU", gpus)):
            if there.get(name, 0) < needed:
                raise ConfigError(
                    f"the pools need {needed:g} {name}s, and the cluster has {there.get(name, 0):g}; "
                    "ask for fewer workers, or for less for each",
                    setting="answer_workers",
                )
        for pool in pools:
            if (room := look()).never({"CPU": pool.cpus, "GPU": pool.gpus or 0}):
                raise ConfigError(
                    f"a worker needs {pool.cpus:g} CPUs and {pool.gpus or 0:g} GPUs of one node, and the largest has "
                    f"{room.most('CPU'):g} CPUs and {room.most('GPU'):g} GPUs; ask for less for each",
                    setting="answer_workers",
                )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield
    finally:
        for cache in running_caches(spec):
            if cache._actor_id not in kept:
                ray.kill(cache)
        if mine:
            ray.shutdown()


def _absolute(uri: str) -> str:
    if "://" in uri:
        return uri.rstrip("/")
    path = Path(uri).expanduser()  # of a file that is a link, which may lead to a blob, the name says what it is
    return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)


def _check_places(input: str, output: str) -> None:
    if f"{output}/".startswith(f"{input}/"):
        raise ConfigError(f"output {output} lies in the input {input}; choose a place outside it", setting="output")
    if format_of(output) is not None:
        raise ConfigError(
            f"output {output} is named like a file, but is a folder of parts; leave the ending out, and set the "
            "format with --format",
            setting="output",
        )


def _cause(error: BaseException) -> str:
    """What is behind Ray's wrapping, as far as it says something."""
    said = error
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None and isinstance(inner, BaseException):
        error = inner
        if str(error).strip():
            said = error
    return explained(said)
