"""The pools' workers, as Ray Data calls them: each takes pieces of work whole, and hands them on.

A piece travels as one row with one binary column, so that Ray Data neither splits it nor looks into it: rows of a
data set need not have the same columns or types. Of a job's files the first stage reads its shard, and the last one
writes it: a process of Ray's own for either would cost more than reading and writing do. Knows how to read, route,
answer and write only by those who do.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from deployments.adapter_cache import CacheSpec, NodeCache
from deployments.batch.answering import Answering
from deployments.batch.config import BatchConfig
from deployments.batch.output import Output
from deployments.batch.plan import Plan, Shard, ShardReader
from deployments.batch.reports import Reports, reporting
from deployments.batch.routing import route_rows
from deployments.batch.rows import Work, decision_columns, order_by_adapters
from deployments.batch.tally import Tally
from deployments.devices import own_gpus_only
from deployments.engines import Reading, start_engine
from deployments.host_adapters import HostAdapters
from lorauter.catalog import Catalog
from lorauter.defaults import load_encoder, load_states
from lorauter.routing import Router

_COLUMN = "work"


@dataclass(frozen=True)
class Done:
    """A shard that is written: its number, counts, what its workers say of themselves, and when."""

    shard: int
    tally: Tally
    facts: dict[str, Any]
    time: float


@dataclass(frozen=True)
class Files:
    """A job's files: the input's plan, whose shards the first stage is given one by one, and the output."""

    plan: Plan
    output: Output

    def write(self, work: Work) -> Done:
        """Write a shard. Raises StoreError."""
        return Done(work.shard, self.output.write(work), work.facts, time.time())


def pack(piece: Shard | Work | Done) -> pa.Table:
    """A piece of work as Ray Data carries it."""
    return pa.table({_COLUMN: pa.array([pickle.dumps(piece)], pa.large_binary())})


def unpack(table: pa.Table) -> Any:
    """The piece of work in a batch of one row."""
    [row] = table.to_pylist()
    return unpacked(row)


def unpacked(row: Mapping[str, Any]) -> Any:
    """The piece of work in a row."""
    return pickle.loads(row[_COLUMN])  # noqa: S301 (from `pack`, in another of the job's own processes)


class RouteStage:
    """A worker of the routing pool.

    Args:
        config: the job's.
        catalog_version: the version that the whole job uses.
        files: those of a job, where it is given shards; without any, pieces of work.
    """

    def __init__(self, config: BatchConfig, catalog_version: str, files: Files | None = None) -> None:
        import torch

        own_gpus_only()
        # Alone, one thread gets most rows out of a core, and the engine wants the others.
        torch.set_num_threads(1)
        self._config, self._files = config, files
        self._reader = None if files is None else ShardReader(files.plan)
        catalog = Catalog.load(config.catalog, version=catalog_version)
        states = None
        if catalog.states is not None and config.state_model is not None:
            states = load_states(config.state_model, threads=1)
        self._router = Router(catalog, load_encoder(config.encoder), config.routing, states=states)

    def __call__(self, batch: pa.Table) -> pa.Table:
        work = unpack(batch)
        if self._reader is not None:
            work = Work(work.number, self._reader.read(work))
        work.decisions = route_rows(self._router, work.rows, self._config)
        work.order = order_by_adapters(work.decisions)
        if not self._config.route_only:
            return pack(work)
        work.results = [decision_columns(decision) for decision in work.decisions]
        return _ended(work, self._files)


class AnswerStage:
    """A worker of the answering pool: an engine, and its tiers of adapters. Called by two threads.

    Args:
        config: the job's.
        files: where it writes what it has answered; without any, that is handed on.
        reports: where it says how a shard is getting on.
    """

    def __init__(self, config: BatchConfig, files: Files | None = None, reports: Reports | None = None) -> None:
        own_gpus_only()
        cache = NodeCache(CacheSpec(config.adapters, config.cache))  # its process starts while the engine loads
        # The next row comes as one ends.
        fed = replace(config.engine, max_queue=config.engine.rows, max_slowdown=None)
        engine = start_engine(config.base_model, config.base_model_aliases, fed)
        self._answering = Answering(
            engine,
            HostAdapters(cache, Reading(engine), budget_bytes=config.host.adapter_bytes),
            config,
        )
        self._engine = engine
        self._files, self._reports = files, reports
        self._ready = time.time()

    def __call__(self, batch: pa.Table) -> pa.Table:
        work = unpack(batch)
        with reporting(work.shard, self._reports) as ended:
            self._answering.answer(work, ended)
        work.facts |= {
            "worker": os.getpid(),
            "node": os.uname().nodename,
            "ready": self._ready,
            "loads": self._answering.loads,
            "slot_loads": self._engine.counters.adapters.misses,
        }
        return _ended(work, self._files)


def _ended(work: Work, files: Files | None) -> pa.Table:
    """What the last stage hands on: the work, or that it is written."""
    return pack(work if files is None else files.write(work))
