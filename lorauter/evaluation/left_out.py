"""Which tasks' queries are answered better after examples: found out on a catalog's own examples, each left out once.

Every example is asked as a query: as the router would answer it, and after the nearest of the task's others, by its
mixture and by the base model alone; all of it with the adapters that were made for the task, and without them. Examples
help a task where that gains more than chance would. Answers come from `lorauter.evaluation.answering`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import NamedTuple

from lorauter.adapters.weights import LoadAdapter
from lorauter.catalog.catalog import Catalog
from lorauter.catalog.shown import Help, ShownExamples
from lorauter.engine import MultiLoraEngine
from lorauter.engine.text import TextCodec
from lorauter.evaluation.answering import answer
from lorauter.evaluation.composing import ComposedFor, barred_in, with_composed
from lorauter.evaluation.helped import write_helped
from lorauter.evaluation.metrics import score
from lorauter.evaluation.rows import AnswerRow, DecisionRow, example_row, read_answers
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions, compose
from lorauter.routing.examples import Shelf
from lorauter.tasks import Example, Task
from lorauter.turns import ExampleTurns, chat_of

_MOST_TOKENS = 256  # of an answer
# Standard errors that a gain has to be at least; what was made for a task is not given up for one that may be luck.
_ERRORS, _ERRORS_OWN = 1.0, 2.0

Barred = Mapping[str, Collection[str]]


class Trial(NamedTuple):
    """A left-out example as it is asked.

    Attributes:
        own: whether the adapters that were made for the task may be used.
        way: "plain" is without examples; "mixture" and "base" are what answers after them.
        row: for the answering step.
    """

    task: str
    own: bool
    way: str
    place: int
    row: DecisionRow


def trials(
    catalog: Catalog,
    count: int,
    codec: TextCodec,
    *,
    model: str = "",
    barred: Barred | None = None,
    config: RoutingConfig | None = None,
    names: Collection[str] | None = None,
) -> list[Trial]:
    """All that is to be asked; of tasks with one example nothing.

    Args:
        count: examples shown at most; fewer where they take more than `config.examples_tokens`.
        codec: the base model's.
        model: what tells it from others: answers of an earlier run are taken only where all is the same.
        barred: adapters that a task's queries may not use in any case.
        names: of the tasks; all, if it is left out.
    """
    config = config or RoutingConfig()
    retriever = Retriever(catalog, config)
    found: list[Trial] = []
    for place, name in enumerate(catalog.names):
        if names is not None and name not in names:
            continue
        row = catalog.row(place)
        task, of = row.entry.task, row.examples.embeddings
        if len(task.validation) < 2:
            continue
        away = frozenset((barred or {}).get(name, ()))
        cases = {False: RoutingOptions(exclude_adapters=away.union(row.entry.declared), examples=0)}
        if not away.issuperset(row.entry.declared):
            cases[True] = RoutingOptions(exclude_adapters=away, examples=0)
        shelf, tokens = Shelf(task, of), tokens_of(codec, task)
        shown = [shelf.nearest(one, count, tokens, config.examples_tokens, but=i) for i, one in enumerate(of)]
        texts = [example.input for example in task.validation]
        for own, options in cases.items():
            asked = [options] * len(texts)
            decisions = [
                compose(one, options, config, catalog_version="", versions=catalog.adapters)
                for one in retriever.retrieve(of, texts, asked)
            ]
            for i, (example, decision, turns) in enumerate(zip(task.validation, decisions, shown, strict=True)):
                mixture = {adapter.name: adapter.weight for adapter in decision.adapters}
                versions = [model, *(str(adapter.key) for adapter in decision.adapters)]
                ways = {"plain": (mixture, ()), "mixture": (mixture, turns), "base": ({}, turns)}
                for way, (adapters, before) in ways.items() if turns else ():
                    found.append(Trial(name, own, way, i, _row(task, example, adapters, before, versions)))
    return found


def tokens_of(codec: TextCodec, task: Task) -> tuple[int, ...]:
    """What each of a task's examples takes in a prompt. Raises InvalidRequest: the model has no chat template."""
    alone = len(codec.chat(chat_of((), "?")))
    turns = [ExampleTurns(i, example.input, example.target) for i, example in enumerate(task.validation)]
    return tuple(len(codec.chat(chat_of([turn], "?"))) - alone for turn in turns)


def helped(
    catalog: Catalog, count: int, codec: TextCodec, asked: Sequence[Trial], answers: Mapping[str, AnswerRow]
) -> dict[str, ShownExamples]:
    """What was found out of each task that was asked.

    Raises:
        ConfigError: a metric's package is not installed.
    """
    scores: dict[tuple[str, bool], dict[str, list[float]]] = {}
    tasks: dict[str, Task] = {}
    for trial in asked:
        if trial.task not in tasks:
            [place] = catalog.places([trial.task]).tolist()
            tasks[trial.task] = catalog.tasks[place].task
        task = tasks[trial.task]
        value = score(task.metric, answers[trial.row.id].answer, task.validation[trial.place].target)
        scores.setdefault((trial.task, trial.own), {}).setdefault(trial.way, []).append(value)
    return {
        name: ShownExamples(
            count,
            _help(scores[name, True], _ERRORS_OWN) if (name, True) in scores else None,
            _help(scores[name, False], _ERRORS),
            tokens_of(codec, task),
        )
        for name, task in tasks.items()
    }


def ask_again(
    catalog: Catalog, names: Collection[str], count: int, engine: MultiLoraEngine, load: LoadAdapter
) -> dict[str, ShownExamples]:
    """Find out of some tasks what so many examples do; where none fits, they help nothing.

    Args:
        load: reads the catalog's adapters.

    Raises:
        As `answer` and `helped`.
    """
    asked = trials(catalog, count, engine.codec, names=names)
    with TemporaryDirectory(prefix="lorauter-") as work:
        answer({trial.row.id: trial.row for trial in asked}.values(), engine, load, Path(work) / "answers.jsonl")
        found = helped(catalog, count, engine.codec, asked, read_answers(Path(work) / "answers.jsonl"))
    nothing = Help(None, 0.0, 0.0)
    for place, name in zip(catalog.places(list(names)).tolist(), names, strict=True):
        if name not in found:
            of = catalog.tasks[place]
            own = nothing if of.declared else None
            found[name] = ShownExamples(count, own, nothing, tokens_of(engine.codec, of.task))
    return found


def ask_regimes(
    catalog: Catalog,
    count: int,
    engine: MultiLoraEngine,
    load: LoadAdapter,
    output: Path,
    *,
    own: Mapping[str, Collection[str]],
    model: str = "",
    composed: Sequence[ComposedFor] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Find out of each regime that has the task in the catalog, with its compositions, which tasks examples help.

    Args:
        load: reads the catalog's adapters, and the compositions.
        output: a folder, for what `helped.read_helped` reads, and the answers, which are not made again.
        own: adapters of each task that the regimes take away.
        model: what tells the base model from others.
    """
    catalogs = with_composed(catalog, composed, own)
    asked = {
        regime: trials(of, count, engine.codec, model=model, barred=barred_in(regime, of, own))
        for regime, of in catalogs.items()
    }
    rows = {trial.row.id: trial.row for of in asked.values() for trial in of}
    answer(rows.values(), engine, load, output / "answers.jsonl", progress=progress)
    answers = read_answers(output / "answers.jsonl")
    found = {regime: helped(of, count, engine.codec, asked[regime], answers) for regime, of in catalogs.items()}
    write_helped(output, found)


def _help(scores: Mapping[str, Sequence[float]], errors: float) -> Help:
    means = {way: fmean(values) for way, values in scores.items()}
    best = "base" if means["base"] > means["mixture"] else "mixture"
    gains = [after - before for after, before in zip(scores[best], scores["plain"], strict=True)]
    gain, error = fmean(gains), stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    return Help(best if gain > 0 and gain >= errors * error else None, gain, error)  # type: ignore[arg-type]


def _row(
    task: Task,
    example: Example,
    adapters: Mapping[str, float],
    before: Sequence[ExampleTurns],
    made_of: Sequence[str],
) -> DecisionRow:
    longest = max(len(one.target) for one in task.validation)
    row = {
        "input": example.input,
        "adapters": adapters,
        "max_tokens": min(_MOST_TOKENS, math.ceil(longest / 2) + 8),
        "examples": list(map(example_row, before)),
    }
    digest = hashlib.sha256(json.dumps([row, made_of], sort_keys=True).encode()).hexdigest()[:16]
    return DecisionRow.from_json({**row, "id": f"{task.name}/{digest}"}, source=task.name)
