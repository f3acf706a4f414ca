"""The answering of a batch's rows by one engine, their adapters fetched as they are needed. Knows no Ray."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from deployments.batch.config import BatchConfig
from deployments.batch.rows import Work, decision_columns, described, read_request
from deployments.forms import held_to
from deployments.host_adapters import HostAdapters
from deployments.openai_answers import error_answer
from deployments.shown import suited
from lorauter.engine import GenerationRequest, SamplingParams
from lorauter.engine.engine import Engine
from lorauter.engine.feed import Outcome, feed
from lorauter.engine.messages import Adapter
from lorauter.errors import AdapterRejected, AdapterUnavailable, InvalidRequest, LorauterError
from lorauter.names import AdapterKey
from lorauter.routing import LeftOut, RoutingDecision
from lorauter.routing.compose import cause_of
from lorauter.turns import encoded

_AHEAD = 256  # requests that are ready before the engine takes them: what a shard holds of adapters at most
_TOGETHER = 64  # rows whose adapters are fetched at once
_PATIENCE_S = (1.0, 4.0, 15.0)  # waits before an adapter that cannot be fetched is tried again
_ANSWERED = ("left_out", "answer", "finish_reason", "prompt_tokens", "completion_tokens", "latency_s")

T = TypeVar("T")
Ready = tuple[GenerationRequest, int] | Exception
Fetched = Adapter | Exception
Asked = tuple[SamplingParams, Sequence[int]] | Exception


class Answering:
    """One engine at work on shards.

    Several threads may answer a shard each: one has the engine, and the others make theirs ready meanwhile. A shard is
    alone in the engine, so that its answers depend on nothing but itself.

    Args:
        engine: the engine.
        adapters: their host-memory tier.
        config: the job's.
    """

    def __init__(
        self,
        engine: Engine,
        adapters: HostAdapters[Adapter],
        config: BatchConfig,
    ) -> None:
        self._engine = engine
        self._config = config
        self._turn = threading.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="adapters", daemon=True).start()
        self._adapters = adapters

    @property
    def loads(self) -> int:
        """How often an adapter was read from the disk, and made ready for the engine."""
        return self._adapters.counters.misses

    def answer(self, work: Work, told: Callable[[Outcome], None] = lambda outcome: None) -> None:
        """Answer routed rows: sets `work.results`. `told` hears of each row as it ends.

        Raises:
            RuntimeError: the engine has ended.
        """
        ready: queue.Queue[Ready | None] = queue.Queue(maxsize=_AHEAD)
        stopped = threading.Event()
        sizes: list[int] = []
        preparer = threading.Thread(target=self._prepare, args=(work, ready, stopped), name="prepare", daemon=True)
        preparer.start()

        def requests() -> Iterator[GenerationRequest | Exception]:
            while (item := ready.get()) is not None:
                sizes.append(0 if isinstance(item, Exception) else item[1])
                yield item if isinstance(item, Exception) else item[0]

        try:
            with self._turn:
                outcomes = feed(self._engine, requests(), told)
        finally:
            stopped.set()
        if len(outcomes) < len(work.rows):
            last = outcomes[-1].result if outcomes else None
            raise RuntimeError(f"{len(outcomes)} of {len(work.rows)} rows were made ready: {last!r}")
        results: list[dict[str, Any]] = [{}] * len(work.rows)
        for place, outcome, size in zip(work.order, outcomes, sizes, strict=True):
            results[place] = _columns(work.decisions[place], outcome, size)
            if isinstance(outcome.result, Exception):
                work.errors[place] = error_answer(outcome.result, "operator")
        work.results = results

    def _prepare(self, work: Work, ready: queue.Queue[Ready | None], stopped: threading.Event) -> None:
        """Put the rows' requests, in the work's order, to where the engine takes them from; None in the end."""

        def put(item: Ready | None) -> None:
            placed = False
            while not (placed or stopped.is_set()):
                with suppress(queue.Full):
                    ready.put(item, timeout=1)
                    placed = True

        try:
            for start in range(0, len(work.order), _TOGETHER):
                places = work.order[start : start + _TOGETHER]
                asked = {place: self._read(work, place) for place in places}
                keys = {
                    adapter.key
                    for place in places
                    if not isinstance(decision := work.decisions[place], Exception)
                    for adapter in decision.adapters
                }
                fetched = self._wait(self._fetch_all(sorted(keys)))
                for place in places:
                    put(self._request(work, place, asked[place], fetched))
        except BaseException as error:  # noqa: BLE001 (a thread's last word: else the engine would wait for ever)
            put(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        put(None)

    def _read(self, work: Work, place: int) -> Asked:
        """How a row is answered, and its prompt's tokens, after the examples that there is room for."""
        decision = work.decisions[place]
        if isinstance(decision, Exception):
            return decision
        try:
            request = read_request(work.rows[place], self._config)
            decision = suited(decision, request.prompt, request.sampling)
            prompt, shown = encoded(
                self._engine.codec.encode,
                request.prompt,
                decision.examples,
                context=self._engine.max_model_len,
                max_tokens=request.sampling.max_tokens,
            )
            if not prompt:
                raise InvalidRequest("the prompt has no tokens", param="prompt")
        except Exception as error:  # noqa: BLE001 (this row's trouble alone)
            return error.with_traceback(None)
        work.decisions[place] = decision.with_examples(shown, "no_room")
        return request.sampling, prompt

    def _request(self, work: Work, place: int, asked: Asked, fetched: dict[AdapterKey, Fetched]) -> Ready:
        """A row's request. Where it was routed, its mixture goes on without broken adapters, if anything is left.

        Those that are gone, or cannot be fetched, make the row an error: started again, the job would answer otherwise.
        """
        if isinstance(asked, Exception):
            return asked
        decision = work.decisions[place]
        assert not isinstance(decision, Exception)  # `_read` has said so
        broken = {a.key: e for a in decision.adapters if isinstance(e := fetched[a.key], AdapterRejected)}
        if decision.routed and len(broken) < len(decision.adapters):
            left_out = [LeftOut(*key, cause_of(error)) for key, error in broken.items()]
            decision = work.decisions[place] = decision.without(left_out)
        sampling, prompt = asked
        try:
            mixture = []
            for adapter in decision.adapters:
                packed = fetched[adapter.key]
                if isinstance(packed, Exception):
                    raise packed
                mixture.append((packed, adapter.weight))
            return GenerationRequest(prompt, tuple(mixture), held_to(sampling, decision)), len(prompt)
        except Exception as error:  # noqa: BLE001 (this row's trouble alone)
            return error.with_traceback(None)

    async def _fetch_all(self, keys: Sequence[AdapterKey]) -> dict[AdapterKey, Fetched]:
        return dict(zip(keys, await asyncio.gather(*map(self._fetch, keys)), strict=True))

    async def _fetch(self, key: AdapterKey) -> Fetched:
        for patience in (*_PATIENCE_S, None):
            try:
                return await self._adapters.get(key)
            except LorauterError as error:
                if patience is None or not isinstance(error, AdapterUnavailable):
                    cause = getattr(error, "cause", None)  # what Ray has wrapped, traceback and all
                    return cause if isinstance(cause, LorauterError) else error
                await asyncio.sleep(patience)
        raise AssertionError("unreachable")

    def _wait(self, awaitable: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result()


def _columns(decision: RoutingDecision | Exception, outcome: Outcome, prompt_tokens: int) -> dict[str, Any]:
    result = outcome.result
    if isinstance(result, Exception):
        return {**dict.fromkeys(_ANSWERED), **decision_columns(decision), "error": described(result)}
    assert isinstance(decision, RoutingDecision)
    return {
        **decision_columns(decision),
        "left_out": [vars(adapter) for adapter in decision.left_out],
        "answer": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(result.token_ids),
        "latency_s": round(outcome.seconds, 6),
    }
