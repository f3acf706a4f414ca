"""Retrieval: the catalog's tasks nearest to a query, reranked, and what each adapter is worth for it.

Knows the catalog, its index, its reranker and its scores; knows nothing of encoders, and does not weigh
adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorauter.catalog.catalog import Catalog
from lorauter.catalog.index import TaskSubset
from lorauter.catalog.rerank import Candidates, Ranking, softmax
from lorauter.catalog.whitening import States, Whitening
from lorauter.encoder import Embeddings
from lorauter.errors import InvalidRequest
from lorauter.routing.asked import Asked
from lorauter.routing.examples import Shelf, Shown
from lorauter.routing.options import RoutingConfig, RoutingOptions
from lorauter.routing.worth import Floats, KnownTask, Scored, Worths
from lorauter.states import StateModel
from lorauter.tasks import Answers

_COSINE_LOGIT = 20.0  # a logit is that many cosines where tasks are not reranked
# Which task's adapters serve an unknown task is told by its states and its words, and by words alone where states are
# not known: of thirteen similarities that were fitted to the scores of tasks that were left out, no other helped.
_KINDRED_LOGIT = 50.0  # a logit is that many cosines of words
_KINDRED_STATES_LOGIT = 40.0  # or similarities of states, and then of words
_KINDRED_STATES_WORDS_LOGIT = 15.0
_SELECTED_TASKS = 8  # likeliest tasks whose single examples are looked at
_MAX_ADAPTERS = 64
_KNOWN = 10_000  # tasks that are remembered as they were looked up
_KNOWN_OPTIONS = 256  # options of which it is remembered what they come to
_KNOWN_BYTES = 1 << 25  # that these may take
_KNOWN_USABLE = 1000  # tasks of which it is remembered what some options may use
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


_new_task: Callable[[tuple[Any, ...]], RetrievedTask] = partial(tuple.__new__, RetrievedTask)
_new_adapter: Callable[[tuple[str, float]], AdapterUtility] = partial(tuple.__new__, AdapterUtility)
"""In a third of the time: a query has dozens of them."""


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
        return self.familiarity * self.tasks[0].probability if self.tasks else 0.0

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
        self._asked: dict[RoutingOptions, Asked] = {}
        self._asked_bytes = 0
        self._known: dict[int, KnownTask] = {}
        self._free: dict[int, tuple[str, ...]] = {}  # what may be used of a task where any adapter may
        self._scored: dict[int, Scored | None] = {}
        self._lenders: dict[Hashable, TaskSubset] = {}
        self._whitenings: dict[Hashable, Whitening] = {}
        self._shelves: dict[int, Shelf] = {}

    @cached_property
    def _whole(self) -> tuple[Candidates, Worths]:
        """All tasks: of a catalog that has no more than a query is judged by."""
        places = range(len(self.catalog))
        return self._reranker.knowing(self.catalog.candidates(np.arange(len(places)))), self._worths(places)

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
        configs = (self._of(option).config for option in options)
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
        """What there is for n queries; for each the same to the last bit, whatever the others are.

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
        results = [Retrieved()] * len(options)
        asked = [self._of(option) for option in options]
        stateful: list[bool] = [False] * len(options)
        if states is not None:
            stateful = [bool(np.isfinite(state).all()) for state in states]
        lots: dict[int | None, tuple[list[int], Whitening | None]] = {}  # by what their states are compared under
        searched: dict[tuple[int, int], list[int]] = {}  # by the tasks that are searched, and how many are looked for
        for i, (one, has_state) in enumerate(zip(asked, stateful, strict=True)):
            if not one.whole:
                searched.setdefault((id(one.subset), one.wanted + len(one.excluded)), []).append(i)
            elif one.any:
                whitening = self._whitening(one) if has_state else None
                lots.setdefault(id(whitening) if has_state else None, ([], whitening))[0].append(i)
        for lot, whitening in lots.values():
            own = states[lot] if states is not None and stateful[lot[0]] else None
            judged = self._judged_whole(
                embeddings[lot], [texts[i] for i in lot], [asked[i] for i in lot], own, whitening
            )
            for i, found in zip(lot, judged, strict=True):
                results[i] = found
        for (_, depth), together in searched.items():  # which of equals are found hangs on the depth
            rows = self._index.search(embeddings[together], depth, asked[together[0]].subset)
            for i, row in zip(together, rows.tolist(), strict=True):
                # As many whatever is excluded and whoever shares the batch.
                one, query = asked[i], (embeddings[i : i + 1], [texts[i]])
                places = [place for place in row if place >= 0 and place not in one.excluded][: one.wanted]
                own = states[i : i + 1] if states is not None and stateful[i] else None
                results[i] = self._judged_some(*query, places, one, own)
                if not self._filled(results[i], one):
                    lenders = self._nearest_lenders(query[0], one)
                    more = self._as_many_as_needed(places, (p for p in lenders if p not in one.excluded), one)
                    if more:
                        results[i] = self._judged_some(*query, [*places, *more], one, own)
        return results

    def _of(self, options: RoutingOptions) -> Asked:
        """What options come to here."""

        known = self._asked.get(options)
        if known is None:
            self._asked_bytes += options.nbytes
            if len(self._asked) >= _KNOWN_OPTIONS or self._asked_bytes > _KNOWN_BYTES:
                self._asked.clear()
                self._lenders.clear()
                self._asked_bytes = options.nbytes
            known = self._asked[options] = Asked.of(options, self.catalog, self.config)
            if options.allows_all:
                known.usable = self._free
        return known

    def _nearest_lenders(self, embedding: Embeddings, asked: Asked) -> list[int]:
        """The nearest tasks that have an adapter which may be used."""
        options = asked.options
        lenders = _remembered(self._lenders, _KNOWN_LENDERS, options.adapters_key, lambda: self._serving(asked))
        depth = asked.wanted + asked.top_k + len(asked.excluded)
        row: list[int] = self._index.search(embedding, depth, lenders)[0].tolist()
        return [place for place in row if place >= 0]

    def _serving(self, asked: Asked) -> TaskSubset:
        mask = self.catalog.served_by(asked.options.allows)
        return TaskSubset(mask if asked.subset is None else mask & asked.subset.mask)

    def _as_many_as_needed(self, places: list[int], lenders: Iterable[int], asked: Asked) -> list[int]:
        """Of tasks that lend an adapter the first that are not among `places`, until there are adapters enough."""
        utility, needed = asked.config.composition == "utility", asked.top_k
        usable = [set(self._usable(place, asked)) for place in places]
        lent, adapters, more = sum(map(bool, usable)), set().union(*usable), list[int]()
        for place in lenders:
            if lent >= needed or (utility and len(adapters) >= needed):
                break
            if place not in places:
                more.append(place)
                lent += 1
                adapters.update(self._usable(place, asked))
        return more

    def _filled(self, result: Retrieved, asked: Asked) -> bool:
        """Whether there are adapters enough."""
        lending = sum(bool(task.adapters) for task in result.tasks) if self.catalog.adapters else asked.top_k
        if asked.config.composition == "utility":
            lending = max(lending, len(result.adapters))
        return lending >= asked.top_k

    def _whitening(self, asked: Asked) -> Whitening | None:
        """The states' without tasks that are not to be known; None where that is the catalog's own."""
        whitening = self._reranker.by_states.whitening if self._reranker.by_states is not None else None
        seen = self.catalog.sampled.intersection([self.catalog.names[place] for place in asked.excluded])
        if whitening is None or not seen:
            return None

        def make() -> Whitening:
            rows = [self.catalog.examples(place).states for place in sorted(self.catalog.places(list(seen)))]
            return whitening.without(np.concatenate([of for of in rows if of is not None]))

        return _remembered(self._whitenings, _KNOWN_WHITENINGS, seen, make)

    def _judged_whole(
        self,
        embeddings: Embeddings,
        texts: Sequence[str],
        asked: Sequence[Asked],
        states: States | None,
        whitening: Whitening | None,
    ) -> list[Retrieved]:
        """What all tasks are to queries, but for those that a query may not be of."""
        (candidates, worths), among = self._whole, None
        if any(one.among is not None for one in asked):
            every = np.ones(len(self.catalog), np.bool_)
            among = np.stack([every if one.among is None else one.among for one in asked])
        ranking = self._reranker.rank(embeddings, texts, candidates, None, states, whitening, among)
        return self._judged(embeddings, ranking, worths, asked, among)

    def _judged_some(
        self, embedding: Embeddings, text: Sequence[str], places: Sequence[int], asked: Asked, state: States | None
    ) -> Retrieved:
        """What some tasks are to a query."""
        if not places:
            return Retrieved()
        at = np.array(places, np.int64)
        whitening = None if state is None else self._whitening(asked)
        ranking = self._reranker.rank(embedding, text, self.catalog.candidates(at), self._norms[at], state, whitening)
        return self._judged(embedding, ranking, self._worths(places), [asked])[0]

    def _judged(
        self,
        embeddings: Embeddings,
        ranking: Ranking,
        worths: Worths,
        asked: Sequence[Asked],
        among: NDArray[np.bool_] | None = None,
    ) -> list[Retrieved]:
        """What tasks are to n queries, by how they rank; `among` (n, c) is which of them a query may be of."""
        logits, every = ranking.logits, np.arange(len(asked))[:, None]
        if plain := [i for i, one in enumerate(asked) if not one.config.rerank]:
            by_cosines = _COSINE_LOGIT * ranking.cosines[plain]
            logits = logits.copy()
            logits[plain] = by_cosines if among is None else np.where(among[plain], by_cosines, -np.inf)
        chances, order = softmax(logits), np.argsort(-logits, axis=1, kind="stable")
        own, kindred = _chances(ranking, chances, plain, among)
        utilities = self._utilities(embeddings, worths, order, own, kindred, asked)
        counts = [logits.shape[1]] * len(asked) if among is None else among.sum(axis=1).tolist()
        columns = (of.tolist() for of in (order, ranking.cosines[every, order], chances[every, order]))
        about = zip(ranking.familiarity.tolist(), ranking.stranger.tolist(), strict=True)
        by_states = ranking.states is not None
        return [
            Retrieved(
                self._tasks(worths, one, nths[:count], scores, probabilities),
                useful,
                familiarity,
                stranger,
                by_states,
                self._shown(embedding, worths, nths[0], familiarity * probabilities[0], one),
            )
            for one, embedding, useful, count, nths, scores, probabilities, (familiarity, stranger) in zip(
                asked, embeddings, utilities, counts, *columns, about, strict=True
            )
        ]

    def _tasks(
        self, worths: Worths, asked: Asked, order: Sequence[int], scores: Sequence[float], chances: Sequence[float]
    ) -> tuple[RetrievedTask, ...]:
        """As many of a query's tasks as it asks for, and that lend an adapter."""
        places, num_tasks, top_k, usable = worths.places, asked.config.num_tasks, asked.top_k, asked.usable
        tasks: list[RetrievedTask] = []
        lent = count = 0
        for nth, score, chance in zip(order, scores, chances, strict=False):
            if count >= num_tasks and lent >= top_k:
                break
            adapters = usable.get(places[nth])
            if adapters is None:
                adapters = self._usable(places[nth], asked)
            if adapters:
                lent += 1
            elif count >= num_tasks:
                continue
            known = worths.tasks[nth]
            tasks.append(_new_task((known.task, score, adapters, chance, known.answers)))
            count += 1
        return tuple(tasks)

    def _shown(
        self, embedding: Embeddings, worths: Worths, first: int, confidence: float, asked: Asked
    ) -> Shown | None:
        """The first task's examples that go before a query; None where there is nothing to say of them.

        Raises:
            CatalogError, StoreError: they cannot be read.
        """
        config, options = asked.config, asked.options
        look, place = worths.tasks[first], worths.places[first]
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
        embeddings: Embeddings,
        worths: Worths,
        order: NDArray[np.int64],
        own: Floats,
        kindred: Floats,
        asked: Sequence[Asked],
    ) -> list[tuple[AdapterUtility, ...]]:
        """What the adapters are worth that each query may use."""
        totals = worths.expected(own, kindred)
        if self.config.selection == "similar":
            for n, tasks in enumerate(order[:, :_SELECTED_TASKS].tolist()):
                for task in tasks:
                    if (scored := self._scores(place := worths.places[task])) is not None:
                        by = scored.nearby(self.catalog.examples(place).embeddings, embeddings[n])
                        worths.correct(totals[n], task, own[n, task], kindred[n, task], by)
        for total, one in zip(totals, asked, strict=True):
            if not one.options.allows_all:
                total[~self._allowed(worths, one)] = 0.0
        columns = np.argsort(-totals, axis=1, kind="stable")  # equals in the order of their names
        values, counts = totals[np.arange(len(totals))[:, None], columns], (totals > 0).sum(axis=1)
        found = []
        for nths, value, count in zip(columns.tolist(), values.tolist(), counts.tolist(), strict=True):
            useful: Iterable[tuple[str, float]] = zip([worths.names[nth] for nth in nths[:count]], value, strict=False)
            if self.catalog.copies:
                by_name = dict(useful)
                useful = ((name, by_name[name]) for name in self._distinct(tuple(by_name)))
            found.append(tuple(map(_new_adapter, islice(useful, _MAX_ADAPTERS))))
        return found

    def _allowed(self, worths: Worths, asked: Asked) -> NDArray[np.bool_]:
        if not asked.whole:
            return asked.allows(worths.names)
        if asked.allowed is None:
            asked.allowed = asked.allows(worths.names)
        return asked.allowed

    def _scores(self, place: int) -> Scored | None:
        return _remembered(self._scored, _KNOWN, place, lambda: Scored.of(self.catalog.tasks[place]))

    def _worths(self, places: Sequence[int]) -> Worths:
        return Worths(places, [self._look(place) for place in places], self.catalog.composed)

    def _look(self, place: int) -> KnownTask:
        known = self._known.get(place)
        return known if known is not None else _remembered(self._known, _KNOWN, place, lambda: self._looked(place))

    def _looked(self, place: int) -> KnownTask:
        return KnownTask.of(*self.catalog.at(place), self.catalog.composed)

    def _usable(self, place: int, asked: Asked) -> tuple[str, ...]:
        """A task's adapters that may be used."""

        def make() -> tuple[str, ...]:
            names = self._look(place).names
            return self._distinct(names if asked.options.allows_all else tuple(filter(asked.options.allows, names)))

        most = _KNOWN if asked.options.allows_all else _KNOWN_USABLE
        return _remembered(asked.usable, most, place, make)

    def _distinct(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Of those that compute the same one: that which was tried, if it is among them."""
        copies, chosen = self.catalog.copies, dict[str, str]()
        if not copies:
            return names
        for name in names:
            of = copies.get(name)
            if of is not None and (of not in chosen or name == of):
                chosen[of] = name
        return tuple(name for name in names if name not in copies or chosen[copies[name]] == name)


def _remembered(known: dict[Key, Value], most: int, key: Key, make: Callable[[], Value]) -> Value:
    """What a key stands for; of what was made, so much is remembered."""
    if key not in known:
        if len(known) >= most:
            known.clear()
        known[key] = make()
    return known[key]


def _chances(
    ranking: Ranking, own: Floats, plain: Sequence[int], among: NDArray[np.bool_] | None
) -> tuple[Floats, Floats]:
    """Of each query and candidate, the probability that its adapters are those to use: as the query is one of it
    (`own`, if it is one of any), and as it is one of a task that the catalog lacks and that is most like it, which
    `plain` ones are not; `among` (n, c) is which of them a query may be of."""
    if ranking.states is None:
        kindred = _KINDRED_LOGIT * ranking.words
    else:
        kindred = _KINDRED_STATES_LOGIT * ranking.states + _KINDRED_STATES_WORDS_LOGIT * ranking.words
    if among is not None:
        kindred = np.where(among, kindred, -np.inf)
    familiarity = ranking.familiarity[:, None]
    if plain:
        familiarity = familiarity.copy()
        familiarity[plain] = 1.0
    return familiarity * own, (1 - familiarity) * softmax(kindred)
