"""The routing of a batch's rows: embed, retrieve, compose, for many rows at once. Knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deployments.batch.config import BatchConfig
from deployments.batch.rows import RowRequest, SourceRow, read_request
from lorauter.errors import AdapterNotFound, LorauterError
from lorauter.routing import AdapterWeight, Router, RoutingDecision

_TOGETHER = 16  # texts embedded at once: of much the same length, and few enough to stay in a CPU's cache


def route_rows(router: Router, rows: Sequence[SourceRow], config: BatchConfig) -> list[RoutingDecision | Exception]:
    """Where each row goes, or what is wrong with it."""
    decisions: list[RoutingDecision | Exception | None] = [None] * len(rows)
    texts: list[tuple[int, RowRequest]] = []
    for place, row in enumerate(rows):
        try:
            request = read_request(row, config)
        except Exception as error:  # noqa: BLE001 (this row's trouble alone)
            decisions[place] = error.with_traceback(None)
            continue
        if request.chosen is None:
            texts.append((place, request))
        else:
            decisions[place] = _by_hand(request.chosen, router.catalog.adapters)
    texts.sort(key=lambda item: len(item[1].text))
    for start in range(0, len(texts), _TOGETHER):
        together = texts[start : start + _TOGETHER]
        for (place, _), decision in zip(together, _route(router, [request for _, request in together]), strict=True):
            decisions[place] = decision
    return [decision for decision in decisions if decision is not None]


def _by_hand(chosen: Sequence[tuple[str, float]], versions: Mapping[str, str]) -> RoutingDecision | AdapterNotFound:
    """The decision for adapters that a row names, in the versions of the job's catalog."""
    for name, _ in chosen:
        if name not in versions:
            return AdapterNotFound("the catalog has no such adapter", adapter=name)
    return RoutingDecision(None, (), tuple(AdapterWeight(name, versions[name], weight) for name, weight in chosen))


def _route(router: Router, requests: Sequence[RowRequest]) -> Sequence[RoutingDecision | Exception]:
    try:
        return router.route([r.text for r in requests], [r.options for r in requests])
    except LorauterError as error:
        if len(requests) == 1:
            return [error]
        return [decision for request in requests for decision in _route(router, [request])]  # one spoils no other
