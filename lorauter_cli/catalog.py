"""The commands `lorauter catalog ...`: build, change, list the versions, go back to one, delete old ones.

Parses arguments and shows progress; the work is `lorauter.catalog`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorauter.defaults import DEFAULT, check_changeable, resolve_tasks
from lorauter.errors import CatalogError, ConfigError
from lorauter_cli.console import App, counting, notify, phase, warn
from lorauter_cli.stores import (
    States,
    adapters_to_use,
    adapters_to_write,
    catalog_to_read,
    catalog_to_write,
    state_model,
)

if TYPE_CHECKING:
    from lorauter.adapters import AdapterRepository
    from lorauter.catalog import Catalog
    from lorauter.catalog.scores import ScoreTable
    from lorauter.tasks import Task

catalog_app = App(no_args_is_help=True, help="Task catalogs.")

_Encoder = Annotated[str, typer.Option(help="Sentence encoder: a folder, an id, a store's URI, or 'default'.")]
_Catalog = Annotated[str, typer.Argument(help="The catalog: a folder or a store's URI.")]
_Tasks = "A folder of task files (.json, .json.gz), or 'default'."


class _By(StrEnum):
    metric = "metric"
    likelihood = "likelihood"


@catalog_app.command("build")
def build(
    tasks: Annotated[Path, typer.Option(help=_Tasks)],
    out: Annotated[str, typer.Option(help="Where to publish: a folder or a store's URI.")],
    adapters: Annotated[str | None, typer.Option(help="Their store, or 'default'; none routes to tasks alone.")] = None,
    mapping: Annotated[
        Path | None, typer.Option(help='A JSON file {"task": ["adapter", ...]}, the best adapter first.')
    ] = None,
    encoder: _Encoder = DEFAULT,
    states: States = DEFAULT,
    match: Annotated[bool, typer.Option("--match", help="Try the adapters on the tasks, and take the best.")] = False,
    by: Annotated[
        _By, typer.Option(help="What is tried: the task's metric on an answer, or the target's likelihood (faster).")
    ] = _By.metric,
    scores: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines that keep the scores, and beside them (.examples) the answers of --examples; a run that "
            "was cut off goes on from them."
        ),
    ] = None,
    compose: Annotated[
        bool,
        typer.Option(
            "--compose", help="Compose adapters for tasks that have none or a poor one, and push them to the store."
        ),
    ] = False,
    examples: Annotated[
        int | None,
        typer.Option(
            help="Find out which tasks are answered better after so many of their examples, which are shown then.",
            min=1,
            max=16,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="The base model to try on: a folder, an id, a store's URI, or 'default'.")
    ] = (DEFAULT),
) -> None:
    """Build a catalog and publish it as the current version.

    An adapter serves the task of its own name, or those that --mapping gives it. With --match every adapter meets a
    few examples of every task, and the best of them more and more (successive halving); those of a task's name or
    mapping meet all of its examples. Of more than 64 adapters those that compute the same are tried once, and the
    targets' likelihood says first which dozen a task is tried with. With --compose tasks without an adapter of their
    own, whose best one scores under a half, or whose composition is stale, get one that is composed from the others,
    where it beats their mixture. With --examples each task's examples are asked after the nearest of the others, by
    the mixture and by the base model alone, and what that gains is in the catalog.
    """
    from lorauter.adapters import open_store
    from lorauter.catalog import build_catalog, publish
    from lorauter.catalog.catalog import pointed_version
    from lorauter.defaults import load_encoder
    from lorauter.tasks import read_tasks

    if match and adapters is None:
        raise ConfigError("--match needs adapters to try; name their store with --adapters", setting="adapters")
    if scores is not None and not match and examples is None:
        raise ConfigError("--scores is of use only with --match or --examples", setting="scores")
    if scores is not None and not scores.absolute().parent.is_dir():
        raise ConfigError(f"the folder of {scores} is not there", setting="scores")
    if compose and adapters is None:
        raise ConfigError("--compose needs adapters to compose from; name their store with --adapters")
    target = adapters_to_write(adapters) if compose and adapters else None
    out = catalog_to_write(out)
    over = pointed_version(open_store(out))  # who publishes another one in its place meanwhile is not overwritten
    found = read_tasks(resolve_tasks(tasks))
    assigned = _read_mapping(mapping) if mapping else None
    with phase("loading the encoder"):
        embedder = load_encoder(encoder)
    reader = state_model(states)
    what = f"{'reading the adapters, and ' if adapters else ''}embedding the examples of {len(found)} tasks"
    with counting(what, "are done") as progress:
        repository = adapters_to_use(adapters) if adapters else None
        catalog = build_catalog(
            found,
            embedder,
            states=reader,
            repository=repository,
            mapping=assigned,
            report=warn,
            progress=progress,
        )
    if match and repository is not None:
        catalog = _matched(catalog, found, repository, by, model, scores)
    if target is not None:
        catalog = _composed(catalog, target, model)
    if examples is not None:
        from lorauter_cli.examples import asked_after_examples

        catalog = asked_after_examples(catalog, target or repository, model, examples, scores)
    _tell_stale(catalog)
    with phase("publishing the catalog"):
        version = publish(catalog, out, over=over)
    typer.echo(f"{version}\t{_summary(catalog)}")


@catalog_app.command("change")
def change(
    catalog: _Catalog,
    add_tasks: Annotated[
        Path | None, typer.Option(help="A folder of task files; those of known names replace what is there.")
    ] = None,
    remove_task: Annotated[list[str] | None, typer.Option(help="A task's name; may be given again.")] = None,
    refresh_adapters: Annotated[
        str | None, typer.Option(help="The adapter store, whose adapters and versions are taken anew.")
    ] = None,
    remove_adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter's name; may be given again. It is gone until a refresh.")
    ] = None,
    encoder: _Encoder = DEFAULT,
    states: States = DEFAULT,
) -> None:
    """Change the current version, in the order of the options, and publish what comes of it as a new one."""
    from lorauter.catalog import change_catalog, with_adapters, with_tasks, without_adapters, without_tasks
    from lorauter.defaults import load_encoder
    from lorauter.encoder import RememberingEncoder
    from lorauter.states import RememberingStates
    from lorauter.tasks import read_tasks

    if not (add_tasks or remove_task or refresh_adapters or remove_adapter):
        raise ConfigError("nothing to change; give --add-tasks, --remove-task, --refresh-adapters or --remove-adapter")
    catalog = catalog_to_write(catalog)
    added = read_tasks(resolve_tasks(add_tasks)) if add_tasks else []
    if added:
        with phase("loading the encoder"):
            embedder = RememberingEncoder(load_encoder(encoder))
    renewed: list[str] = []
    told: list[str] = []
    readers: list[RememberingStates] = []  # of the catalog's states, once it is known that it has some

    def reader(before: Catalog) -> RememberingStates | None:
        if not readers and (model := state_model(states, before)) is not None:
            readers.append(RememberingStates(model))
        return readers[0] if readers else None

    def edit(before: Catalog) -> Catalog:
        changed = before
        told.clear()
        if added:
            changed = with_tasks(changed, added, embedder, states=reader(changed), progress=progress)
        if remove_task:
            changed = without_tasks(changed, remove_task)
        if refresh_adapters:
            pool = adapters_to_use(refresh_adapters)
            changed = with_adapters(changed, pool, report=told.append, progress=progress)
            scored = {name for entry in changed.tasks for name in entry.scores} & before.adapters.keys()
            renewed[:] = sorted(name for name in scored if changed.adapters[name] != before.adapters[name])
        return without_adapters(changed, remove_adapter) if remove_adapter else changed

    with counting("changing the catalog", "are done") as progress:
        tasks = [*(task.name for task in added), *(remove_task or [])]
        changed = change_catalog(catalog, edit, tasks=tasks, adapters=remove_adapter or [])
    for line in told:
        warn(line)
    _tell_stale(changed)
    for name in renewed:
        notify(f"adapter {name!r} has another version, and keeps the scores of the one before")
    typer.echo(f"{changed.version}\t{_summary(changed)}")


@catalog_app.command("versions")
def versions(catalog: _Catalog) -> None:
    """List the versions in a store, and check each; the current one is marked."""
    from lorauter.catalog import Catalog, catalog_versions, current_version

    catalog = catalog_to_read(catalog)
    current = current_version(catalog)
    names = catalog_versions(catalog)
    for name in names:
        try:
            what = _summary(Catalog.load(catalog, version=name))
        except CatalogError as error:
            what = " ".join(str(error).split())
        typer.echo(f"{name}\t{'current' if name == current else '-'}\t{what}")
    notify(f"{len(names)} versions in {catalog}")


@catalog_app.command("use")
def use(catalog: _Catalog, version: Annotated[str, typer.Argument(help="One that 'versions' lists.")]) -> None:
    """Verify a version and make it the current one, which may be a step back."""
    from lorauter.catalog import use_version

    typer.echo(f"{version}\t{_summary(use_version(catalog_to_write(catalog), version))}")


@catalog_app.command("prune")
def prune(
    catalog: _Catalog,
    keep: Annotated[int, typer.Option(help="Versions beside the current one that stay, the newest.", min=0)] = 10,
    older_than: Annotated[float, typer.Option(help="Hours since a version was written, at least.", min=0)] = 24,
) -> None:
    """Delete old versions of a catalog; one that a batch job uses is to stay until the job has ended."""
    from lorauter.catalog import prune_versions

    check_changeable(catalog, "catalog")
    with phase("looking for old versions"):
        pruned = prune_versions(catalog_to_read(catalog), keep=keep, older_than_s=older_than * 3600)
    for version in pruned:
        typer.echo(version)
    notify(f"{len(pruned)} versions deleted from {catalog}")


def _composed(catalog: Catalog, repository: AdapterRepository, model: str) -> Catalog:
    """The catalog with what is composed for the tasks that want it, which is in the store then."""
    from lorauter.catalog import with_adapter
    from lorauter.compositions.pool import wanting
    from lorauter_cli.compose import composed

    tasks = wanting(catalog)
    if not tasks:
        notify("every task has a good adapter of its own: nothing is composed")
        return catalog
    held = [made for made in composed(catalog, tasks, repository, model=model) if made.holds]
    pushed = [repository.push(made.folder, report=warn) for made in held]
    return with_adapter(catalog, *pushed) if pushed else catalog


def _tell_stale(catalog: Catalog) -> None:
    for name, sources in catalog.stale.items():
        what = ", ".join(sources[:5]) + (f" and {len(sources) - 5} more" if len(sources) > 5 else "")
        warn(f"adapter {name!r} is stale: {what} changed since it was composed of them; compose it anew")


def _summary(catalog: Catalog) -> str:
    served = sum(bool(entry.adapters) for entry in catalog.entries)
    return f"{len(catalog)} tasks, {len(catalog.adapters)} adapters, {served} tasks with an adapter"


def _matched(
    catalog: Catalog, tasks: Sequence[Task], repository: AdapterRepository, by: _By, model: str, file: Path | None
) -> Catalog:
    """The catalog with the adapters that matching finds; those that cannot be used are out of it."""
    from lorauter.catalog import scoring, with_copies, with_scores, without_adapters
    from lorauter.catalog.match import MatchConfig, match_adapters
    from lorauter.catalog.scores import ScoreTable
    from lorauter.catalog.screen import LARGE, screen
    from lorauter.evaluation.answering import adapters_in

    table = ScoreTable(file)
    with_scores(catalog, _worth(table, by))  # scores of other tasks are refused before, not after, hours of work
    # What was composed of a task's examples is told nothing by its answers to them.
    adapters = {name: version for name, version in catalog.adapters.items() if name not in catalog.composed}
    if not adapters:
        raise ConfigError(f"there is no adapter to try in {repository.store.uri}", setting="adapters")
    favoured = {e.name: [a.name for a in e.adapters if a.name in adapters] for e in catalog.entries}
    load = adapters_in(repository, adapters)
    failures: dict[str, str] = {}
    shortlists: Mapping[str, Sequence[str]] | None = None
    copies: Mapping[str, str] = {}
    spent = 0
    if len(adapters) > LARGE:
        likelihoods = table
        if by is not _By.likelihood:
            likelihoods = ScoreTable(file and file.with_suffix(f".likelihood{file.suffix}"))
        _bind(likelihoods, _By.likelihood, tasks, catalog, model)
        with ExitStack() as stack:
            with phase("loading the base model"):
                seeing = scoring.open_likelihood_scorer(model, load, tasks)
            what = f"screening {len(adapters)} adapters for {len(tasks)} tasks by likelihood"
            progress = stack.enter_context(counting(what, "evaluations are made, up to the end of this round"))
            screened = screen(
                tasks,
                adapters,
                seeing,
                likelihoods,
                favoured=favoured,
                progress=lambda done, left: progress(done, done + left),
                chunk_size=scoring.chunk_size("likelihood"),
            )
        del seeing  # the device is the engine's
        failures |= screened.matching.failures
        shortlists, spent = screened.shortlists, screened.matching.spent
        if copies := screened.twins:
            some = ", ".join(f"{name} ({other})" for name, other in [*copies.items()][:3])
            more = f" and {len(copies) - 3} more" if len(copies) > 3 else ""
            warn(f"not tried, as they compute the same as another, which is: {some}{more}")
    if shortlists is None or by is not _By.likelihood:
        _bind(table, by, tasks, catalog, model)
        tried = {name: version for name, version in adapters.items() if name not in failures}
        with ExitStack() as stack:
            with phase("loading the base model"):
                scorer = stack.enter_context(scoring.open_scorer(by.value, model, load, tasks))
            what = f"trying {'the' if shortlists else len(tried)} adapters on {len(tasks)} tasks"
            progress = stack.enter_context(counting(what, "evaluations are made, up to the end of this round"))
            config = MatchConfig(
                candidates={task: [n for n in names if n in tried] for task, names in favoured.items()},
            )
            if shortlists is not None:  # all of which are worth all examples
                config = replace(config, min_candidates=max(1, *map(len, shortlists.values())))
            matching = match_adapters(
                tasks,
                tried,
                scorer,
                config,
                table,
                lambda done, left: progress(done, done + left),
                among=shortlists,
                chunk_size=scoring.chunk_size(by.value),
            )
        failures |= matching.failures
        spent += matching.spent
    for name, reason in failures.items():
        warn(f"left out: {name}: {reason}")
    exhaustive = len(adapters) * sum(len(task.validation) for task in tasks)
    notify(f"{spent} evaluations, {spent / exhaustive:.1%} of the {exhaustive} of every adapter on every example")
    if len(failures) == len(adapters):
        raise ConfigError(f"no adapter can be used on the base model {model!r}; is it theirs?", setting="model")
    worth = _worth(table, by)
    if shortlists is not None:  # who met an example or two may have been lucky
        worth = {task: {name: of[name] for name in of if name in shortlists[task]} for task, of in worth.items()}
    return without_adapters(with_copies(catalog, copies, worth), failures)


def _bind(table: ScoreTable, by: _By, tasks: Sequence[Task], catalog: Catalog, model: str) -> None:
    """Say what a table's scores are of, where they are kept. Raises CatalogError: they are of something else."""
    from lorauter.catalog import provenance

    if table.kept:
        with phase("reading the base model's files"):
            digest = provenance.model_digest(model)
        table.bind(provenance.Provenance(digest, by.value, provenance.task_digests(tasks), catalog.adapters))


def _worth(table: ScoreTable, by: _By) -> dict[str, dict[str, dict[int, float]]]:
    """Scores as the catalog takes them, from 0 to 1: of a log-likelihood the likelihood."""
    for (adapter, task), scores in table.scores.items():
        if any(score > 0 if by is _By.likelihood else not 0 <= score <= 1 for score in scores.values()):
            raise ConfigError(f"adapter {adapter!r} has scores on task {task!r} that are not by {by}", setting="scores")
    return table.by_task(math.exp if by is _By.likelihood else float)


def _read_mapping(path: Path) -> dict[str, list[str]]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"mapping {path} cannot be read: {error}", setting="mapping") from error
    mapping = {}
    for task, names in data.items() if isinstance(data, dict) else [("", None)]:
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f'mapping {path} must be a JSON object {{"task": ["adapter", ...]}}', setting="mapping")
        mapping[task] = names
    return mapping
