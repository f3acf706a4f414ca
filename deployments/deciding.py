"""Queries that were embedded together are decided on together: one search for all of them, one reading of those that
routing is not sure of, for which the others do not wait. What is wrong with one is told to that one alone.

Knows a retriever; knows nothing of catalogs that come and go, nor of who embeds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from deployments.routing_metrics import RoutingMetrics
from deployments.tracing import span
from lorauter.catalog.whitening import States
from lorauter.encoder import Embeddings
from lorauter.routing import RoutingDecision, RoutingOptions, compose
from lorauter.routing.retrieve import Retrieved, Retriever

Decided = list[RoutingDecision] | Exception


class Query(NamedTuple):
    """What one request asks: n texts, and how each is to be routed."""

    texts: list[str]
    options: list[RoutingOptions]


class _Row(NamedTuple):
    """A text of a query."""

    query: int
    text: str
    options: RoutingOptions
    embedding: Embeddings


class Deciding:
    """Decides.

    Args:
        metrics: of the steps.
        read: texts to their states, or None where there are none; None reads nothing.
    """

    def __init__(self, metrics: RoutingMetrics, read: Callable[[list[str]], Awaitable[States | None]] | None) -> None:
        self._metrics = metrics
        self._read = read
        self._reading: set[asyncio.Task[None]] = set()

    def begin(
        self, retriever: Retriever, queries: Sequence[Query], embeddings: Sequence[Embeddings]
    ) -> list[asyncio.Future[Decided]]:
        """What is decided on each query, or what is wrong with it; at once, but for what has to be read.

        Args:
            embeddings: (n, d) unit rows, of each query.
        """
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        told: list[asyncio.Future[Decided]] = [loop.create_future() for _ in queries]
        rows = [
            _Row(n, *row)
            for n, (query, vectors) in enumerate(zip(queries, embeddings, strict=True))
            for row in zip(query.texts, query.options, vectors, strict=True)
        ]
        found = self._found(retriever, rows)
        unsure = self._unsure(retriever, rows, found)
        waiting = {rows[i].query for i in unsure}
        sure = [i for i, row in enumerate(rows) if row.query not in waiting]
        self._tell(retriever, [rows[i] for i in sure], [found[i] for i in sure], told, started)
        for n, query in enumerate(queries):
            if not query.texts:
                told[n].set_result([])
        if waiting:
            later = [i for i, row in enumerate(rows) if row.query in waiting]
            places = [later.index(i) for i in unsure]
            rest = [rows[i] for i in later], [found[i] for i in later]
            task = loop.create_task(self._look_again(retriever, *rest, places, told, started))
            self._reading.add(task)
            task.add_done_callback(self._reading.discard)
        return told

    def _found(
        self, retriever: Retriever, rows: Sequence[_Row], states: States | None = None
    ) -> list[Retrieved | Exception]:
        if not rows:
            return []
        try:
            with self._metrics.step("retrieve"), span("retrieve"):
                return [
                    *retriever.retrieve(
                        np.stack([row.embedding for row in rows]),
                        [row.text for row in rows],
                        [row.options for row in rows],
                        states,
                    )
                ]
        except Exception as error:  # noqa: BLE001 (whose it is, is told)
            if rows[0].query == rows[-1].query:
                return [error] * len(rows)
        found: list[Retrieved | Exception] = []
        for _, of_one in groupby(range(len(rows)), lambda i: rows[i].query):  # one of them is at fault
            own = [*of_one]
            found += self._found(retriever, [rows[i] for i in own], None if states is None else states[own])
        return found

    def _unsure(self, retriever: Retriever, rows: Sequence[_Row], found: Sequence[Retrieved | Exception]) -> list[int]:
        if self._read is None:
            return []
        known = [(i, one) for i, one in enumerate(found) if isinstance(one, Retrieved)]
        unsure = retriever.unsure([one for _, one in known], [rows[i].options for i, _ in known])
        return [known[n][0] for n in unsure]

    async def _look_again(
        self,
        retriever: Retriever,
        rows: Sequence[_Row],
        found: list[Retrieved | Exception],
        unsure: Sequence[int],
        told: Sequence[asyncio.Future[Decided]],
        started: float,
    ) -> None:
        some = [rows[i] for i in unsure]
        assert self._read is not None
        states = await self._read([row.text for row in some])
        if states is not None:
            for i, other in zip(unsure, self._found(retriever, some, states), strict=True):
                found[i] = other
        self._tell(retriever, rows, found, told, started)

    def _tell(
        self,
        retriever: Retriever,
        rows: Sequence[_Row],
        found: Sequence[Retrieved | Exception],
        told: Sequence[asyncio.Future[Decided]],
        started: float,
    ) -> None:
        if not rows:
            return
        seconds: dict[str, float] = {}  # of all of them
        with self._metrics.step("compose"), span("compose"):
            composed = [
                self._composed(retriever, row, one, seconds) if isinstance(one, Retrieved) else one
                for row, one in zip(rows, found, strict=True)
            ]
        seconds["retrieve"] = time.perf_counter() - started
        for query, of_one in groupby(range(len(rows)), lambda i: rows[i].query):
            own = [composed[i] for i in of_one]
            wrong = next((one for one in own if isinstance(one, Exception)), None)
            if not told[query].done():  # who asked may have gone
                told[query].set_result(
                    [one for one in own if isinstance(one, RoutingDecision)] if wrong is None else wrong
                )

    def _composed(
        self, retriever: Retriever, row: _Row, found: Retrieved, seconds: Mapping[str, float]
    ) -> RoutingDecision | Exception:
        catalog = retriever.catalog
        try:
            return compose(
                found,
                row.options,
                retriever.config,
                catalog_version=catalog.version,
                versions=catalog.adapters,
                composed=catalog.composed,
                seconds=seconds,
            )
        except Exception as error:  # noqa: BLE001 (whose it is, is told)
            return error
