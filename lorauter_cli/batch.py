"""`lorauter batch`. Parses arguments and shows progress; the work is `deployments.batch`'s, loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorauter_cli.console import console, notify, phase
from lorauter_cli.service import make_importable


def batch(
    input: Annotated[
        str, typer.Option(help="A .jsonl, .csv or .parquet file (text also .gz), or a folder of such; local or s3://.")
    ],
    output: Annotated[str, typer.Option(help="A folder for the parts, or s3://bucket/prefix.")],
    catalog: Annotated[str | None, typer.Option(help="The catalog: a folder, a store's URI, or 'default'.")] = None,
    column: Annotated[str | None, typer.Option(help="The column of the prompts.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with any of the job's settings.")] = None,
    adapters: Annotated[
        str | None, typer.Option(help="The adapter store: a folder, a store's URI, or 'default'.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Of the output: jsonl, csv, parquet or openai; else the input's.")
    ] = None,
    route_only: Annotated[bool, typer.Option("--route-only", help="Decide, and generate nothing.")] = False,
    max_errors: Annotated[int | None, typer.Option(min=0, help="Stop once more rows than this have failed.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Engines that answer at the same time.")] = None,
    gpus: Annotated[float | None, typer.Option(min=0, help="GPUs that each of them takes.")] = None,
    worker_wait: Annotated[
        float | None, typer.Option(min=0, help="Seconds to wait for room in the cluster; else as long as it takes.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster; none starts a local one.")] = None,
) -> None:
    """Route and answer every row of a data set; a job that was cut off goes on where it stopped.

    What is given here goes before what the configuration says.
    """
    make_importable()
    with phase("loading Ray"):
        from deployments.batch.config import BatchConfig
        from deployments.batch.job import Status, run_job
        from deployments.batch.progress import bar, described, summary

    changes: dict[str, Any] = {
        "catalog": catalog,
        "adapters": adapters,
        "format": format,
        "max_errors": max_errors,
        "route_only": route_only or None,
        "worker_wait_s": worker_wait,
    }
    settings = BatchConfig() if config is None else BatchConfig.read(config)
    if column is not None:
        changes["columns"] = {**settings.columns.model_dump(), "prompt": column}
    pool = {key: value for key, value in {"workers": workers, "gpus": gpus}.items() if value is not None}
    if pool:
        changes["answer_workers"] = {**settings.answer_workers.model_dump(), **pool}
    settings = settings.changed(**changes)
    with bar(console) as show:

        def progress(status: Status) -> None:
            begun = status.begun
            new = status.tokens - status.begun_tokens
            words = described(status.rows, status.total, status.errors, new, status.seconds, begun=begun)
            show(status.rows, status.total, words)

        status = run_job(input, output, settings, address=address, notify=notify, progress=progress)
    for table in summary(status.tally):
        console.print(table)
    tally = status.tally
    notify(
        f"{tally.rows:,} rows are in {output}: {tally.errors:,} errors, {tally.prompt_tokens:,} prompt tokens, "
        f"{tally.completion_tokens:,} new tokens, {status.adapter_loads} adapter loads in {len(status.workers)} workers"
    )
