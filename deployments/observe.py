"""What is noted of each HTTP request while it is answered, its log line, and its metrics.

The line carries facts and figures alone: no key, prompt or answer, and of what a client chose only what is known to
be a name. The request's id is Serve's, and is on every line that any deployment logs for it. Knows nothing of Ray.

What became of a request is told by its `outcome`, as a status sent with the first token says little of the last:

    answered   whole, as it should be
    invalid    not answered as asked: status 4xx
    refused    for want of room, or beyond a limit: status 429
    failed     status 5xx
    broken     begun with status 200, and ended by an error, whose own status is counted
    left       the client did not wait for the end: counted with status 499
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import genai, metrics
from deployments.logs import as_it_goes
from deployments.metrics import Metric
from lorauter.engine.types import SamplingParams
from lorauter.names import is_valid_name

logger = logging.getLogger("lorauter.requests")

REQUEST_ID = "x-request-id"
_ID = REQUEST_ID.encode()
_QUIET = ("/healthz", "/health", "/ping", "/metrics")  # asked all the time
LEFT = 499
Outcome = Literal["answered", "invalid", "refused", "failed", "broken", "left"]
_ID_CHARS, _UNFIT = 200, re.compile(r"[^!-~]")  # what is taken from outside into every log line, and what is not


class Recorder(Protocol):
    """Where metrics go."""

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""


@dataclass
class RequestRecord:
    """One request so far. Times in seconds of `time.perf_counter`.

    Attributes:
        endpoint: the path's pattern.
        key_name: whose key it came with.
        model: what is to answer, if that is a name.
        adapters: how many adapters are in the mixture; None until that is decided.
        asked: answers that were taken on; `sampling` is how their tokens are chosen.
        ends: why those that ended have.
        broken: the status of the error that ended an answer after its own status was sent.
    """

    started: float = field(default_factory=time.perf_counter)
    endpoint: str = "other"
    key_name: str | None = None
    model: str | None = None
    adapters: int | None = None
    confidence: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    asked: int = 0
    sampling: SamplingParams | None = None
    ends: list[str] = field(default_factory=list)
    first_token: float | None = None
    last_token: float | None = None
    broken: int | None = None

    def decided(self, model: str, adapters: int, confidence: float | None) -> None:
        """Note what is to answer."""
        self.model = model if is_valid_name(model) else None
        self.adapters = adapters
        self.confidence = confidence

    def token_arrived(self, count: int, end: str | None = None, kept_s: float = 0.0) -> None:
        """Note that tokens of an answer are here, why it ends with them, if it does, and how long before the first of
        them was there."""
        self.last_token = time.perf_counter()
        there = self.last_token - kept_s
        self.first_token = there if self.first_token is None else min(self.first_token, there)
        self.completion_tokens += count
        if end is not None:
            self.ends.append(end)

    def facts(self, status: int, outcome: Outcome) -> dict[str, Any]:
        """What the log line says."""
        facts: dict[str, Any] = {
            "endpoint": self.endpoint,
            "status": status,
            "outcome": outcome,
            "seconds": round(time.perf_counter() - self.started, 6),
            "key_name": self.key_name,
            "model": self.model,
            "adapters": self.adapters,
            "confidence": self.confidence,
        }
        if self.first_token is not None:
            facts["first_token_seconds"] = round(self.first_token - self.started, 6)
        if self.prompt_tokens:
            facts |= {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {name: value for name, value in facts.items() if value is not None}


_record: ContextVar[RequestRecord | None] = ContextVar("lorauter_request", default=None)


def current() -> RequestRecord:
    """The record of the request that is being answered here; outside of one, a record that nobody reads."""
    return _record.get() or RequestRecord()


class Observed:
    """An ASGI application, its requests noted, counted and logged.

    Args:
        app: the application.
        recorder: of the metrics.
        take_id: is told the id that a client gives its request, cut to what is fit for a log line.
    """

    def __init__(self, app: ASGIApp, recorder: Recorder, take_id: Callable[[str], None] = lambda _: None) -> None:
        self._app = app
        self._recorder = recorder
        self._take_id = take_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with genai.operation(scope["path"]) as operation:
            await self._noted(scope, receive, send, operation)

    async def _noted(self, scope: Scope, receive: Receive, send: Send, operation: genai.Operation | None) -> None:
        record = RequestRecord()
        token = _record.set(record)
        status: int | None = None
        whole, left = False, True

        async def send_noted(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                whole = True
            await send(message)

        try:
            if given := [value for name, value in scope["headers"] if name == _ID and value]:
                self._take_id(_UNFIT.sub("_", given[0][:_ID_CHARS].decode("latin-1")))
            await self._app(scope, receive, send_noted)
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except BaseException:
            left = False
            if status is not None and not whole:
                record.broken = 500
            raise
        finally:
            _record.reset(token)
            if record.broken is not None:
                ended: tuple[int, Outcome] = record.broken, "broken"
            elif left and not whole:  # nobody ends an answer early but for want of a listener
                ended = LEFT, "left"
            else:
                ended = status or 500, _outcome(status or 500)
            self._finish(record, *ended)
            if operation is not None:
                operation.end(record, *ended)

    def _finish(self, record: RequestRecord, status: int, outcome: Outcome) -> None:
        recorder = self._recorder
        recorder.add(metrics.REQUESTS, endpoint=record.endpoint, status=str(status), outcome=outcome)
        recorder.observe(metrics.REQUEST_SECONDS, time.perf_counter() - record.started, endpoint=record.endpoint)
        for reason in (*record.ends, *["abort"] * (record.asked - len(record.ends))):
            recorder.add(metrics.ANSWERS, reason=reason)
        if record.prompt_tokens:
            recorder.add(metrics.PROMPT_TOKENS, record.prompt_tokens)
        if record.first_token is not None and record.last_token is not None:
            recorder.add(metrics.COMPLETION_TOKENS, record.completion_tokens)
            recorder.observe(metrics.FIRST_TOKEN_SECONDS, record.first_token - record.started)
            if record.completion_tokens > 1:
                each = (record.last_token - record.first_token) / (record.completion_tokens - 1)
                recorder.observe(metrics.TOKEN_SECONDS, each)
        level = logging.INFO if record.endpoint not in _QUIET else logging.DEBUG
        if outcome in ("failed", "broken"):
            logger.warning("request %s", outcome, extra=record.facts(status, outcome))
        elif logger.isEnabledFor(level):
            as_it_goes(logger, f"request {outcome}", record.facts(status, outcome), level)


def _outcome(status: int) -> Outcome:
    """What a status says that was sent with a whole answer."""
    if status == LEFT:
        return "left"
    return "refused" if status == 429 else "failed" if status >= 500 else "invalid" if status >= 400 else "answered"
