"""The engine: continuous batching of requests that each carry their own mixture of adapters.

Its callers' side: it checks requests, refuses what is too much, and has the front make text of the tokens that the
device's side reports. That one, the core, is in this process (`lorauter.engine.local`) or in one of its own
(`lorauter.engine.process`), and needs PyTorch, which this side does without: it takes seconds to import. Knows nothing
of HTTP, Ray, or where adapters come from.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import queue
import random
import struct
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from lorauter.adapters.weights import LoraWeights
from lorauter.engine.config import EngineConfig
from lorauter.engine.front import Front, LoopSink, Sink
from lorauter.engine.messages import Adapter, Begin, Counters, Drop, Facts, Handled, Lockstep, Order, Report
from lorauter.engine.pace import Pace
from lorauter.engine.stream import Stream
from lorauter.engine.text import TextCodec
from lorauter.engine.types import Chunk, Completion, GenerationRequest, SamplingParams
from lorauter.errors import ContextLengthExceeded, InvalidRequest, LorauterError, Overloaded
from lorauter.tasks import is_encodable
from lorauter.weakly import weakly

_RETRY_AFTER_S = 1.0
_TOGETHER_S = 0.001  # in which what loops ask is one message to the core
_FORBIDDEN = 1 << 18  # token ids of bad words, were they all as long as the longest: 2 MiB on the device
_FAILURES = 5  # steps that fail one after another: the device is beyond use, and not one request at fault

Told = Callable[[Report | Exception], None]


class Core(Protocol):
    """The device's side; see `lorauter.engine.core.EngineCore`."""

    facts: Facts

    def take(self, orders: Sequence[Order]) -> None: ...

    def read(self, path: Path, *, name: str, version: str) -> tuple[Adapter, tuple[str, ...]]: ...

    @property
    def running(self) -> int: ...

    @property
    def counters(self) -> Counters: ...

    def check_health(self) -> None: ...

    def close(self) -> None: ...


class Engine:
    """Serves one base model with any mixture of adapters for every request.

    Args:
        start: starts the core, given what it reports to.
        codec: the base model's tokenizer.
        config: settings.

    Attributes:
        facts: what does not change of the core: what adapters have to fit, sizes.
        pace: how fast it is.
    """

    def __init__(self, start: Callable[[Told], tuple[Core, TextCodec]], config: EngineConfig) -> None:
        self.config = config
        self.pace = Pace(config.rows, config.max_slowdown)
        self._front = Front(weakly(self._cancel))
        self._numbers = itertools.count()
        self._unfinished: set[int] = set()
        self._room = threading.Condition()
        self._sending = threading.RLock()
        self._held = 0
        self._outbox: list[Order] = []
        self._sent = 0.0  # when the core was told something last
        self._sender: asyncio.AbstractEventLoop | None = None  # who is about to tell it something
        self._heard = time.monotonic()  # when the core said something last, or got something to do
        self._failures = 0  # steps that have failed since the last one that did not
        self._closed = False
        try:
            self._core, self.codec = start(weakly(self._told))
        except BaseException:
            self._front.close(LorauterError("the engine has not started"))
            raise
        self.facts = self._core.facts

    # --- requests

    def stream(
        self, request: GenerationRequest, *, gap: Callable[[], float] = lambda: 0.0, keep_s: float = 0.0
    ) -> Stream:
        """The answer as it comes; chunks that are ready together come as one. Closing the iterator cancels the request.

        Args:
            gap: seconds between two chunks at least, but for the first and the last one.
            keep_s: seconds until the first one at least, unless it is the last.

        Raises (on the first step):
            Overloaded: the queue is full, or too long for `max_slowdown`.
            ContextLengthExceeded: the prompt leaves no room for an answer.
            AdapterRejected, AdapterUnavailable: an adapter does not fit the model or the memory.
            LorauterError: no token has come for `token_timeout_s`.
        """
        return Stream(partial(self.submit, request), self._cancel, gap, keep_s, self.config.token_timeout_s)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """All answers, in the order of the requests; waits for a place in the queue.

        The first request that fails ends the call, and cancels the others.
        """
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        chunks: list[list[Chunk]] = [[] for _ in requests]
        ids: list[int] = []
        unfinished = 0
        remaining = deque(zip(requests, chunks, strict=True))

        def sink_to(pieces: list[Chunk]) -> Sink:
            def sink(item: Chunk | BaseException) -> None:
                if isinstance(item, Chunk):
                    pieces.append(item)
                if not isinstance(item, Chunk) or item.finish_reason is not None:
                    ended.put(None if isinstance(item, Chunk) else item)  # wakes the caller only when there is cause

            return sink

        try:
            while remaining or unfinished:
                if not unfinished:
                    with self._room:
                        self._room.wait_for(lambda: self._closed or not self._full)
                with self.held():  # one step for all that come together, not one for each
                    while remaining and not (self._full and unfinished):
                        request, pieces = remaining.popleft()
                        ids.append(self.submit(request, sink_to(pieces), refuse=False))
                        unfinished += 1
                error = ended.get()
                if error is not None:
                    raise error
                unfinished -= 1
        finally:
            for id in ids:
                self._cancel(id)
        return [Completion.of(pieces) for pieces in chunks]

    def submit(self, request: GenerationRequest, sink: Sink, *, refuse: bool = True) -> int:
        """Take a request; `sink` is told each chunk, or the error that ended it, by the engine's front.

        Args:
            refuse: whether it is refused where there are too many.

        Returns:
            Its number.
        """
        prompt, sampling = len(request.prompt), request.sampling
        known = prompt + len(request.generated)
        if known >= self.max_model_len:
            raise ContextLengthExceeded(known, self.max_model_len)
        tokens = self._ids("prompt", request.prompt)
        if request.generated:
            tokens = tokens + self._ids("generated", request.generated)
        for what, ids in (
            ("logit_bias", [token for token, _ in sampling.logit_bias]),
            ("stop_token_ids", sampling.stop_token_ids),
            ("allowed_token_ids", sampling.allowed_token_ids),
        ):
            if ids:
                self._ids(what, ids)
        ends = self.codec.eos_ids if not sampling.ignore_eos or sampling.is_held else frozenset()
        order = Begin(
            next(self._numbers),
            tokens,
            prompt,
            limit=min(self.max_model_len, prompt + sampling.max_tokens),
            adapters=tuple([(self._ready(adapter), weight) for adapter, weight in request.adapters]),
            sampling=replace(sampling, bad_words=self._tokens_of(sampling.bad_words))
            if sampling.bad_words
            else sampling,
            seed=random.getrandbits(64) if sampling.seed is None else sampling.seed,
            tenant=request.tenant,
            ends=ends.union(sampling.stop_token_ids) if sampling.stop_token_ids else ends,
            came=time.monotonic(),
        )
        text = self.codec.stream(sampling) if sampling.detokenize else None
        if text is not None:
            for token in request.generated:  # their text is known
                text.push(token)
        with self._room:
            if self._closed:
                raise LorauterError("the engine is closed")
            if refuse and not request.generated:  # what has begun elsewhere is to end
                if self._full:
                    running, waiting = self.load
                    raise Overloaded(
                        f"{running} requests run and {waiting} wait, and no more may; try again later",
                        retry_after_s=_RETRY_AFTER_S,
                    )
                self.pace.check(len(self._unfinished) + 1)
            if not self._unfinished:
                self._heard = time.monotonic()
            self._front.expect(order.id, sink, text)
            self._unfinished.add(order.id)
        if isinstance(sink, LoopSink):
            with self._sending:
                self._outbox.append(order)
                self._send_soon(sink.loop)
        else:
            self._order(order)
        return order.id

    def _ids(self, what: str, tokens: Sequence[int]) -> array[int]:
        """Token ids as they travel, in an array. Raises InvalidRequest where the model has not all of them."""
        try:  # `array` itself takes three times as long
            packed = (
                tokens
                if isinstance(tokens, array) and tokens.typecode == "i"
                else array("i", struct.pack(f"{len(tokens)}i", *tokens))
            )
        except struct.error:  # larger than any model's
            packed = None
        # As numbers without a sign, negative ones are the largest.
        if packed is None or (packed and np.maximum.reduce(np.frombuffer(packed, np.uint32)) >= self.facts.vocabulary):
            raise InvalidRequest(
                f"the token ids of {what} are from {min(tokens)} to {max(tokens)}, but the model's "
                f"{self.facts.vocabulary} are from 0 to {self.facts.vocabulary - 1}",
                param=what,
            )
        return packed

    def _tokens_of(self, words: Sequence[str | tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        """Every form of words that may not come. Raises InvalidRequest."""
        if not all(isinstance(word, tuple) or is_encodable(word) for word in words):
            raise InvalidRequest("bad_words holds half a character (a lone surrogate)", param="bad_words")
        forms = [form for word in words for form in ([word] if isinstance(word, tuple) else self.codec.forms(word))]
        if (longest := max(map(len, forms), default=0)) * len(forms) > _FORBIDDEN:
            raise InvalidRequest(
                f"bad_words come to {len(forms)} of up to {longest} tokens; give fewer, or shorter ones",
                param="bad_words",
            )
        for form in forms:
            if not 0 <= min(form) <= max(form) < self.facts.vocabulary:
                raise InvalidRequest(f"bad_words holds token ids that the model has not: {form}", param="bad_words")
        return tuple(forms)

    def _ready(self, adapter: LoraWeights | Adapter) -> Adapter:
        if isinstance(adapter, LoraWeights):
            raise InvalidRequest(f"adapter {adapter.name!r} is not read by this engine", param="adapters")
        return adapter

    def read(self, path: Path, *, name: str, version: str) -> tuple[Adapter, tuple[str, ...]]:
        """Make the adapter of a folder ready to be used, once for many requests; it stays in memory while it is held.

        Returns:
            It, and what of it has no effect or is not there.

        Raises:
            AdapterRejected: it can never be served.
        """
        return self._core.read(path, name=name, version=version)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this is entered no request reaches the core: those submitted meanwhile begin together."""
        with self._sending:
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1
                self._send()

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """While this is entered no step is planned before all tokens that have come are handed out, so that what
        sinks submit or cancel then follows from the tokens alone, not from any clock.

        It is entered while nothing is asked, and begins with no prefix computed and no adapter resident: what was asked
        before is of no effect either.
        """
        self._order(Lockstep(True))
        try:
            yield
        finally:
            self._order(Lockstep(False))

    # --- what it is like

    @property
    def max_model_len(self) -> int:
        """Positions of a sequence, prompt and answer together."""
        return self.facts.max_model_len

    @property
    def counters(self) -> Counters:
        """What the device's side counts; of one in a process of its own, as of at most a moment ago."""
        return self._core.counters

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        running = self._core.running
        return running, max(0, len(self._unfinished) - running)

    def check_health(self) -> None:
        """Raise RuntimeError if a part of the engine is gone, or in one step for too long, or if steps fail."""
        self._core.check_health()
        if self._closed or not self._front.alive:
            raise RuntimeError("the engine's thread has ended")
        if self._failures >= _FAILURES:
            raise RuntimeError(f"the engine's last {self._failures} steps have all failed")
        seconds = time.monotonic() - self._heard
        if self._unfinished and seconds > self.config.step_timeout_s:
            raise RuntimeError(f"a step of the engine has taken {seconds:.0f} s, and has not ended")

    def close(self) -> None:
        """Stop after the current step; what still runs or waits fails."""
        self._core.close()

    # --- to and from the core

    @property
    def _full(self) -> bool:
        """Whether as many requests are here as may run and wait together."""
        return len(self._unfinished) >= self.config.rows + self.config.max_queue

    def _cancel(self, id: int) -> None:
        """Let a sequence go at the next step; of no effect on one that has ended."""
        self._front.forget(id)
        if id in self._unfinished:
            self._order(Drop(id))

    def _order(self, order: Order) -> None:
        with self._sending:
            self._outbox.append(order)
            self._send()

    def _send(self) -> None:
        with self._sending:
            self._sender = None
            if not self._held and self._outbox:
                orders, self._outbox = self._outbox, []
                self._sent = time.monotonic()
                self._core.take(orders)

    def _send_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send in the next turn of a loop, unless something was sent a moment ago: each message has the core's process
        read it, while its thread is to feed the device."""
        if self._sender is not loop:
            self._sender = loop
            loop.call_later(max(0.0, self._sent + _TOGETHER_S - time.monotonic()), self._send)

    def _told(self, report: Report | Exception) -> None:
        """What the core says, on its thread; once it has ended, why that is."""
        if isinstance(report, Exception):
            with self._room:
                self._closed = True
                self._room.notify_all()
            self._front.close(report)
            return
        self._heard = time.monotonic()
        self._failures = report.failures
        if report.step is not None:
            self.pace.step(*report.step)
        for prompt_tokens, answer_tokens in report.answered:
            self.pace.answered(prompt_tokens, answer_tokens)
        if ended := report.ended:
            with self._room:
                self._unfinished.difference_update(ended)
                self._room.notify_all()
            if report.answered:
                self.pace.ended(len(report.answered), self.load[1], self._heard)
        if report.outcomes:
            self._front.put(report, self._in_step() if report.awaited else None)

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """What is ordered while this is entered reaches the core before its next step, which waits for it."""
        with self.held():
            try:
                yield
            finally:
                self._order(Handled())


def warm_up(engine: Engine) -> None:
    """Run batches of several sizes, so that the first requests find kernels and graphs ready, and `engine.pace` known.

    Takes seconds on a CPU. What is in this process by then is taken out of Python's collection of cycles, which would
    otherwise go through all of it again and again, for a third of a second each time, while requests wait.
    """
    prompt = (0,) * min(16, engine.max_model_len - 1)
    request = GenerationRequest(prompt, sampling=SamplingParams(max_tokens=8, ignore_eos=True))
    size = 1
    while size < engine.config.rows:
        engine.generate([request] * size)
        size *= 2
    engine.generate([request] * engine.config.rows)
    gc.collect()
    gc.freeze()
