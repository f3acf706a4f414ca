"""Composition: from what was retrieved for a query to weighted adapters, and the decision that says so.

A decision names the versions of its adapters: whoever carries it out asks nobody which is current. Knows nothing of
embeddings or catalogs.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from lorauter.errors import AdapterError, AdapterNotFound, AdapterRejected
from lorauter.names import AdapterKey
from lorauter.routing.examples import Shown, Why
from lorauter.routing.options import RoutingConfig, RoutingOptions
from lorauter.routing.retrieve import Retrieved
from lorauter.tasks import Answers
from lorauter.turns import ExampleTurns

_LEAST_WEIGHT = 0.01  # a utility mixture leaves out what weighs less: it would be fetched for nothing


class TaskScore(NamedTuple):
    """A task, its cosine similarity to the query, and the probability that the query is one of it."""

    name: str
    score: float
    probability: float


class AdapterWeight(NamedTuple):
    """A version of an adapter, its share in the mixture, and whether it was composed from others."""

    name: str
    version: str
    weight: float
    composed: bool = False

    @property
    def key(self) -> AdapterKey:
        """Name and version."""
        return AdapterKey(self.name, self.version)

    def to_json(self) -> dict[str, Any]:
        """As it is shown; `composed` where it was."""
        return {key: value for key, value in self._asdict().items() if value or key != "composed"}


Cause = Literal["not_found", "rejected", "unavailable"]


def cause_of(error: AdapterError) -> Cause:
    """An error in a word: what it says more may not be for whoever asked."""
    if isinstance(error, AdapterNotFound):
        return "not_found"
    return "rejected" if isinstance(error, AdapterRejected) else "unavailable"


@dataclass(frozen=True)
class LeftOut:
    """A version of an adapter that a mixture goes on without: it is gone, broken, or not to be had just now."""

    name: str
    version: str
    cause: Cause

    @property
    def key(self) -> AdapterKey:
        """Name and version."""
        return AdapterKey(self.name, self.version)


@dataclass(frozen=True)
class RoutingDecision:
    """How a query is to be answered.

    Attributes:
        catalog_version: the catalog that it was decided on; None where adapters were chosen by hand.
        tasks: the likeliest tasks, the likeliest first.
        adapters: the mixture, the heaviest first; the weights sum to 1. Empty means the base model alone.
        confidence: the probability, in [0, 1], that the query is one of the first task; None where adapters were
            chosen by hand.
        left_out: what the mixture would have too if it could be had.
        constrain: whether the answer was to be held to the first task's answers.
        answers: these; None where that was not asked, the task has none, or the query is stranger than any task's.
        by_states: whether what the catalog's model of states makes of the query was looked at too.
        shown: the first task's examples that go before the query, or why none; None where none were asked for.
        unshown: what the mixture is without them, where the base model alone answers with them.
        seconds: what the steps of deciding took (embed, retrieve), where that was measured; of all texts that were
            decided together.
    """

    catalog_version: str | None
    tasks: tuple[TaskScore, ...]
    adapters: tuple[AdapterWeight, ...]
    confidence: float | None = None
    left_out: tuple[LeftOut, ...] = ()
    constrain: bool = False
    answers: Answers | None = None
    by_states: bool = False
    shown: Shown | None = None
    unshown: tuple[AdapterWeight, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def constrained(self) -> str | None:
        """The task to whose answers the answer is held, if it is."""
        return None if self.answers is None else self.tasks[0].name

    @property
    def routed(self) -> bool:
        """Whether the router chose the adapters, and nobody by hand."""
        return self.catalog_version is not None

    def without(self, left_out: Iterable[LeftOut]) -> RoutingDecision:
        """The same with some adapters left out, for good."""
        left_out = tuple(left_out)
        if not left_out:
            return self
        kept = without(self.adapters, {adapter.key for adapter in left_out})
        return replace(self, adapters=kept, left_out=(*self.left_out, *left_out))

    @property
    def examples(self) -> tuple[ExampleTurns, ...]:
        """Those that go before the query, the nearest first."""
        return () if self.shown is None else self.shown.turns

    def with_examples(self, count: int, why: Why) -> RoutingDecision:
        """The same with so many of its examples, the nearest; without any, the mixture that there is then, and why."""
        if self.shown is None or count >= len(self.examples):
            return self
        if count:
            return replace(self, shown=replace(self.shown, turns=self.examples[:count]))
        return replace(self, adapters=self.adapters or self.unshown, unshown=(), shown=Shown(why=why))

    def to_json(self) -> dict[str, Any]:
        """As the HTTP API and the command line show it; `left_out` where there is any, `constrained` and `shown` where
        asked, `by_states` where they were looked at."""
        left_out = {"left_out": [vars(adapter) for adapter in self.left_out]} if self.left_out else {}
        constrained = {"constrained": self.constrained} if self.constrain else {}
        first = self.tasks[0].name if self.tasks else None
        shown = {} if self.shown is None else {"shown": self.shown.to_json(first)}
        return {
            "catalog_version": self.catalog_version,
            "tasks": [task._asdict() for task in self.tasks],
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "confidence": self.confidence,
            **({"by_states": True} if self.by_states else {}),
            **left_out,
            **constrained,
            **shown,
        }


def without(adapters: Iterable[AdapterWeight], keys: set[AdapterKey]) -> tuple[AdapterWeight, ...]:
    """A mixture without some of its adapters: the others' weights keep their proportions, and sum to what all had."""
    adapters = tuple(adapters)
    kept = [adapter for adapter in adapters if adapter.key not in keys]
    if len(kept) == len(adapters):
        return adapters
    left = sum(adapter.weight for adapter in kept)
    scale = sum(adapter.weight for adapter in adapters) / left if left else 1.0
    return tuple(adapter._replace(weight=adapter.weight * scale) for adapter in kept)


def compose(
    retrieved: Retrieved,
    options: RoutingOptions,
    config: RoutingConfig,
    *,
    catalog_version: str,
    versions: Mapping[str, str],
    composed: Container[str] = (),
    seconds: Mapping[str, float] | None = None,
) -> RoutingDecision:
    """Weigh adapters.

    By "utility", the `top_k` adapters of the largest expected utility u get the weights softmax(u / temperature),
    where the router's own temperature is multiplied by `softening` to the power of the chance that the query is of no
    known task; what weighs under 1 % is left out.
    By "tasks", the `top_k` likeliest tasks that have an adapter lend their best one, with the weights
    softmax(score / temperature) (LORAUTER, arXiv 2601.21795, section 3.3), where the score is the cosine, or the
    logarithm of the probability where tasks are reranked. An adapter that serves several of them gets their weights'
    sum; one whose weight underflows to 0 is left out.
    Where examples are shown that the base model alone answers best with, there is no mixture.

    Args:
        catalog_version, versions: of the catalog that it was retrieved from, and of its adapters.
        composed: those of its adapters that were composed from others.
        seconds: the decision's.
    """
    config = config.asked(options)
    tasks = retrieved.tasks[: config.num_tasks]
    top_k, temperature = options.top_k or config.top_k, options.temperature or config.temperature
    stranger = config.fallback and retrieved.stranger
    if stranger:
        weights: Mapping[str, float] = {}
    elif config.composition == "utility":
        mixed = retrieved.adapters[:top_k]
        if mixed and not options.temperature:
            temperature *= config.softening ** (1 - retrieved.familiarity)
        weights = _softmax(mixed, temperature)
        weights = _scaled({name: weight for name, weight in weights.items() if weight >= _LEAST_WEIGHT})
    else:
        lending = [task for task in retrieved.tasks if task.adapters][:top_k]
        scores = [
            (task.adapters[0], math.log(max(task.probability, 1e-30)) if config.rerank else task.score)
            for task in lending
        ]
        weights = _softmax(scores, temperature)
    mixture = tuple(
        AdapterWeight(name, versions[name], weight, name in composed)
        for name, weight in sorted(weights.items(), key=lambda item: -item[1])
        if weight
    )
    alone = retrieved.shown is not None and bool(retrieved.shown.turns) and retrieved.shown.by == "base"
    return RoutingDecision(
        catalog_version,
        tuple([TaskScore(name, score, probability) for name, score, _, probability, _ in tasks]),
        () if alone else mixture,
        retrieved.confidence,
        constrain=options.constrain,
        answers=retrieved.tasks[0].answers if options.constrain and retrieved.tasks and not stranger else None,
        by_states=retrieved.by_states,
        shown=retrieved.shown,
        unshown=mixture if alone else (),
        seconds={} if seconds is None else seconds,
    )


def _softmax(scores: Sequence[tuple[str, float]], temperature: float) -> dict[str, float]:
    """The softmax of scores; those of one name are added up."""
    weights: dict[str, float] = {}
    if scores:
        best = max([score for _, score in scores])
        shares = [math.exp((score - best) / temperature) for _, score in scores]
        total = sum(shares)
        for (name, _), share in zip(scores, shares, strict=True):
            weights[name] = weights.get(name, 0.0) + share / total
    return weights


def _scaled(weights: dict[str, float]) -> dict[str, float]:
    """The same in sum 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
