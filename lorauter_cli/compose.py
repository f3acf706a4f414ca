"""The command `lorauter adapters compose`: parses arguments and shows progress.

The work is `lorauter.compositions`'s.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorauter.defaults import DEFAULT, home, resolve_tasks
from lorauter_cli.console import counting, notify, phase, warn
from lorauter_cli.stores import adapters_to_use, adapters_to_write

if TYPE_CHECKING:
    from lorauter.adapters import AdapterRepository
    from lorauter.catalog import Catalog
    from lorauter.compositions.make import Made


def compose(
    tasks: Annotated[Path, typer.Option(help="A folder of task files (.json, .json.gz), or 'default'.")],
    adapters: Annotated[str, typer.Option(help="The pool: a folder, a store's URI, or 'default'.")],
    to: Annotated[str, typer.Option(help="The store that compositions are pushed to: a folder or a store's URI.")],
    task: Annotated[
        list[str] | None, typer.Option(help="A task to compose for; may be given again. All, if none is given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the parts that the examples are left out in.")] = 0,
    model: Annotated[str, typer.Option(help="Base model: a folder, an id, a store's URI, or 'default'.")] = DEFAULT,
    encoder: Annotated[
        str, typer.Option(help="Sentence encoder: a folder, an id, a store's URI, or 'default'.")
    ] = DEFAULT,
    device: Annotated[str, typer.Option(help="'auto' is the GPU if there is one, else the CPU.")] = "auto",
) -> None:
    """Compose an adapter for each task from a pool, and push those that beat the router's own mixtures.

    Fits a weight for each adapter, layer and target to the task's validation examples, and looks at each example under
    weights that have not seen it. What is finished is not fitted again.
    """
    from lorauter.catalog import build_catalog
    from lorauter.defaults import load_encoder
    from lorauter.tasks import read_tasks

    target = adapters_to_write(to)
    repository = adapters_to_use(adapters)
    found = read_tasks(resolve_tasks(tasks))
    with phase("loading the encoder"):
        embedder = load_encoder(encoder)
    with phase(f"embedding the examples of {len(found)} tasks"):
        catalog = build_catalog(found, embedder, repository=repository, report=warn)
    chosen = task or list(catalog.names)
    for made in composed(catalog, chosen, repository, model=model, device=device, seed=seed):
        if made.holds:
            manifest = target.push(made.folder, report=warn)
            typer.echo(f"{manifest.name}\t{manifest.version}\t{manifest.size} bytes")


def composed(
    catalog: Catalog,
    tasks: Collection[str],
    repository: AdapterRepository,
    *,
    model: str,
    device: str = "auto",
    seed: int = 0,
) -> list[Made]:
    """The compositions of tasks from a catalog's adapters, and a word on each."""
    from lorauter.compositions.config import ComposeConfig
    from lorauter.compositions.pool import compose_for
    from lorauter.evaluation.answering import adapters_in

    with counting(f"composing for {len(tasks)} tasks", "steps are made") as progress:
        found = compose_for(
            catalog,
            tasks,
            adapters_in(repository, catalog.adapters),
            home() / "compositions",
            model=model,
            device=device,
            config=ComposeConfig(seed=seed),
            progress=lambda done, total, _: progress(done, total),
            report=warn,
        )
    for made in found:
        of = made.provenance
        what = f"{of.task}: log-likelihood of left-out examples {of.score_before:.3f} -> {of.score_after:.3f}"
        how = f"{of.gain:+.3f} +- {of.error:.3f}; rank {of.rank} keeps {of.energy:.1%}"
        notify(f"{what} ({how}){'' if made.holds else ': not better than the mixture, and left out'}")
    notify(f"{sum(made.holds for made in found)} of {len(found)} compositions beat the router's mixtures")
    return found
