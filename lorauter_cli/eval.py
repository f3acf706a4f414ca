"""The commands `lorauter eval ...`: decide, answer, report; how well tasks are told apart; plots of a catalog.

Parses arguments and shows progress; the work is `lorauter.evaluation`'s. `answer` loads neither FAISS nor an encoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorauter.defaults import DEFAULT, resolve_tasks
from lorauter.errors import ConfigError
from lorauter_cli.console import App, counting, notify, phase, warn
from lorauter_cli.files import written
from lorauter_cli.stores import States, adapters_to_read, adapters_to_use, catalog_to_read, state_model

if TYPE_CHECKING:
    from lorauter.evaluation.routing import RememberingCatalogs
    from lorauter.routing import RoutingConfig
    from lorauter.tasks import Task

eval_app = App(no_args_is_help=True, help="Measure routing, and answers with and without it.")

_CONFIGURED = "configured"

_Tasks = Annotated[Path, typer.Option(help="A folder of task files (.json, .json.gz), or 'default'.")]
_CatalogUri = Annotated[str, typer.Option(help="The catalog: a folder, a store's URI, or 'default'.")]
_Adapters = Annotated[str, typer.Option(help="The adapter store: a folder, a store's URI, or 'default'.")]
_Methods = Annotated[str | None, typer.Option(help="Separated by commas; all, if not given.")]
_Regimes = Annotated[str | None, typer.Option(help="in-domain, semi-OOD, OOD, separated by commas; all, if not given.")]
_Split = Annotated[
    Literal["test", "validation"], typer.Option(help="'validation' asks the examples that the catalog does not have.")
]
_Config = Annotated[
    Path | None, typer.Option(help="A YAML file of routing settings, which adds the method 'configured'.")
]
_EncoderName = Annotated[str, typer.Option(help="Sentence encoder: a folder, an id, a store's URI, or 'default'.")]
_Model = Annotated[str, typer.Option(help="Base model: a folder, an id, a store's URI, or 'default'.")]
_Device = Annotated[str, typer.Option(help="'auto' is the GPU if there is one, else the CPU.")]
_MaxBatch = Annotated[int | None, typer.Option(help="Queries answered at once.", min=1)]
_LoraHub = Annotated[
    Path | None, typer.Option(help="Weights, as 'eval lorahub' writes them, which add the method 'lorahub'.")
]
_Composed = Annotated[
    Path | None,
    typer.Option(help="Compositions, a folder as 'eval compose' makes it, which add the method 'default+composed'."),
]
_Helped = Annotated[
    Path | None,
    typer.Option(
        "--examples",
        help="Which tasks examples help, a folder as 'eval examples' makes it, which adds the method "
        "'default+examples', or with --composed 'default+composed+examples'.",
    ),
]
_Rouge = Annotated[bool, typer.Option("--rouge-for-bleu", help="Score BLEU tasks by ROUGE-L.")]


@eval_app.command("decide")
def decide(
    tasks: _Tasks,
    catalog: _CatalogUri,
    out: Annotated[Path, typer.Option(help="JSON lines, one for each method, regime and query.")],
    methods: _Methods = None,
    regimes: _Regimes = None,
    split: _Split = "test",
    config: _Config = None,
    lorahub: _LoraHub = None,
    composed: _Composed = None,
    helped: _Helped = None,
    encoder: _EncoderName = DEFAULT,
    states: States = DEFAULT,
) -> None:
    """Decide by every method, in every regime, which adapters answer each query."""
    chosen = _methods(methods, config, lorahub, composed, helped)
    _decide(
        tasks, catalog, out, methods=chosen, regimes=regimes, split=split, lorahub=lorahub, composed=composed,
        helped=helped, encoder=encoder, states=states,
    )  # fmt: skip


@eval_app.command("answer")
def answer(
    decisions: Annotated[Path, typer.Option(help="JSON lines, as 'decide' writes them.")],
    adapters: _Adapters,
    out: Annotated[Path, typer.Option(help="JSON lines; what it holds already is not answered again.")],
    composed: _Composed = None,
    model: _Model = DEFAULT,
    device: _Device = "auto",
    max_batch: _MaxBatch = None,
) -> None:
    """Answer decided queries; a run that was cut off goes on where it stopped."""
    _answer(decisions, adapters, out, composed=composed, model=model, device=device, max_batch=max_batch)


@eval_app.command("report")
def report(
    decisions: Annotated[Path, typer.Option(help="JSON lines, as 'decide' writes them.")],
    answers: Annotated[Path, typer.Option(help="JSON lines, as 'answer' writes them.")],
    out: Annotated[Path, typer.Option(help="A folder for report.json, report.md and the plot.")],
    rouge_for_bleu: _Rouge = False,
) -> None:
    """Score answers, and print the tables."""
    _report(decisions, answers, out, rouge_for_bleu=rouge_for_bleu)


@eval_app.command("answers")
def answers(
    tasks: _Tasks,
    catalog: _CatalogUri,
    adapters: _Adapters,
    out: Annotated[Path, typer.Option(help="A folder for decisions.jsonl, answers.jsonl and the report.")],
    methods: _Methods = None,
    regimes: _Regimes = None,
    split: _Split = "test",
    config: _Config = None,
    lorahub: _LoraHub = None,
    composed: _Composed = None,
    helped: _Helped = None,
    encoder: _EncoderName = DEFAULT,
    states: States = DEFAULT,
    model: _Model = DEFAULT,
    device: _Device = "auto",
    max_batch: _MaxBatch = None,
    rouge_for_bleu: _Rouge = False,
) -> None:
    """Decide, answer and report, in one folder; a run that was cut off goes on where it stopped."""
    decided, answered = out / "decisions.jsonl", out / "answers.jsonl"
    chosen = _methods(methods, config, lorahub, composed, helped)
    _decide(
        tasks, catalog, decided, methods=chosen, regimes=regimes, split=split, lorahub=lorahub, composed=composed,
        helped=helped, encoder=encoder, states=states,
    )  # fmt: skip
    _answer(decided, adapters, answered, composed=composed, model=model, device=device, max_batch=max_batch)
    _report(decided, answered, out, rouge_for_bleu=rouge_for_bleu)


@eval_app.command("lorahub")
def lorahub(
    tasks: _Tasks,
    adapters: _Adapters,
    out: Annotated[Path, typer.Option(help="JSON lines; what it holds already is not searched again.")],
    examples: Annotated[int, typer.Option(help="Validation examples of each task to search on.", min=1)] = 20,
    budget: Annotated[int, typer.Option(help="Weightings tried in each search.", min=1)] = 40,
    model: _Model = DEFAULT,
) -> None:
    """Search LoraHub's weights for each task, with its own adapter and without; a run that was cut off goes on."""
    from lorauter.catalog.scoring import open_likelihood_scorer
    from lorauter.evaluation.answering import adapters_in
    from lorauter.evaluation.weighing import weigh
    from lorauter.tasks import read_tasks

    found = [replace(task, validation=task.validation[:examples]) for task in read_tasks(resolve_tasks(tasks))]
    repository = adapters_to_use(adapters)
    pool = repository.names()
    load = adapters_in(repository)
    with phase("loading the base model"):
        scorer = open_likelihood_scorer(model, load, found)
    own = {task.name: [task.name] if task.name in pool else [] for task in found}

    try:
        with counting(f"searching weights for {len(found)} tasks", "searches are done") as progress:
            weigh(found, pool, scorer, load, out, own=own, budget=budget, progress=progress)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}", setting="out") from error


@eval_app.command("compose")
def compose(
    catalog: _CatalogUri,
    adapters: _Adapters,
    out: Annotated[Path, typer.Option(help="A folder; what it holds already is not composed again.")],
    task: Annotated[list[str] | None, typer.Option(help="A task; may be given again. All, if none is given.")] = None,
    model: _Model = DEFAULT,
    device: _Device = "auto",
) -> None:
    """Compose an adapter for each task of a catalog, with the task's own adapter and without it."""
    from lorauter.catalog import Catalog
    from lorauter.evaluation.answering import adapters_in
    from lorauter.evaluation.composing import compose_regimes, read_composed

    repository = adapters_to_use(adapters)
    with phase("reading the catalog"):
        found = Catalog.load(catalog_to_read(catalog))
    chosen = task or list(found.names)
    own = {name: [name] if name in found.adapters else [] for name in chosen}
    with counting(f"composing for {len(chosen)} tasks", "steps are made") as progress:
        compose_regimes(
            found, chosen, adapters_in(repository, found.adapters), out, own=own, model=model, device=device,
            progress=lambda done, total, _: progress(done, total), report=warn,
        )  # fmt: skip
    held = read_composed(out)
    notify(f"{len(held)} of {2 * len(chosen)} compositions beat the router's mixtures")


@eval_app.command("examples")
def examples(
    catalog: _CatalogUri,
    adapters: _Adapters,
    out: Annotated[Path, typer.Option(help="A folder; answers that it holds are not made again.")],
    count: Annotated[int, typer.Option(help="Examples that go before each, at most.", min=1, max=16)] = 3,
    composed: _Composed = None,
    model: _Model = DEFAULT,
    device: _Device = "auto",
    max_batch: _MaxBatch = None,
) -> None:
    """Find out which tasks' queries are answered better after examples, with the task's own adapter and without it."""
    from lorauter.catalog import Catalog
    from lorauter.evaluation.composing import read_composed
    from lorauter_cli.examples import asked_in_regimes

    repository = adapters_to_use(adapters)
    made = read_composed(composed) if composed is not None else []
    with phase("reading the catalog"):
        found = Catalog.load(catalog_to_read(catalog))
    asked_in_regimes(found, repository, count, out, composed=made, model=model, device=device, max_batch=max_batch)


@eval_app.command("plots")
def plots(
    catalog: _CatalogUri,
    out: Annotated[Path, typer.Option(help="A folder for scores.png and tasks.png.")],
) -> None:
    """Draw a catalog: the score of every adapter on every task, and a map of the tasks' embeddings."""
    from lorauter.catalog import Catalog
    from lorauter.evaluation.plots import heat_map, mean_scores, task_map

    with phase("reading the catalog"):
        found = Catalog.load(catalog_to_read(catalog))
    names, drawn = [entry.name for entry in found.tasks], []
    try:
        out.mkdir(parents=True, exist_ok=True)
        matrix, adapters = mean_scores({entry.name: entry.scores for entry in found.tasks})
        if adapters:
            heat_map(matrix, adapters, names, out / "scores.png")
            drawn.append("scores.png")
        else:
            notify("the catalog has no scores, so there is no heat map; build it with --match")
        if len(names) > 1:
            task_map(found.centroids, names, [entry.domain for entry in found.entries], out / "tasks.png")
            drawn.append("tasks.png")
        else:
            notify("the catalog has one task, so there is no map of tasks")
    except OSError as error:
        raise ConfigError(f"the plots cannot be written to {out}: {error}", setting="out") from error
    notify(f"{' and '.join(drawn) or 'nothing'} drawn in {out}")


@eval_app.command("routing")
def routing(
    tasks: _Tasks,
    examples: Annotated[int, typer.Option(help="Validation examples that stand for each task.", min=1)] = 20,
    flan: Annotated[
        Path | None, typer.Option(help='Another set, in one file {"tasks": [...], "queries": [...]} (.json, .json.gz).')
    ] = None,
    encoder: _EncoderName = DEFAULT,
    states: States = DEFAULT,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there, too.")] = None,
) -> None:
    """Measure how well the test examples of tasks are routed to them, by each preset; generates nothing."""
    from lorauter.defaults import load_encoder
    from lorauter.evaluation.routing import RememberingCatalogs, first_examples, read_query_set
    from lorauter.tasks import read_tasks

    sets = {"tasks": read_tasks(resolve_tasks(tasks))}
    if flan is not None:
        sets["flan"] = read_query_set(flan)
    with phase("loading the encoder"):
        embedder = load_encoder(encoder)
    catalogs = RememberingCatalogs(embedder, state_model(states))
    figures = {}
    for name, found in sets.items():
        with counting(f"routing the queries of {len(found)} tasks", "measurements are made") as progress:
            figures[name] = _routing_figures(first_examples(found, examples), catalogs, progress)
        typer.echo(_routing_tables(name, figures[name]))
    if json_file is not None:
        _write(json_file, json.dumps(figures, indent=1) + "\n")


def _methods(
    methods: str | None, config: Path | None, lorahub: Path | None, composed: Path | None, helped: Path | None
) -> dict[str, RoutingConfig | None]:
    """The methods that are asked for, and those that have settings. Raises ConfigError."""
    from lorauter.evaluation.methods import COMPOSED, COMPOSED_EXAMPLES, EXAMPLES, LORAHUB, METHODS

    chosen: dict[str, RoutingConfig | None] = dict.fromkeys(_names(methods, METHODS))
    if config is not None:
        chosen[_CONFIGURED] = _read_config(config)
    if lorahub is not None:
        chosen[LORAHUB] = None
    elif LORAHUB in chosen:
        raise ConfigError(
            "the method 'lorahub' needs weights; search them with 'lorauter eval lorahub', and give their file "
            "with --lorahub",
            setting="lorahub",
        )
    if composed is not None:
        chosen[COMPOSED] = None
    elif COMPOSED in chosen:
        raise ConfigError(
            f"the method {COMPOSED!r} needs compositions; make them with 'lorauter eval compose', and give their "
            "folder with --composed",
            setting="composed",
        )
    shows = EXAMPLES if composed is None else COMPOSED_EXAMPLES
    if helped is not None:
        chosen[shows] = None
    for name in (EXAMPLES, COMPOSED_EXAMPLES):
        if name in chosen and (helped is None or name != shows):
            needed = "--examples alone" if name == EXAMPLES else "--composed and --examples"
            raise ConfigError(
                f"the method {name!r} needs {needed}; 'lorauter eval examples' finds out which tasks examples help",
                setting="examples",
            )
    return chosen


def _names(given: str | None, default: Collection[str]) -> list[str]:
    return list(default) if given is None else [name.strip() for name in given.split(",") if name.strip()]


def _write(path: Path, text: str) -> None:
    """Write a file whole, or not at all. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path) as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _decide(
    tasks: Path,
    catalog_uri: str,
    out: Path,
    *,
    methods: Mapping[str, RoutingConfig | None],
    regimes: str | None,
    split: str,
    lorahub: Path | None,
    composed: Path | None,
    helped: Path | None,
    encoder: str,
    states: str,
) -> None:
    from lorauter.catalog import Catalog
    from lorauter.defaults import load_encoder
    from lorauter.evaluation.composing import read_composed
    from lorauter.evaluation.helped import read_helped
    from lorauter.evaluation.methods import decide
    from lorauter.evaluation.regimes import REGIMES
    from lorauter.evaluation.weighing import read_weights
    from lorauter.tasks import read_tasks

    found, weights = read_tasks(resolve_tasks(tasks)), read_weights(lorahub) if lorahub is not None else None
    made = read_composed(composed) if composed is not None else None
    help = read_helped(helped) if helped is not None else None
    with phase("loading the encoder and the catalog"):
        model = load_encoder(encoder)
        catalog = Catalog.load(catalog_to_read(catalog_uri))
        catalog.check_encoder(model)
    reader = state_model(states, catalog)
    held = {entry.name: {example.input for example in entry.task.validation} for entry in catalog.tasks}
    asked = [task for task in found if _has_queries(task, split, held.get(task.name, ()))]
    if not asked:
        raise ConfigError(f"no task has {split} examples to ask that the catalog does not have", setting="tasks")
    own = {task.name: [task.name] if task.name in catalog.adapters else [] for task in asked}
    alone = [name for name, adapters in own.items() if not adapters]
    if alone and "oracle" in methods:
        notify(f"no adapter has the name of {', '.join(alone)}: the oracle is the base model there")
    what = f"deciding by {len(methods)} methods for the queries of {len(asked)} tasks"
    with counting(what, "decisions are made") as progress:
        which, lines = _names(regimes, REGIMES), []
        for row in decide(
            asked, catalog, model, methods, states=reader, regimes=which, split=split, own=own, lorahub=weights,
            composed=made, helped=help,
        ):  # fmt: skip
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            progress(len(lines), None)
    _write(out, "".join(lines))
    notify(f"{len(lines)} decisions are in {out}")


def _has_queries(task: Task, split: str, seen: Collection[str]) -> bool:
    return bool(task.test) if split == "test" else any(example.input not in seen for example in task.validation)


def _read_config(path: Path) -> RoutingConfig:
    """Routing settings from a YAML file. Raises ConfigError."""
    import yaml
    from pydantic import ValidationError

    from lorauter.routing import RoutingConfig
    from lorauter.yaml_text import read_yaml

    try:
        return RoutingConfig.model_validate(read_yaml(path.read_bytes()) or {})
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{path}: {where}: {problem['msg']}", setting=where) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", setting="config") from error


def _answer(
    decisions: Path,
    adapters: str,
    out: Path,
    *,
    composed: Path | None,
    model: str,
    device: str,
    max_batch: int | None,
) -> None:
    from lorauter.evaluation.answering import adapters_in, answer
    from lorauter.evaluation.composing import composed_or, read_composed
    from lorauter.evaluation.rows import read_decisions
    from lorauter_cli.examples import loaded_engine

    rows = read_decisions(decisions)
    load = adapters_in(adapters_to_read(adapters))
    if composed is not None:
        load = composed_or(read_composed(composed), load)
    with (
        closing(loaded_engine(model, device, max_batch)) as engine,
        counting("answering", "rows are answered") as progress,
    ):
        answer(rows, engine, load, out, progress=progress)


def _report(decisions: Path, answers: Path, out: Path, *, rouge_for_bleu: bool) -> None:
    from lorauter.evaluation.plots import score_by_share, share_lines
    from lorauter.evaluation.report import evaluate, to_markdown, write_report
    from lorauter.evaluation.rows import read_answers, read_scored

    results = evaluate(read_scored(decisions), read_answers(answers), rouge_for_bleu=rouge_for_bleu)
    try:
        write_report(results, out)
        typer.echo(to_markdown(results), nl=False)
        if share_lines(results):
            score_by_share(results, out / "score_by_share.png")
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {out}: {error}", setting="out") from error
    notify(f"the report is in {out}")


def _routing_figures(
    tasks: Sequence[Task], catalogs: RememberingCatalogs, progress: Callable[[int, int], None]
) -> dict[str, dict[str, Any]]:
    """For each preset what `lorauter.evaluation.routing` measures; None for what the tasks do not allow."""
    from lorauter.evaluation.routing import ambiguous, evaluate_routing, queries_of, strangers, stress
    from lorauter.routing import RoutingConfig

    measured: dict[str, Callable[[RoutingConfig], Any]] = {
        "routing": lambda config: evaluate_routing(tasks, queries_of(tasks), catalogs, config),
        "stress": lambda config: stress(tasks, catalogs, config),
        "ambiguous": lambda config: ambiguous(tasks, catalogs, config),
        "strangers": lambda config: strangers(tasks, catalogs, config),
    }
    presets = ("paper", "default")
    figures: dict[str, dict[str, Any]] = {preset: {} for preset in presets}
    for done, (preset, name) in enumerate(product(presets, measured), start=1):
        found = measured[name](RoutingConfig.model_validate({"preset": preset}))
        figures[preset][name] = getattr(found, "__dict__", found)  # a result's figures; or they themselves, or None
        progress(done, len(presets) * len(measured))
    return figures


def _routing_tables(name: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of each measurement, a row for each preset."""
    titles = {
        "routing": "known queries",
        "stress": "top-1 by number of tasks",
        "ambiguous": "two queries of different domains in one",
        "strangers": "the whole domain taken out",
    }
    parts = []
    for key, title in titles.items():
        of = {preset: found[key] for preset, found in figures.items() if found[key]}
        if of:
            header = ["preset", *map(str, next(iter(of.values())))]
            rows = [[preset, *map(_cell, row.values())] for preset, row in of.items()]
            lines = [f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *rows)]
            parts.append(f"{name}, {title}:\n\n{''.join(lines)}")
    return "\n".join(parts)


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"
