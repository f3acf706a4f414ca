from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from deployments import metrics, observe
from deployments.metrics import Metric, RayRecorder
from deployments.observe import Observed
from deployments.routing_metrics import RoutingMetrics
from lorauter.routing import AdapterWeight, RoutingDecision, TaskScore


class Recorder:
    """Keeps what it is given, and refuses labels that a metric has not."""

    def __init__(self) -> None:
        self.got: list[tuple[str, float, dict[str, str]]] = []

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        assert metric.kind != "histogram"
        self.got.append((metric.name, value, labels))

    set = add

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        assert metric.kind == "histogram"
        self.got.append((metric.name, value, labels))

    def of(self, metric: Metric) -> list[tuple[float, dict[str, str]]]:
        return [(value, labels) for name, value, labels in self.got if name == metric.name]


async def answer(request: Request) -> Response:
    record = observe.current()
    record.endpoint, record.key_name, record.prompt_tokens = "/v1/answer", "one", 7
    record.decided("sst2", 2, 0.5)

    async def tokens() -> AsyncIterator[str]:
        for count in (1, 2, 1):
            await asyncio.sleep(0.01)
            observe.current().token_arrived(count)
            yield "a secret answer"

    return StreamingResponse(tokens())


async def fail(request: Request) -> Response:
    raise ValueError("broken")


async def refuse(request: Request) -> Response:
    observe.current().decided("a secret prompt as the model's name", 0, None)
    return JSONResponse({}, 429)


def get(path: str, recorder: Recorder, ids: list[str] | None = None, **headers: Any) -> httpx.Response:
    taken: list[str] = [] if ids is None else ids
    routes = [Route(f"/{e.__name__}", e) for e in (answer, fail, refuse)]
    app = Observed(Starlette(routes=routes), recorder, taken.append)

    async def talk() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://lorauter") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(talk())


def test_a_request_is_counted_timed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "lorauter.requests"):
        get("/answer?q=secret", recorder, authorization="Bearer secret")
    assert recorder.of(metrics.REQUESTS) == [(1.0, {"endpoint": "/v1/answer", "status": "200", "outcome": "answered"})]
    [(seconds, _)] = recorder.of(metrics.REQUEST_SECONDS)
    [(first, _)] = recorder.of(metrics.FIRST_TOKEN_SECONDS)
    [(each, _)] = recorder.of(metrics.TOKEN_SECONDS)
    assert 0.01 <= first < seconds
    assert each == pytest.approx((seconds - first) / 3, rel=0.5)
    assert recorder.of(metrics.PROMPT_TOKENS) == [(7, {})]
    assert recorder.of(metrics.COMPLETION_TOKENS) == [(4, {})]
    [line] = caplog.records
    facts = vars(line)
    assert (facts["endpoint"], facts["status"], facts["key_name"]) == ("/v1/answer", 200, "one")
    assert (facts["model"], facts["adapters"], facts["confidence"]) == ("sst2", 2, 0.5)
    assert (facts["prompt_tokens"], facts["completion_tokens"]) == (7, 4)
    assert "secret" not in str(facts)


@pytest.mark.parametrize(
    ("path", "status", "outcome"), [("/fail", 500, "failed"), ("/refuse", 429, "refused"), ("/x" * 50, 404, "invalid")]
)
def test_what_fails_is_counted_too(path: str, status: int, outcome: str, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "lorauter.requests"):
        assert get(path, recorder).status_code == status
    assert recorder.of(metrics.REQUESTS) == [(1.0, {"endpoint": "other", "status": str(status), "outcome": outcome})]
    assert recorder.of(metrics.FIRST_TOKEN_SECONDS) == []
    assert "secret" not in str([vars(line) for line in caplog.records])


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("abc-1", ["abc-1"]),
        ("Root=1-67;a:b/c", ["Root=1-67;a:b/c"]),
        ("x" * 201, ["x" * 200]),
        ("a b\té", ["a_b___"]),
        ("", []),
    ],
)
def test_an_id_from_outside_is_cut_to_what_is_sane(given: str, taken: list[str]) -> None:
    ids: list[str] = []
    assert get("/answer", Recorder(), ids, **{"x-request-id": given.encode()}).status_code == 200
    assert ids == taken


def test_outside_of_a_request_nothing_is_kept() -> None:
    observe.current().token_arrived(3)
    assert observe.current().completion_tokens == 0


def decision(task: str, *adapters: str, confidence: float | None = 0.7) -> RoutingDecision:
    return RoutingDecision(
        "v1", (TaskScore(task, 0.9, 0.8),), tuple(AdapterWeight(name, "1", 0.5) for name in adapters), confidence
    )


def test_a_first_token_was_there_before_it_was_told() -> None:
    record = observe.RequestRecord()
    record.token_arrived(6, "stop", 0.25)
    assert record.last_token is not None and record.first_token == record.last_token - 0.25
    record.token_arrived(1)
    assert record.first_token < record.last_token
    first = record.first_token
    record.token_arrived(1, None, 60.0)  # of another answer, which was told later and was there before
    assert record.first_token == record.last_token - 60.0 < first


def test_decisions_are_counted() -> None:
    recorder = Recorder()
    measured = RoutingMetrics(recorder)
    with measured.step("embed"):
        pass
    measured.decided([decision("sums", "adder", "poet"), decision("poems")])
    measured.left_out(["rejected", "not_found", "rejected"])
    [(seconds, labels)] = recorder.of(metrics.ROUTING_SECONDS)
    assert labels == {"step": "embed"}
    assert 0 <= seconds < 1
    assert [labels["task"] for _, labels in recorder.of(metrics.TASKS)] == ["sums", "poems"]
    assert [value for value, _ in recorder.of(metrics.CONFIDENCE)] == [0.7, 0.7]
    assert [value for value, _ in recorder.of(metrics.MIXED_ADAPTERS)] == [2, 0]
    assert len(recorder.of(metrics.FALLBACKS)) == 1
    assert [labels["cause"] for _, labels in recorder.of(metrics.LEFT_OUT)] == ["rejected", "not_found", "rejected"]


def test_a_step_that_fails_is_not_timed() -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match="broken"), RoutingMetrics(recorder).step("embed"):
        raise ValueError("broken")
    assert recorder.got == []


def test_many_tasks_make_few_series() -> None:
    recorder = Recorder()
    measured = RoutingMetrics(recorder)
    for _ in range(2):
        measured.decided([decision(f"task-{i}") for i in range(5000)])
    seen = [labels["task"] for _, labels in recorder.of(metrics.TASKS)]
    assert len(seen) == 10_000
    assert len(set(seen)) == metrics.MANY_TASKS + 1
    assert "other" in seen


def test_every_metric_is_well_formed() -> None:
    names = [metric.name for metric in metrics.ALL]
    assert len(set(names)) == len(names)
    for metric in metrics.ALL:
        assert metric.name.startswith("lorauter_")
        assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert metric.help.endswith(".")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert sorted(metric.buckets) == list(metric.buckets)
        assert not set(metric.labels) & {"deployment", "replica", "application", "route", "le"}


def test_series_as_prometheus_gets_them() -> None:
    assert metrics.REQUESTS.series == ("ray_lorauter_requests_total",)
    assert metrics.RUNNING.series == ("ray_lorauter_requests_running",)
    assert metrics.CONFIDENCE.series[0] == "ray_lorauter_confidence_bucket"


def test_what_is_counted_is_told_to_ray_in_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, dict[str, str]]] = []
    counter = SimpleNamespace(inc=lambda value, labels: told.append((value, labels)))
    monkeypatch.setattr(RayRecorder, "_get", lambda _, metric: counter)
    monkeypatch.setattr("deployments.metrics._PAUSE_S", 0.01)
    recorder = RayRecorder()

    async def count() -> None:
        for reason in ("stop", "length", "stop"):
            recorder.add(metrics.ANSWERS, reason=reason)
        recorder.add(metrics.PROMPT_TOKENS, 0)
        recorder.add(metrics.PROMPT_TOKENS, 7)
        assert not told

    async def count_and_wait() -> None:
        await count()
        await asyncio.sleep(0.1)

    asyncio.run(count())  # whose loop ends before it is told
    asyncio.run(count_and_wait())
    assert told == [(4.0, {"reason": "stop"}), (2.0, {"reason": "length"}), (14.0, {})]
    recorder.add(metrics.PROMPT_TOKENS, 3)  # of a thread
    assert told[3:] == [(3, {})]
