"""What became of a request, in the metrics and in the log; and what keeps a silent stream alive."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest
from fake_service import BOTH, CHAT, FakeService, chat, events, post, transport

from deployments import metrics
from deployments.api import build_api
from deployments.config import ApiSettings
from deployments.metrics import Metric
from deployments.observe import Observed
from lorauter.errors import AdapterRejected, Overloaded, ServiceUnavailable


class Recorder:
    """Keeps the labels of requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        if metric is metrics.REQUESTS:
            self.requests.append((labels["status"], labels["outcome"]))

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        pass


def asked(service: FakeService, path: str, body: Any, recorder: Recorder) -> httpx.Response:
    """The response to a request, as far as it comes."""

    async def talk() -> httpx.Response:
        app: Any = Observed(build_api(service, ApiSettings()), recorder)
        async with httpx.AsyncClient(transport=transport(app), base_url="http://lorauter") as client:
            return await client.post(path, json=body)

    return asyncio.run(talk())


@pytest.mark.parametrize(
    ("service", "stream", "status", "outcome", "level"),
    [
        (FakeService(), False, 200, "answered", logging.INFO),
        (FakeService(), True, 200, "answered", logging.INFO),
        (FakeService(first_error=Overloaded("full", retry_after_s=1)), True, 429, "refused", logging.INFO),
        (FakeService(load_error=Overloaded("full", retry_after_s=1)), False, 429, "refused", logging.INFO),
        (FakeService(first_error=AdapterRejected("odd", adapter="a")), False, 422, "invalid", logging.INFO),
        (FakeService(first_error=ServiceUnavailable("down")), True, 503, "failed", logging.WARNING),
        (FakeService(first_error=ValueError("?")), False, 500, "failed", logging.WARNING),
        (FakeService(late_error=ServiceUnavailable("down")), True, 503, "broken", logging.WARNING),
        (FakeService(late_error=ValueError("?")), True, 500, "broken", logging.WARNING),
        (FakeService(late_error=ServiceUnavailable("down")), False, 503, "failed", logging.WARNING),
    ],
)
@BOTH
def test_outcomes(
    path: str,
    body: Any,
    service: FakeService,
    stream: bool,
    status: int,
    outcome: str,
    level: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "lorauter"):
        response = asked(service, path, body("poet", stream=stream), recorder)
    assert response.status_code == (200 if outcome == "broken" else status)
    assert recorder.requests == [(str(status), outcome)]
    [line] = [record for record in caplog.records if record.name == "lorauter.requests"]
    facts = vars(line)
    assert (facts["status"], facts["outcome"], line.levelno) == (status, outcome, level)
    assert line.getMessage() == f"request {outcome}"
    unexpected = isinstance(service.first_error or service.late_error, ValueError)
    assert any(record.exc_info for record in caplog.records) == unexpected, "a traceback tells of a fault of ours"


@pytest.mark.parametrize("spec", ["2.0", "2.4"])  # how servers tell of it: by a message, or where they send
@pytest.mark.parametrize("when", ["in its body", "before the answer", "in the stream", "while the stream is silent"])
def test_a_client_that_leaves(when: str, spec: str, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()

    async def leave() -> None:
        gone, waiting = asyncio.Event(), asyncio.Event()

        async def pause() -> None:
            waiting.set()
            if when != "in the stream":
                await asyncio.Event().wait()

        stream = when != "before the answer"
        whole = json.dumps(chat("poet", stream=stream)).encode()
        given = [{"type": "http.request", "body": whole, "more_body": when == "in its body"}]
        sent = 0

        async def receive() -> dict[str, Any]:
            if given:
                return given.pop()
            if when != "in its body":
                await gone.wait()
            return {"type": "http.disconnect"}

        async def give(_: Any) -> None:
            nonlocal sent
            sent += 1
            if when == "in the stream" and sent == 3:
                gone.set()
                if spec == "2.4":
                    raise OSError("the client is gone")
                await asyncio.Event().wait()

        scope = {"type": "http", "asgi": {"spec_version": spec}, "method": "POST", "path": CHAT, "query_string": b""}
        app: Any = Observed(build_api(FakeService(pause=pause), ApiSettings()), recorder)
        headers = [(b"content-type", b"application/json")]
        task = asyncio.create_task(app({**scope, "headers": headers}, receive, give))
        if when in ("before the answer", "while the stream is silent"):
            await waiting.wait()
            gone.set()
            if when == "before the answer" or spec == "2.4":
                task.cancel()  # as Serve does
        done, _ = await asyncio.wait([task], timeout=5)
        assert done
        assert task.cancelled() or task.exception() is None, "else Serve logs a failure"

    with caplog.at_level(logging.INFO, "lorauter"):
        asyncio.run(leave())
    assert recorder.requests == [("499", "left")]
    [line] = [record for record in caplog.records if record.name == "lorauter.requests"]
    assert (vars(line)["outcome"], line.levelno) == ("left", logging.INFO)
    assert {record.name for record in caplog.records if record.levelno > logging.INFO} <= {"lorauter.access"}


@BOTH
@pytest.mark.parametrize(("ping_s", "least", "most"), [(0.1, 2, 4), (5.0, 0, 0), (None, 0, 0)])
def test_a_silent_stream_gets_pings(path: str, body: Any, ping_s: float | None, least: int, most: int) -> None:
    service = FakeService(pause=lambda: asyncio.sleep(0.35))
    response = post(service, path, body(stream=True), ping_s=ping_s)
    assert least <= response.text.count(": ping\n\n") <= most
    told = httpx.Response(200, headers=response.headers, text=response.text.replace(": ping\n\n", ""))
    first, *_, last = events(told)
    assert "lorauter" in first
    assert last == "[DONE]"


def test_a_stream_that_says_something_gets_none() -> None:
    """Silence counts from the last event."""
    service = FakeService(pause=lambda: asyncio.sleep(0.06))
    assert "ping" not in post(service, CHAT, chat(stream=True), ping_s=0.1).text
