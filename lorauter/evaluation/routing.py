"""How well the router tells tasks apart, and what it does with queries that are of none or of two. Generates nothing.

Works on tasks alone, in catalogs that are built in memory and have no adapters.
"""

from __future__ import annotations

import gzip
import json
import random
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lorauter.catalog import Catalog, build_catalog
from lorauter.catalog.catalog import PROBE_TEXT
from lorauter.catalog.whitening import States
from lorauter.encoder import Embeddings, Encoder
from lorauter.errors import ConfigError, TaskError
from lorauter.routing import (
    Retrieved,
    Retriever,
    RoutingConfig,
    RoutingDecision,
    RoutingOptions,
    compose,
)
from lorauter.states import RememberingStates, StateModel
from lorauter.tasks import Task

Query = tuple[str, str]
"""The name of a task, and a text of it."""

_BINS = 10
_MOST_TASKS = 1000  # the settings allow no more
_Found = list[tuple[Retrieved, RoutingDecision]]


@dataclass(frozen=True)
class RoutingResult:
    """How well tasks are told apart. Shares and probabilities are in [0, 1].

    Attributes:
        tasks: how many there are.
        queries: how many were asked.
        top_1: share of the queries whose own task comes first.
        top_3: share whose own task is among the first three.
        mrr: mean of 1 / the own task's rank.
        domain: share whose first task is of their own domain.
        calibration_error: expected calibration error, in 10 bins, of `confidence` as the probability that the first
            task is right, over each query once as it is and once with its own task taken out, where nothing is right.
        known_auc: area under the ROC curve of telling by `confidence` the former from the latter.
        fallback: share of the queries that the base model alone would answer.
        by_states: share of the queries whose states were looked at.
        fit_s: seconds to build the catalog, embedding and reading aside.
        route_ms: milliseconds a query, embedding and reading aside.
    """

    tasks: int
    queries: int
    top_1: float
    top_3: float
    mrr: float
    domain: float
    calibration_error: float
    known_auc: float
    fallback: float
    by_states: float
    fit_s: float
    route_ms: float


@dataclass(frozen=True)
class AmbiguousResult:
    """What becomes of queries that join texts of two tasks of different domains.

    Attributes:
        queries: how many there are.
        either: share of them with one of their two tasks among the first two.
        confidence: the mean.
    """

    queries: int
    either: float
    confidence: float


@dataclass(frozen=True)
class StrangersResult:
    """What becomes of queries whose whole domain is taken out.

    Attributes:
        queries: how many there are.
        confidence: the mean.
        fallback: share of them that the base model alone would answer.
    """

    queries: int
    confidence: float
    fallback: float


class RememberingCatalogs:
    """Catalogs of tasks, without adapters, each built and its reranker fitted once.

    Args:
        encoder: what is embedded with; it is asked for no text twice.
        states: what texts are read with, likewise; without it there are no states.
    """

    def __init__(self, encoder: Encoder, states: StateModel | None = None) -> None:
        self.encoder = RememberingEncoder(encoder)
        self.states = None if states is None else RememberingStates(states)
        self._known: dict[frozenset[str], tuple[Sequence[Task], Catalog, float]] = {}

    def of(self, tasks: Sequence[Task]) -> tuple[Catalog, float]:
        """A catalog with its index and reranker, and the seconds that it took, embedding aside."""
        names = frozenset(task.name for task in tasks)
        same = sorted(tasks, key=lambda task: task.name)
        if names not in self._known or self._known[names][0] != same:
            for task in tasks:
                texts = [example.input for example in task.validation]
                self.encoder.encode(texts)
                if self.states is not None:
                    self.states.states(texts)
            if self.states is not None:
                self.states.states([PROBE_TEXT])
            start = time.perf_counter()
            catalog = build_catalog(tasks, self.encoder, states=self.states)
            Retriever(catalog, RoutingConfig())
            self._known[names] = same, catalog, time.perf_counter() - start
        return self._known[names][1:]


class RememberingEncoder:
    """An encoder that embeds each text once, and keeps what it embedded."""

    def __init__(self, encoder: Encoder) -> None:
        self.name = encoder.name
        self._encoder = encoder
        self._known: dict[str, Embeddings] = {}

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """As `Encoder.encode`."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def first_examples(tasks: Iterable[Task], count: int) -> list[Task]:
    """The tasks with their first `count` validation examples alone."""
    return [replace(task, validation=task.validation[:count]) for task in tasks]


def queries_of(tasks: Iterable[Task]) -> list[Query]:
    """The test inputs of tasks."""
    return [(task.name, example.input) for task in tasks for example in task.test]


def read_query_set(path: Path) -> list[Task]:
    """Tasks of one `.json` or `.json.gz` file whose test examples are its queries.

    Its shape is `{"tasks": [{"name", "domain", "validation"}], "queries": [{"task", "input"}]}`.

    Raises:
        TaskError: it cannot be read, or has another shape.
    """
    try:
        raw = path.read_bytes()
        data = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        tests: dict[str, list[Any]] = {task["name"]: [] for task in data["tasks"]}
        for query in data["queries"]:
            tests[query["task"]].append({"target": "", **query})
        rows = [{"metric": "em", **task, "test": tests[task["name"]]} for task in data["tasks"]]
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise TaskError(f"cannot be read as JSON: {error}", source=str(path)) from error
    except (KeyError, TypeError) as error:
        raise TaskError(f"is no set of tasks and queries of them: {error!r}", source=str(path)) from error
    return [Task.from_json(row, source=str(path)) for row in rows]


def evaluate_routing(
    tasks: Sequence[Task], queries: Sequence[Query], encoder: Encoder | RememberingCatalogs, config: RoutingConfig
) -> RoutingResult:
    """Route queries on a catalog of the tasks.

    Raises:
        ConfigError: there are no queries, a query is of no task, or two tasks have one name.
    """
    domains = {task.name: task.domain for task in tasks}
    if not queries:
        raise ConfigError("there are no queries; give tasks that have test examples")
    for name, _ in queries:
        if name not in domains:
            raise ConfigError(f"there are queries of task {name!r}, which is not among the tasks")
    bench = _Bench(tasks, encoder, config)
    texts = [text for _, text in queries]
    found, route_s = bench.route(texts, [RoutingOptions()] * len(texts))
    without, _ = bench.route(texts, [RoutingOptions(exclude_tasks=frozenset({name})) for name, _ in queries])
    ranked = [[task.name for task in decision.tasks] for _, decision in found]
    rows = list(zip((name for name, _ in queries), ranked, strict=True))
    ranks = [names.index(name) + 1 if name in names else np.inf for name, names in rows]
    known, unknown = _confidences(found), _confidences(without)
    return RoutingResult(
        tasks=len(tasks),
        queries=len(queries),
        top_1=fmean(rank == 1 for rank in ranks),
        top_3=fmean(rank <= 3 for rank in ranks),
        mrr=fmean(1 / rank for rank in ranks),
        domain=fmean(domains[names[0]] == domains[name] for name, names in rows),
        calibration_error=calibration_error(known + unknown, [rank == 1 for rank in ranks] + [False] * len(unknown)),
        known_auc=area_under_curve(known, unknown),
        fallback=bench.fallback(found),
        by_states=fmean(retrieved.by_states for retrieved, _ in found),
        fit_s=bench.fit_s,
        route_ms=1000 * route_s / len(queries),
    )


def stress(
    tasks: Sequence[Task],
    encoder: Encoder | RememberingCatalogs,
    config: RoutingConfig,
    sizes: Sequence[int] = (10, 20, 30, 40),
    seed: int = 0,
) -> dict[int, float]:
    """Share of the queries whose own task comes first, as the catalog grows: the nth random tasks join the earlier.

    Sizes beyond the number of tasks are left out, and subsets without test examples.
    """
    order = random.Random(seed).sample(list(tasks), len(tasks))
    catalogs = _remembering(encoder)
    subsets = {size: order[:size] for size in sizes if size <= len(order) and queries_of(order[:size])}
    return {size: _top_1(few, catalogs, config) for size, few in subsets.items()}


def _top_1(tasks: Sequence[Task], catalogs: RememberingCatalogs, config: RoutingConfig) -> float:
    queries = queries_of(tasks)
    texts = [text for _, text in queries]
    found, _ = _Bench(tasks, catalogs, config).route(texts, [RoutingOptions()] * len(texts))
    return fmean(decision.tasks[0].name == name for (name, _), (_, decision) in zip(queries, found, strict=True))


def ambiguous(
    tasks: Sequence[Task], encoder: Encoder | RememberingCatalogs, config: RoutingConfig, seed: int = 0
) -> AmbiguousResult | None:
    """Route every test input joined to one of another domain. None where there are none."""
    draw = random.Random(seed)
    pairs: list[tuple[frozenset[str], str]] = []
    for task in tasks:
        others = [other for other in tasks if other.domain != task.domain and other.test]
        for example in task.test if others else ():
            other = draw.choice(others)
            second = draw.choice(other.test).input
            pairs.append((frozenset({task.name, other.name}), f"{example.input}\n\n{second}"))
    if not pairs:
        return None
    found, _ = _Bench(tasks, encoder, config).route([text for _, text in pairs], [RoutingOptions()] * len(pairs))
    either = [
        any(task.name in names for task in decision.tasks[:2])
        for (names, _), (_, decision) in zip(pairs, found, strict=True)
    ]
    return AmbiguousResult(len(pairs), fmean(either), fmean(_confidences(found)))


def strangers(
    tasks: Sequence[Task], encoder: Encoder | RememberingCatalogs, config: RoutingConfig
) -> StrangersResult | None:
    """Route every test input with all tasks of its domain taken out. None where there is one domain, or no input."""
    domains: dict[str, frozenset[str]] = {}
    for task in tasks:
        domains[task.domain] = domains.get(task.domain, frozenset()) | {task.name}
    asked = [(task.domain, example.input) for task in tasks for example in task.test]
    if len(domains) < 2 or not asked:
        return None
    bench = _Bench(tasks, encoder, config)
    options = [RoutingOptions(exclude_tasks=domains[domain]) for domain, _ in asked]
    found, _ = bench.route([text for _, text in asked], options)
    return StrangersResult(len(asked), fmean(_confidences(found)), bench.fallback(found))


def _remembering(encoder: Encoder | RememberingCatalogs) -> RememberingCatalogs:
    return encoder if isinstance(encoder, RememberingCatalogs) else RememberingCatalogs(encoder)


class _Timed:
    """A model of states; `seconds` is what reading has taken."""

    def __init__(self, model: StateModel) -> None:
        self.name = model.name
        self.seconds = 0.0
        self._model = model

    def states(self, texts: Sequence[str]) -> States:
        """As `StateModel.states`."""
        start = time.perf_counter()
        found = self._model.states(texts)
        self.seconds += time.perf_counter() - start
        return found


class _Bench:
    """A router on a catalog of the tasks that ranks all of them.

    Attributes:
        fit_s: seconds to build it, embedding aside.
    """

    def __init__(self, tasks: Sequence[Task], encoder: Encoder | RememberingCatalogs, config: RoutingConfig) -> None:
        count = min(len(tasks), _MOST_TASKS)
        self._config = config.model_copy(update={"num_tasks": count, "candidates": max(config.candidates, count)})
        catalogs = _remembering(encoder)
        self._memory, self._states = catalogs.encoder, catalogs.states
        catalog, self.fit_s = catalogs.of(tasks)
        self._retriever = Retriever(catalog, self._config)

    def route(self, texts: Sequence[str], options: Sequence[RoutingOptions]) -> tuple[_Found, float]:
        """What was found and decided for n queries, and the seconds it took, embedding and reading aside."""
        embeddings, reader = self._memory.encode(texts), None if self._states is None else _Timed(self._states)
        start = time.perf_counter()
        found = self._retriever.retrieve_with(reader, embeddings, texts, options)
        decisions = [
            compose(f, o, self._config, catalog_version="", versions={}) for f, o in zip(found, options, strict=True)
        ]
        seconds = time.perf_counter() - start - (0.0 if reader is None else reader.seconds)
        return list(zip(found, decisions, strict=True)), seconds

    def fallback(self, found: _Found) -> float:
        """Share of queries that the base model alone would answer if there were adapters."""
        return fmean(self._config.fallback and retrieved.stranger for retrieved, _ in found)


def _confidences(found: _Found) -> list[float]:
    return [decision.confidence or 0.0 for _, decision in found]


def calibration_error(probabilities: Sequence[float], right: Sequence[bool]) -> float:
    """The expected calibration error: how far shares are from mean probabilities, in bins of equal width."""
    chances, hits = np.asarray(probabilities, np.float64), np.asarray(right, np.float64)
    places = np.minimum((chances * _BINS).astype(int), _BINS - 1)
    gaps = [abs((chances - hits)[places == place].sum()) for place in range(_BINS)]
    return float(sum(gaps) / len(chances))


def area_under_curve(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The probability that one of `positive` is above one of `negative`, equals counting half."""
    below = np.sort(np.asarray(negative, np.float64))
    sides = [np.searchsorted(below, positive, side=side) for side in ("left", "right")]
    return float(np.mean(sides) / len(below))
