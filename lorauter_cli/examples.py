"""Has a catalog's examples asked after others of their tasks: shows progress; the work is `lorauter.evaluation`'s."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lorauter.errors import AdapterNotFound
from lorauter_cli.console import counting, notify, phase

if TYPE_CHECKING:
    from lorauter.adapters import AdapterRepository, LoraWeights
    from lorauter.catalog import Catalog


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
    from lorauter.defaults import base_model_aliases, resolve_model
    from lorauter.engine import load_engine
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
        with phase("loading the base model"):
            digest = model_digest(model)
            engine = stack.enter_context(closing(load_engine(resolve_model(model), aliases=base_model_aliases(model))))
        asked = trials(catalog, count, engine.codec, model=digest)
        rows = {trial.row.id: trial.row for trial in asked}
        with counting("asking each example after others of its task", "answers are made") as progress:
            answer(rows.values(), engine, load, kept, progress=progress)
        found = helped(catalog, count, engine.codec, asked, read_answers(kept))
    help = sum(any(of.by for of in (shown.own, shown.others) if of is not None) for shown in found.values())
    notify(f"examples help {help} of {len(catalog)} tasks, or would without the adapters that were made for them")
    return with_shown(catalog, found)
