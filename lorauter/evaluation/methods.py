"""Deciding: which adapters each method answers each query of each regime with. Rows for the answering step.

Knows catalogs, embeddings and routing; generates nothing, and knows no model.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorauter.catalog.catalog import Catalog
from lorauter.catalog.change import with_shown
from lorauter.encoder import Encoder
from lorauter.errors import ConfigError
from lorauter.evaluation.composing import ComposedFor, barred_in, with_composed
from lorauter.evaluation.helped import Helped
from lorauter.evaluation.regimes import REGIMES, options_for
from lorauter.evaluation.report import ORACLE
from lorauter.evaluation.rows import example_row
from lorauter.evaluation.weighing import Weights, weights_for
from lorauter.routing import Retriever, RoutingConfig, RoutingOptions, compose
from lorauter.states import RememberingStates, StateModel
from lorauter.tasks import Task
from lorauter.turns import ExampleTurns

LORA_RETRIEVER = {"loraretriever-selection": 1, "loraretriever-fusion": 3, "loraretriever-mixture": 3}
"""How many adapters each takes (ACL 2024 Findings): the nearest, some fused, the mean of some outputs."""

METHODS = ("base", ORACLE, "random", "uniform", *LORA_RETRIEVER, "arrow", "spectr", "paper", "default")
"""What needs no settings; "paper" and "default" are the router's presets."""

LORAHUB = "lorahub"
"""Needs the weights of `lorauter.evaluation.weighing`."""

COMPOSED = "default+composed"
"""The preset "default" with what was composed for each task, by `lorauter.evaluation.composing`."""

EXAMPLES, COMPOSED_EXAMPLES = "default+examples", "default+composed+examples"
"""The same, without and with compositions, after the examples of tasks that these help, by
`lorauter.evaluation.left_out`."""

_OF_CATALOGS = (COMPOSED, EXAMPLES, COMPOSED_EXAMPLES)  # that each regime has of its own
MIXING = {"loraretriever-fusion": "matrices", "arrow": "arrow", "spectr": "spectr"}
"""How methods mix adapters that do not mix their outputs by weights: of `lorauter.evaluation.rows.MIXINGS`."""

_MAX_TOKENS = 256


def decide(
    tasks: Sequence[Task],
    catalog: Catalog,
    encoder: Encoder,
    methods: Mapping[str, RoutingConfig | None],
    *,
    states: StateModel | None = None,
    regimes: Collection[str] = REGIMES,
    split: str = "test",
    own: Mapping[str, Collection[str]] | None = None,
    lorahub: Weights | None = None,
    composed: Sequence[ComposedFor] | None = None,
    helped: Helped | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for every method, regime and query, as `lorauter.evaluation.rows` reads them.

    Args:
        tasks: whose queries are asked; all are in the catalog.
        catalog: what is routed on.
        encoder: the catalog's own.
        states: likewise, if it has states; without it they are not looked at.
        methods: names of METHODS, or of one's own with the settings of a router. The base model and the oracle have
            one regime.
        regimes: which of REGIMES.
        split: "test", or "validation": the examples of a task file that the catalog does not have.
        own: adapters of each task that the regimes take away; by default the one of its name.
        lorahub: the weights of the method LORAHUB.
        composed: the compositions of the methods COMPOSED and COMPOSED_EXAMPLES.
        helped: which tasks examples help, for the methods that show them.

    Raises:
        ConfigError: a method or task is unknown, or has no LoraHub weights.
    """
    held = {entry.name: entry.task for entry in catalog.tasks}
    for task in tasks:
        if task.name not in held:
            raise ConfigError(f"task {task.name!r} is not in the catalog; build it from the same tasks")
    for name, config in methods.items():
        if config is None and name not in (*METHODS, LORAHUB, *_OF_CATALOGS):
            known = ", ".join((*METHODS, LORAHUB, *_OF_CATALOGS))
            raise ConfigError(f"method {name!r} is none of {known}; give it routing settings")
    owned = own or {task.name: [task.name] for task in tasks}
    of_regimes = {
        name: _of_regimes(
            catalog,
            () if name == EXAMPLES else composed or (),
            owned,
            None if name == COMPOSED else helped or {},
        )
        for name in methods
        if name in _OF_CATALOGS
    }
    retrievers = {name: Retriever(catalog, config) for name, config in _configs(methods).items()}
    reader = None if states is None else RememberingStates(states)
    for task in tasks:
        seen = {example.input for example in held[task.name].validation}
        asked_of = task.test if split == "test" else [e for e in task.validation if e.input not in seen]
        texts = [example.input for example in asked_of]
        if not texts:
            continue
        embeddings = encoder.encode(texts)
        longest = max(len(example.target) for example in held[task.name].validation)
        for regime in regimes:
            options = options_for(regime, task.name, owned[task.name])
            for method in methods:
                if method in ("base", ORACLE) and regime != REGIMES[0]:
                    continue
                examples: Sequence[Sequence[ExampleTurns]] = [()] * len(texts)
                if method in retrievers or method in of_regimes:
                    retriever, asked = retrievers.get(method), options
                    if retriever is None:
                        retriever = of_regimes[method][regime]
                        away = barred_in(regime, retriever.catalog, owned)[task.name]
                        asked = options.model_copy(update={"exclude_adapters": options.exclude_adapters.union(away)})
                    found = retriever.retrieve_with(reader, embeddings, texts, [asked] * len(texts))
                    decisions = [
                        compose(f, asked, retriever.config, catalog_version="", versions=retriever.catalog.adapters)
                        for f in found
                    ]
                    examples = [decision.examples for decision in decisions]
                    mixtures: Iterable[dict[str, float]] = [
                        {adapter.name: adapter.weight for adapter in decision.adapters} for decision in decisions
                    ]
                elif method == LORAHUB:
                    mixtures = [weights_for(lorahub or {}, task.name, with_own=regime == REGIMES[0])] * len(texts)
                else:
                    mixtures = _fixed(method, catalog, embeddings, options, task.name, owned[task.name], len(texts))
                for i, (example, mixture, shown) in enumerate(zip(asked_of, mixtures, examples, strict=True)):
                    row = {
                        "input": example.input,
                        "adapters": mixture,
                        # A token is a character at least, and two in most; longer answers are wrong ones.
                        "max_tokens": min(_MAX_TOKENS, math.ceil(longest / 2) + 8),
                        "mixing": MIXING.get(method, "outputs"),
                        **({"examples": list(map(example_row, shown))} if shown else {}),
                    }
                    digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:8]
                    yield {
                        "id": f"{method}/{regime}/{task.name}/{i}/{digest}",
                        **row,
                        "method": method,
                        "regime": regime,
                        "task": task.name,
                        "domain": task.domain,
                        "metric": task.metric,
                        "target": example.target,
                    }


def _of_regimes(
    catalog: Catalog,
    composed: Sequence[ComposedFor],
    own: Mapping[str, Collection[str]],
    helped: Helped | None,
) -> dict[str, Retriever]:
    """Of each regime the router, on a catalog of its own; it shows examples where it is known which tasks they help."""
    catalogs = {REGIMES[2]: catalog, **with_composed(catalog, composed, own)}
    if helped is None:
        return {regime: Retriever(of, RoutingConfig(examples=0)) for regime, of in catalogs.items()}
    # To an unknown task others are as they are where nothing is taken away.
    shown = {regime: helped.get(regime, helped.get(REGIMES[0], {})) for regime in catalogs}
    return {regime: Retriever(with_shown(of, shown[regime]), RoutingConfig()) for regime, of in catalogs.items()}


def _configs(methods: Mapping[str, RoutingConfig | None]) -> dict[str, RoutingConfig]:
    presets = {name: RoutingConfig(preset=name) for name in ("paper", "default")}
    return {name: config or presets[name] for name, config in methods.items() if config or name in presets}


def _fixed(
    method: str,
    catalog: Catalog,
    embeddings: Any,
    options: RoutingOptions,
    task: str,
    own: Collection[str],
    count: int,
) -> Iterable[dict[str, float]]:
    """The mixtures of the methods that are not routers."""
    allowed = [name for name in sorted(catalog.adapters) if options.allows(name)]
    if method == "base" or not allowed:
        return [{}] * count
    if method == ORACLE:
        return [{name: 1 / len(own) for name in own}] * count
    if method in ("uniform", "arrow", "spectr"):  # the tokens choose among all
        return [{name: 1 / len(allowed) for name in allowed}] * count
    if method == "random":
        draw = random.Random(f"{task} {options}")
        return [{draw.choice(allowed): 1.0} for _ in range(count)]
    # LoraRetriever embeds adapters by samples of what they were trained on: here, of the task of their name.
    names = [name for name in catalog.names if name in allowed]
    rows = [place for place, name in enumerate(catalog.names) if name in allowed]
    top = (-(embeddings @ catalog.centroids_at(rows).T)).argsort(axis=1, kind="stable")[:, : LORA_RETRIEVER[method]]
    return [{names[i]: 1 / len(row) for i in row} for row in top]
