"""Has a catalog's examples asked after others of their tasks: shows progress; the work is `lorauter.evaluation`'s."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lorauter.errors import AdapterNotFound
from lorauter_cli.console import counting, notify, phase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorauter.adapters import AdapterRepository, LoraWeights
    from lorauter.catalog import Catalog
    from lorauter.engine import MultiLoraEngine
    from lorauter.evaluation.composing import ComposedFor


def asked_after_examples(
    catalog: Catalog, repository: AdapterRepository | None, model: str, count: int, scores: Path | None
) -> Catalog:
    """The catalog with what so many examples do before each task's queries.

    Args:
        repository: the catalog's adapters; None where it has none.
        model: the base model: a folder, an id, or "default".
        scores: the file beside which answers are kept, for a run that goes on from them.

    Raises:
        ConfigError, InvalidRequest: the model cannot be loaded, or has no chat template.
        AdapterError, StoreError: an adapter cannot be read, or used.
    """
    from lorauter.catalog import with_shown
    from lorauter.catalog.provenance import model_digest
    from lorauter.evaluation.answering import adapters_in, answer
    from lorauter.evaluation.left_out import helped, trials
    from lorauter.evaluation.rows import read_answers

    def nothing(name: str) -> LoraWeights:
        raise AdapterNotFound("there is no adapter store", adapter=name)

    load = nothing if repository is None else adapters_in(repository, catalog.adapters)
    with ExitStack() as stack:
        if scores is None:
            kept = Path(stack.enter_context(TemporaryDirectory(prefix="lorauter-"))) / "answers.jsonl"
        else:
            kept = scores.with_name(f"{scores.name}.examples")
        engine = stack.enter_context(closing(loaded_engine(model)))
        asked = trials(catalog, count, engine.codec, model=model_digest(model))
        rows = {trial.row.id: trial.row for trial in asked}
        with counting("asking each example after others of its task", "answers are made") as progress:
            answer(rows.values(), engine, load, kept, progress=progress)
        found = helped(catalog, count, engine.codec, asked, read_answers(kept))
    help = sum(any(of.by for of in (shown.own, shown.others) if of is not None) for shown in found.values())
    notify(f"examples help {help} of {len(catalog)} tasks, or would without the adapters that were made for them")
    return with_shown(catalog, found)


def asked_in_regimes(
    catalog: Catalog,
    repository: AdapterRepository,
    count: int,
    out: Path,
    *,
    composed: Sequence[ComposedFor],
    model: str,
    device: str,
    max_batch: int | None,
) -> None:
    """Write into a folder which tasks so many examples help in each regime that has the task, with its compositions.

    Raises:
        As `asked_after_examples`.
    """
    from lorauter.catalog.provenance import model_digest
    from lorauter.evaluation.answering import adapters_in
    from lorauter.evaluation.composing import composed_or
    from lorauter.evaluation.helped import read_helped
    from lorauter.evaluation.left_out import ask_regimes

    own = {name: [name] if name in catalog.adapters else [] for name in catalog.names}
    load = composed_or(composed, adapters_in(repository, catalog.adapters))
    with (
        closing(loaded_engine(model, device, max_batch)) as engine,
        counting("asking each example after others of its task", "answers are made") as progress,
    ):
        ask_regimes(
            catalog, count, engine, load, out, own=own, model=model_digest(model), composed=composed, progress=progress
        )
    for regime, of in read_helped(out).items():
        help = sum((one.own or one.others).by is not None for one in of.values())
        notify(f"{regime}: examples help {help} of {len(of)} tasks")


def loaded_engine(model: str, device: str = "auto", max_batch: int | None = None) -> MultiLoraEngine:
    """An engine for a command. Raises ConfigError: the model cannot be loaded."""
    from lorauter.defaults import base_model_aliases, resolve_model
    from lorauter.engine import EngineConfig, load_engine

    config = EngineConfig(device=device) if max_batch is None else EngineConfig(device=device, max_batch=max_batch)
    with phase("loading the base model"):
        return load_engine(resolve_model(model, notify), config, aliases=base_model_aliases(model))
