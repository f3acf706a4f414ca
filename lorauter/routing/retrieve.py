"""Retrieval: the catalog's tasks nearest to a query, reranked, and what each adapter is worth for it.

Knows the catalog, its index, its reranker and its scores; knows nothing of encoders, and does not weigh
adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorauter.catalog.catalog import Catalog, CatalogTask
from lorauter.catalog.index import TaskSubset
from lorauter.catalog.rerank import Candidates, Ranking, softmax
from lorauter.catalog.segments import Segment
from lorauter.catalog.shown import ShownExamples
from lorauter.catalog.utility import COMPOSED, PRIOR_EXAMPLES, best_score, worths
from lorauter.catalog.whitening import States, Whitening
from lorauter.encoder import Embeddings
from lorauter.errors import InvalidRequest
from lorauter.routing.examples import Shelf, Shown
from lorauter.routing.options import RoutingConfig, RoutingOptions
from lorauter.states import StateModel
from lorauter.tasks import Answers

_COSINE_LOGIT = 20.0  # a logit is that many cosines where tasks are not reranked
# Which task's adapters serve an unknown task is told by its states and its words, and by words alone where states are
# not known: of thirteen similarities that were fitted to the scores of tasks that were left out, no other helped.
_KINDRED_LOGIT = 50.0  # a logit is that many cosines of words
_KINDRED_STATES_LOGIT = 40.0  # or similarities of states, and then of words
_KINDRED_STATES_WORDS_LOGIT = 15.0
_OWN = 0.5  # how much more what was made for a task is worth where a query is of it: scores are few, and noisy
_NEIGHBOUR_TEMPERATURE = 0.2  # of the cosines that make a task's examples a query's neighbours
_SELECTED_TASKS = 8  # likeliest tasks whose single examples are looked at
_MAX_ADAPTERS = 64
_KNOWN = 10_000  # tasks that are remembered as they were looked up
_KNOWN_LENDERS = 256  # sets of adapters, of which it is remembered whom they serve
_KNOWN_WHITENINGS = 64  # sets of tasks that were taken out of the whitening
_KNOWN_SHELVES = 1000  # tasks whose examples are at hand

Key = TypeVar("Key")
Value = TypeVar("Value")


class RetrievedTask(NamedTuple):
    """A task near a query.

    Attributes:
        score: cosine similarity.
        adapters: that may serve it here, the best first.
        probability: that the query is one of it, if it is one of any.
        answers: its answers, if they are known.
    """

    name: str
    score: float
    adapters: tuple[str, ...]
    probability: float = 0.0
    answers: Answers | None = None


class AdapterUtility(NamedTuple):
    """What an adapter is expected to be worth, as `lorauter.catalog.utility.worths` counts it."""

    name: str
    utility: float


@dataclass(frozen=True)
class Retrieved:
    """What was found for one query.

    Attributes:
        tasks: the likeliest first.
        adapters: those that may be used here, the most useful first; none of no use.
        familiarity: the probability that the query is one of any of the catalog's tasks.
        stranger: whether it is stranger than nearly every query of a task that the catalog lacks.
        by_states: whether its state was looked at.
        shown: the first task's examples that go before it, or why none; None where none were asked for.
    """

    tasks: tuple[RetrievedTask, ...] = ()
    adapters: tuple[AdapterUtility, ...] = ()
    familiarity: float = 0.0
    stranger: bool = False
    by_states: bool = False
    shown: Shown | None = None

    @property
    def confidence(self) -> float:
        """The probability that the query is one of the first task."""
        return self.familiarity * max((task.probability for task in self.tasks), default=0.0)

    @property
    def adapter_names(self) -> set[str]:
        """All adapters that are named in it."""
        return {name for task in self.tasks for name in task.adapters} | {adapter.name for adapter in self.adapters}


class Retriever:
    """Searches one catalog."""

    def __init__(self, catalog: Catalog, config: RoutingConfig) -> None:
        self.catalog = catalog
        self.config = config
        self._index = catalog.index
        self._reranker = catalog.reranker
        self._norms = catalog.norms
        self._all = range(len(catalog))
        self._known: dict[int, _Known] = {}
        self._free: dict[int, tuple[str, ...]] = {}  # what may be used of a task where any adapter may
        self._matrices: dict[int, Any] = {}
        self._lenders: dict[Hashable, TaskSubset] = {}
        self._whitenings: dict[Hashable, Whitening] = {}
        self._shelves: dict[int, Shelf] = {}

    @cached_property
    def _whole(self) -> Candidates:
        """All tasks: of a catalog that has no more than a query is judged by."""
        return self._reranker.knowing(self.catalog.candidates(np.arange(len(self.catalog))))

    def retrieve_with(
        self,
        states: StateModel | None,
        embeddings: Embeddings,
        texts: Sequence[str],
        options: Sequence[RoutingOptions],
    ) -> list[Retrieved]:
        """The same as `retrieve`, and then once more with the states of those queries of which it is not sure."""
        found = self.retrieve(embeddings, texts, options)
        if states is not None and (unsure := self.unsure(found, options)):
            asked = states.states([texts[i] for i in unsure])
            again = self.retrieve(embeddings[unsure], [texts[i] for i in unsure], [options[i] for i in unsure], asked)
            for i, other in zip(unsure, again, strict=True):
                found[i] = other
        return found

    def unsure(self, found: Sequence[Retrieved], options: Sequence[RoutingOptions]) -> list[int]:
        """Which of the queries should be retrieved for once more, with their states."""
        if self.catalog.states is None:
            return []
        configs = [self.config.asked(option) for option in options]
        return [
            i
            for i, (one, config) in enumerate(zip(found, configs, strict=True))
            if config.rerank and one.tasks and (config.sure == 1 or one.confidence < config.sure)
        ]

    def retrieve(
        self,
        embeddings: Embeddings,
        texts: Sequence[str],
        options: Sequence[RoutingOptions],
        states: States | None = None,
    ) -> list[Retrieved]:
        """What there is for n queries.

        At least `num_tasks` tasks each, as far as there are; where they have not `top_k` adapters that may be used,
        the nearest tasks too that lend one.

        Args:
            embeddings: (n, d) float32, unit rows.
            texts: n of them.
            options: n of them.
            states: (n, layers, width), of a catalog that has states; NaN where a text has none.

        Raises:
            InvalidRequest: the embeddings have another dimension than the catalog, or NaN, or the states another shape.
            CatalogError, StoreError: examples of tasks that are excluded cannot be read, for the states.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.catalog.dimension:
            raise InvalidRequest(
                f"embeddings of shape {embeddings.shape} do not fit the catalog's dimension {self.catalog.dimension}"
            )
        if not np.isfinite(embeddings).all():
            raise InvalidRequest("the embeddings hold NaN or infinity")
        if states is not None and (self.catalog.states is None or states.shape[1:] != self.catalog.states.probe.shape):
            raise InvalidRequest(f"states of shape {states.shape} do not fit the catalog's")
        own = [None if states is None or not np.isfinite(states[i]).all() else states[i] for i in range(len(options))]
        results = [Retrieved()] * len(options)
        subsets = [option.among(self.catalog) for option in options]
        wanted = [self._wanted(option) for option in options]
        excluded = [{place for n in o.exclude_tasks if (place := self.catalog.place(n)) is not None} for o in options]
        alike: dict[int, list[int]] = {}
        for i, subset in enumerate(subsets):
            if subset is None and not excluded[i] and wanted[i] >= len(self.catalog):  # all there are, and no others
                results[i] = self._judge(embeddings[i], texts[i], self._all, options[i], own[i])
            else:
                alike.setdefault(id(subset), []).append(i)
        for together in alike.values():
            depth = max(wanted[i] + len(excluded[i]) for i in together)
            found = self._index.search(embeddings[together], depth, subsets[together[0]])
            for i, row in zip(together, found, strict=True):
                # As many whatever is excluded and whoever shares the batch.
                places = [place for place in row.tolist() if place >= 0 and place not in excluded[i]][: wanted[i]]
                results[i] = self._judge(embeddings[i], texts[i], places, options[i], own[i])
                if not self._filled(results[i], options[i]):
                    lenders = self._nearest_lenders(embeddings[i], subsets[i], options[i])
                    more = self._as_many_as_needed(places, (p for p in lenders if p not in excluded[i]), options[i])
                    if more:
                        results[i] = self._judge(embeddings[i], texts[i], [*places, *more], options[i], own[i])
        return results

    def _nearest_lenders(self, embedding: Embeddings, subset: TaskSubset | None, options: RoutingOptions) -> list[int]:
        """The nearest tasks that have an adapter which may be used."""
        lenders = _remembered(
            self._lenders, _KNOWN_LENDERS, options.adapters_key, lambda: self._serving(options, subset)
        )
        depth = self._wanted(options) + self._top_k(options) + len(options.exclude_tasks)
        row: list[int] = self._index.search(embedding[None], depth, lenders)[0].tolist()
        return [place for place in row if place >= 0]

    def _as_many_as_needed(self, places: list[int], lenders: Iterable[int], options: RoutingOptions) -> list[int]:
        """Of tasks that lend an adapter the first that are not among `places`, until there are adapters enough."""
        utility, needed = self.config.asked(options).composition == "utility", self._top_k(options)
        usable = [set(self._usable(place, options)) for place in places]
        lent, adapters, more = sum(map(bool, usable)), set().union(*usable), list[int]()
        for place in lenders:
            if lent >= needed or (utility and len(adapters) >= needed):
                break
            if place not in places:
                more.append(place)
                lent += 1
                adapters.update(self._usable(place, options))
        return more

    def _wanted(self, options: RoutingOptions) -> int:
        config = self.config.asked(options)
        return max(config.num_tasks, config.candidates * config.rerank, self._top_k(options))

    def _top_k(self, options: RoutingOptions) -> int:
        return options.top_k or self.config.asked(options).top_k

    def _filled(self, result: Retrieved, options: RoutingOptions) -> bool:
        """Whether there are adapters enough."""
        lending = sum(bool(task.adapters) for task in result.tasks) if self.catalog.adapters else self._top_k(options)
        if self.config.asked(options).composition == "utility":
            lending = max(lending, len(result.adapters))
        return lending >= self._top_k(options)

    def _whitening(self, excluded: Collection[str]) -> Whitening | None:
        """The states' without tasks that are not to be known; None where that is the catalog's own."""
        whitening = self._reranker.by_states.whitening if self._reranker.by_states is not None else None
        seen = frozenset(self.catalog.sampled.intersection(excluded))
        if whitening is None or not seen:
            return None

        def make() -> Whitening:
            rows = [self.catalog.examples(place).states for place in sorted(self.catalog.places(list(seen)))]
            return whitening.without(np.concatenate([of for of in rows if of is not None]))

        return _remembered(self._whitenings, _KNOWN_WHITENINGS, seen, make)

    def _judge(
        self, embedding: Embeddings, text: str, found: Sequence[int], options: RoutingOptions, state: States | None
    ) -> Retrieved:
        if not found:
            return Retrieved()
        places = np.array(found, np.int64)
        whitening = None if state is None else self._whitening(options.exclude_tasks)
        if found is self._all:
            ranking = self._reranker.rank(embedding, text, self._whole, None, state, whitening)
        else:
            candidates, norms = self.catalog.candidates(places), self._norms[places]
            ranking = self._reranker.rank(embedding, text, candidates, norms, state, whitening)
        config, top_k = self.config.asked(options), self._top_k(options)
        logits = ranking.logits if config.rerank else _COSINE_LOGIT * ranking.cosines
        order = np.argsort(-logits, kind="stable")
        chances = softmax(logits)
        own, kindred = (of[order] for of in _chances(ranking, logits, chances, config))
        places = places[order]
        tasks: list[RetrievedTask] = []
        lent = 0
        ranked = zip(places.tolist(), ranking.cosines[order].tolist(), chances[order].tolist(), strict=True)
        for place, score, probability in ranked:
            if len(tasks) >= config.num_tasks and lent >= top_k:
                break
            adapters = self._usable(place, options)
            if len(tasks) < config.num_tasks or adapters:
                known = self._look(place)
                tasks.append(RetrievedTask(known.task, score, adapters, probability, known.answers))
                lent += bool(adapters)
        return Retrieved(
            tuple(tasks),
            self._utilities(embedding, places, own, kindred, options),
            ranking.familiarity,
            ranking.stranger,
            ranking.states is not None,
            self._shown(embedding, int(places[0]), ranking.familiarity * float(chances.max()), options),
        )

    def _shown(self, embedding: Embeddings, place: int, confidence: float, options: RoutingOptions) -> Shown | None:
        """The first task's examples that go before a query; None where there is nothing to say of them.

        Raises:
            CatalogError, StoreError: they cannot be read.
        """
        config = self.config.asked(options)
        look = self._look(place)
        known = look.shown
        count = config.examples if options.examples is None else options.examples
        if count is None:
            count = 0 if known is None else known.count
        if not count:
            return None
        if confidence < config.examples_sure:
            return Shown(why="unsure")
        if not options.may_show(look.declared or (look.task,)):
            return Shown(why="not_yours")
        help = None if known is None else known.help(own=any(map(options.allows, look.declared)))
        if known is None or help is None:
            return Shown(why="unchecked")
        if help.by is None:
            return Shown(why="no_help")
        shelf = _remembered(self._shelves, _KNOWN_SHELVES, place, lambda: Shelf.of(self.catalog, place))
        turns = shelf.nearest(embedding, count, known.tokens, config.examples_tokens)
        return Shown(turns, help.by) if turns else Shown(why="too_long")

    def _utilities(
        self,
        embedding: Embeddings,
        places: NDArray[np.int64],
        own: NDArray[np.float64],
        kindred: NDArray[np.float64],
        options: RoutingOptions,
    ) -> tuple[AdapterUtility, ...]:
        """Each adapter's worth for a task, times the chance of the task, summed.

        What was composed for a task is of use to that task alone: on unseen ones it does worse than what it is of.
        """
        totals: dict[str, float] = {}
        composed, nearby = self.catalog.composed, self.config.selection == "similar"
        chances = zip(places.tolist(), own.tolist(), (own + kindred).tolist(), strict=True)
        for nth, (place, known, chance) in enumerate(chances):
            look = self._look(place)
            worth: Sequence[float] = look.worth
            if nearby and nth < _SELECTED_TASKS and self._scores(place) is not None:
                worth = self._worths_nearby(embedding, place).tolist()
            for name, value, more in zip(look.names, worth, look.more, strict=True):
                share = known if name in composed else chance
                totals[name] = totals.get(name, 0.0) + share * value + known * more
        useful = [AdapterUtility(name, total) for name, total in totals.items() if total > 0]
        allowed = useful if options.allows_all else [adapter for adapter in useful if options.allows(adapter.name)]
        one_of_each = set(self._distinct([adapter.name for adapter in allowed]))
        allowed = [adapter for adapter in allowed if adapter.name in one_of_each]
        allowed.sort(key=lambda item: (-item.utility, item.name))
        return tuple(allowed[:_MAX_ADAPTERS])

    def _worths_nearby(self, embedding: Embeddings, place: int) -> NDArray[np.float64]:
        """The worths of a task's adapters with more weight on examples that resemble the query.

        Of n examples that an adapter met, each counts by softmax(cosine / temperature) among them, in place of 1 / n.
        """
        values, tried, counts = self._scores(place)
        worth = self._look(place).worth
        examples = self.catalog.examples(place).embeddings
        nearness = np.exp((examples @ embedding - 1).astype(np.float64) / _NEIGHBOUR_TEMPERATURE)
        mass = tried @ nearness
        nearby = np.divide(values @ nearness, mass, out=np.zeros_like(mass), where=mass > 0)
        share = counts / (counts + PRIOR_EXAMPLES)
        means = np.divide(values.sum(axis=1), counts, out=np.zeros_like(mass), where=counts > 0)
        return np.asarray(worth + share * (nearby - means))

    def _look(self, place: int) -> _Known:
        known = self._known.get(place)
        return known if known is not None else _remembered(self._known, _KNOWN, place, lambda: self._looked(place))

    def _looked(self, place: int) -> _Known:
        return _known(*self.catalog.at(place), self.catalog.composed)

    def _usable(self, place: int, options: RoutingOptions) -> tuple[str, ...]:
        """A task's adapters that may be used."""
        if options.allows_all:
            return _remembered(self._free, _KNOWN, place, lambda: self._distinct(self._look(place).names))
        return self._distinct(tuple(filter(options.allows, self._look(place).names)))

    def _distinct(self, names: Sequence[str]) -> tuple[str, ...]:
        """Of those that compute the same one: that which was tried, if it is among them."""
        copies, chosen = self.catalog.copies, dict[str, str]()
        if not copies:
            return tuple(names)
        for name in names:
            of = copies.get(name)
            if of is not None and (of not in chosen or name == of):
                chosen[of] = name
        return tuple(name for name in names if name not in copies or chosen[copies[name]] == name)

    def _scores(self, place: int) -> Any:
        return _remembered(self._matrices, _KNOWN, place, lambda: _matrix(self.catalog.tasks[place]))

    def _serving(self, options: RoutingOptions, subset: TaskSubset | None) -> TaskSubset:
        mask = self.catalog.served_by(options.allows)
        return TaskSubset(mask if subset is None else mask & subset.mask)


class _Known(NamedTuple):
    """A task's name, its adapters, their worths and what they are worth more for a query that is of it; its answers, if
    they are known; the adapters that were made for it, and what its examples do, as a segment has them."""

    task: str
    names: tuple[str, ...]
    worth: tuple[float, ...]
    more: tuple[float, ...]
    answers: Answers | None
    declared: tuple[str, ...]
    shown: ShownExamples | None


def _known(segment: Segment, i: int, composed: Container[str]) -> _Known:
    """What was composed for a task has beaten the others that it ranks before, and takes nothing from them."""
    adapters, declared = segment.ranked(i)
    names = tuple(adapter.name for adapter in adapters)
    others = [i for i, name in enumerate(names) if name not in composed]
    found = worths([adapters[i].score for i in others], [declared[i] for i in others])
    best, first = found.max(initial=1.0), min(others, default=len(names))
    worth = np.where(np.arange(len(names)) < first, best + COMPOSED, best / 2)
    worth[others] = found
    more = np.where(np.arange(len(names)) < first, _OWN, 0.0)
    more[others] = [_OWN * declared[i] for i in others]
    return _Known(
        segment.names[i],
        names,
        tuple(worth.tolist()),
        tuple(more.tolist()),
        segment.answers(i),
        segment.declared(i),
        segment.shown(i),
    )


def _remembered(known: dict[Key, Value], most: int, key: Key, make: Callable[[], Value]) -> Value:
    """What a key stands for; of what was made, so much is remembered."""
    if key not in known:
        if len(known) >= most:
            known.clear()
        known[key] = make()
    return known[key]


def _matrix(entry: CatalogTask) -> Any:
    """Of a task's ranked adapters the scores by example relative to the best score, which were made, and how many;
    None without any."""
    if not entry.scores:
        return None
    values = np.zeros((len(entry.adapters), len(entry.task.validation)))
    tried = np.zeros(values.shape)
    for row, adapter in enumerate(entry.adapters):
        for example, score in entry.scores.get(adapter.name, {}).items():
            values[row, example], tried[row, example] = score, 1
    return values / best_score(adapter.score for adapter in entry.adapters), tried, tried.sum(axis=1)


def _chances(
    ranking: Ranking, logits: NDArray[np.float64], own: NDArray[np.float64], config: RoutingConfig
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each candidate, the probability that its adapters are those to use: as the query is one of it (`own`, if it is
    one of any), and as it is one of a task that the catalog lacks and that is most like it."""
    if not config.rerank:
        return own, np.zeros_like(own)
    if ranking.states is None:
        kindred = _KINDRED_LOGIT * ranking.words
    else:
        kindred = _KINDRED_STATES_LOGIT * ranking.states + _KINDRED_STATES_WORDS_LOGIT * ranking.words
    return ranking.familiarity * own, (1 - ranking.familiarity) * softmax(kindred)
