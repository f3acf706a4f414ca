"""The Ray Data pipeline: read, route and order; answer and write. Streams: what is on its way is bounded, however long.

`answer_dataset` is for a data set in hand; `shards_pipeline` is what a job runs. Both have the same stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, Dataset
from ray.data._internal.execution.interfaces import TaskContext

from deployments.batch.config import BatchConfig
from deployments.batch.formats import arrow_rows
from deployments.batch.output import Output
from deployments.batch.pins import pin
from deployments.batch.plan import Plan, Shard
from deployments.batch.reports import Reports
from deployments.batch.rows import SourceRow, Work, check_clash, kept_names, result_schema
from deployments.batch.stages import AnswerStage, Files, RouteStage, pack, unpack
from deployments.devices import engine_gpus
from lorauter.defaults import resolve_adapters, resolve_catalog

_TASK_CPUS = 0.25  # of taking a data set apart, or putting it together: there is always room beside the pools
_ONE: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
_TASK_ROWS = 1 << 32  # of one task at most, or rows of two would have the same numbers
_NEXT = "lorauter_next_row"  # key of a Ray Data task's own values
_SOURCE = "source"  # key of a data set's own columns in a piece of work


def answer_dataset(dataset: Dataset, config: BatchConfig | None = None) -> Dataset:
    """Route and answer a data set's rows, lazily, as `lorauter batch` does those of files.

    Args:
        dataset: its columns are named by `config.columns`; those with the names of columns that are added are kept by
            others, or refused: `config.column_clash`.
        config: the job's; `shard_rows` of the data set's rows are ordered and answered together, those of one block.
            `format` and `max_errors` are not used. A row's seed comes from its place among the data set's blocks, so
            that equal rows get answers of their own; Ray Data's `preserve_order` makes these places certain.

    Returns:
        The rows with the columns of `rows.result_schema`, in no certain order of batches.

    Raises:
        ConfigError: there is no catalog.
    """
    config = resolved(config or BatchConfig())
    version = pin(config)["version"]
    added = result_schema(route_only=config.route_only)
    work = dataset.map_batches(
        _gather,  # type: ignore[arg-type]
        fn_kwargs={"config": config, "added": added},
        batch_size=config.shard_rows,
        batch_format="pyarrow",
        num_cpus=_TASK_CPUS,
    )
    answered = _stages(work, config, version)
    return answered.map_batches(
        _scatter,  # type: ignore[arg-type]
        fn_kwargs={"added": added},
        num_cpus=_TASK_CPUS,
        **_ONE,
    )


def shards_pipeline(
    plan: Plan, shards: Sequence[Shard], config: BatchConfig, version: str, output: Output, reports: Reports
) -> Dataset:
    """The pipeline that does shards; its rows hold a `stages.Done` for each."""
    files = Files(replace(plan, files=(), shards=()), output)  # what reading needs, and not all shards in each worker
    rows = [row for shard in shards for row in pack(shard).to_pylist()]
    # Unlike `from_arrow` it runs no task, which would wait, without a word, for a CPU beside the pools.
    return _stages(ray.data.from_items(rows, override_num_blocks=len(rows)), config, version, files, reports)


def resolved(config: BatchConfig) -> BatchConfig:
    """The same as workers anywhere take it: folders absolute, the default catalog built. Raises ConfigError."""
    config = config.with_absolute_paths(Path.cwd())
    return config.model_copy(
        update={"adapters": resolve_adapters(config.adapters), "catalog": resolve_catalog(config.catalog)}
    )


def _stages(
    work: Dataset, config: BatchConfig, version: str, files: Files | None = None, reports: Reports | None = None
) -> Dataset:
    routing = config.route_workers
    routed = work.map_batches(
        RouteStage,
        fn_constructor_args=(config, version, files),
        compute=ActorPoolStrategy(size=routing.workers, max_tasks_in_flight_per_actor=2),
        num_cpus=routing.cpus,
        num_gpus=routing.gpus or None,
        **_ONE,
    )
    if config.route_only:
        return routed
    answering = config.answer_workers
    gpus = engine_gpus(
        config.engine.device, answering.gpus, engines=answering.workers, setting="answer_workers.gpus (--gpus)"
    )
    return routed.map_batches(
        AnswerStage,
        fn_constructor_args=(config, files, reports),
        # Two shards a worker: while one is answered, the other is made ready.
        compute=ActorPoolStrategy(
            size=answering.workers,
            max_tasks_in_flight_per_actor=2,
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        num_cpus=answering.cpus,
        num_gpus=gpus or None,
        **_ONE,
    )


def _gather(batch: pa.Table, config: BatchConfig, added: pa.Schema) -> pa.Table:
    """A batch of a data set as a piece of work. Raises ConfigError: its columns clash with those that are added."""
    check_clash(kept_names(batch.column_names, added.names), config)
    found = zip(_numbers(batch.num_rows), arrow_rows(batch), strict=True)
    rows = [SourceRow(number, values, fault) for number, (values, fault) in found]
    return pack(Work(0, rows, facts={_SOURCE: batch}))


def _numbers(rows: int) -> range:
    """Numbers of a task's next rows, which no others of the data set have; a task that is done again gives the same.

    Ray Data's `monotonically_increasing_id` does this too, but only where all blocks have the same columns.
    """
    task = TaskContext.get_current()
    assert task is not None
    first = task.kwargs.get(_NEXT, task.task_idx * _TASK_ROWS)
    task.kwargs[_NEXT] = first + rows
    return range(first, first + rows)


def _scatter(batch: pa.Table, added: pa.Schema) -> pa.Table:
    """An answered piece of work as rows of the data set."""
    work = unpack(batch)
    table = work.facts[_SOURCE]
    renamed = kept_names(table.column_names, added.names)
    table = table.rename_columns([renamed.get(name, name) for name in table.column_names])
    for field in added:
        table = table.append_column(field, pa.array([row[field.name] for row in work.results], field.type))
    return table
