"""The engine: continuous batching of requests that each carry their own mixture of adapters.

It joins three rooms. The scheduler decides what a step processes, the runner computes it, the front makes text of its
tokens. One thread plans and launches; on a GPU it plans a step while the one before it is computed. Knows nothing of
HTTP, Ray, or where adapters come from.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, ParamSpec
from weakref import WeakMethod, WeakValueDictionary

from lorauter.adapters.weights import LoraWeights
from lorauter.engine.blocks import BlockPool, blocks_of
from lorauter.engine.config import EngineConfig
from lorauter.engine.front import Front, LoopSink, Sink
from lorauter.engine.model import Decoder
from lorauter.engine.pace import Pace
from lorauter.engine.runner import Flight, Runner
from lorauter.engine.scheduler import NOT_FINITE, ActiveSequence, AdapterKey, Event, Scheduler, StepPlan
from lorauter.engine.slots import AdapterSlots, PackedAdapter, default_budget
from lorauter.engine.text import TextCodec
from lorauter.engine.types import Chunk, Completion, GenerationRequest
from lorauter.errors import ContextLengthExceeded, InvalidRequest, LorauterError, Overloaded

P = ParamSpec("P")
_RETRY_AFTER_S = 1.0
_FAILURES = 5  # steps that fail one after another: the device is beyond use, and not one request at fault
_CPU_CACHE_BYTES = 4 << 30  # where no setting says how many, at most


class MultiLoraEngine:
    """Serves one base model with any mixture of adapters for every request.

    Args:
        model: the base model.
        codec: its tokenizer.
        config: settings.

    Attributes:
        decoder: the base model. Whoever else runs on it does so while nothing is to be answered here.
        slots: the adapters on the device.
        scheduler: for its counters.
    """

    def __init__(self, model: Decoder, codec: TextCodec, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.codec = codec
        self.max_model_len = min(self.config.max_model_len, model.max_positions)
        self.decoder = model
        self.slots, self._runner = _make_runner(model, self.config, self.max_model_len)
        self.pace = Pace(self.config.max_batch, self.config.max_slowdown)
        self.scheduler = Scheduler(
            self.config.max_batch,
            BlockPool(self._runner.memory.cache.blocks),
            self.slots,
            self._runner.budget,
            reuse=self.config.prefix_reuse,
            failed=_weakly(self._fail),
        )
        self._front = Front(_weakly(self._cancel))
        self._packed: WeakValueDictionary[AdapterKey, PackedAdapter] = WeakValueDictionary()
        self._flights: deque[tuple[StepPlan, Flight, float]] = deque()  # when each was launched
        self._taken = 0.0  # when the last one's tokens were taken
        self._inbox: deque[tuple[Literal["begin", "drop"], ActiveSequence]] = deque()
        self._unfinished = 0
        self._wake = threading.Condition()
        self._lockstep = False
        self._busy_since: float | None = None
        self._failures = 0  # steps that have failed since the last one that did not
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lorauter-engine", daemon=True)
        self._thread.start()

    # --- the callers' side

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk]:
        """The answer as it comes; chunks that are ready together come as one. Closing the iterator cancels the request.

        Raises (on the first step):
            Overloaded: the queue is full, or too long for `max_slowdown`.
            ContextLengthExceeded: the prompt leaves no room for an answer.
            AdapterRejected, AdapterUnavailable: an adapter does not fit the model or the memory.
            LorauterError: no token has come for `token_timeout_s`.
        """
        sink = LoopSink(asyncio.get_running_loop())
        sequence = self.submit(request, sink)
        begun = False
        try:
            while True:
                try:
                    async with asyncio.timeout(self.config.token_timeout_s if begun else None):
                        items = [await sink.ready.get()]
                except TimeoutError as error:
                    raise LorauterError(f"no token for {self.config.token_timeout_s:g} s") from error
                begun = True
                while not sink.ready.empty():
                    items.append(sink.ready.get_nowait())
                chunks = [item for item in items if isinstance(item, Chunk)]
                if chunks:
                    yield Chunk.joined(chunks)
                    if chunks[-1].finish_reason is not None:
                        return
                for item in items:
                    if isinstance(item, BaseException):
                        raise item
        finally:
            self._cancel(sequence)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """All answers, in the order of the requests; waits for a place in the queue.

        The first request that fails ends the call, and cancels the others.
        """
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        chunks: list[list[Chunk]] = [[] for _ in requests]
        sequences: list[ActiveSequence] = []
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
                with self._wake:  # one step for all that come together, not one for each
                    while remaining and unfinished < self.config.max_batch + self.config.max_queue:
                        request, pieces = remaining.popleft()
                        sequences.append(self.submit(request, sink_to(pieces), wait=True))
                        unfinished += 1
                error = ended.get()
                if error is not None:
                    raise error
                unfinished -= 1
        finally:
            for sequence in sequences:
                self._cancel(sequence)
        return [Completion.of(pieces) for pieces in chunks]

    def pack(self, weights: LoraWeights) -> PackedAdapter:
        """Make an adapter ready to be used, once for many requests. Raises AdapterRejected."""
        packed = self._packed.get(weights.key)
        if packed is None:
            packed = self._packed[weights.key] = self.slots.pack(weights)
        return packed

    @property
    def cache_blocks(self) -> int:
        """Blocks of the key-value cache."""
        return self._runner.memory.cache.blocks

    @property
    def cache_used(self) -> float:
        """Share of the blocks that running requests hold."""
        return self.scheduler.cache_used

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        running = len(self.scheduler.running)
        return running, max(0, self._unfinished - running)

    def held(self) -> threading.Condition:
        """While this is entered no step begins that would admit a request: those submitted meanwhile begin together."""
        return self._wake

    @contextmanager
    def lockstep(self) -> Iterator[None]:
        """While this is entered no step is planned before all tokens that have come are handed out, so that what
        sinks submit or cancel then follows from the tokens alone, not from any clock.

        It is entered while nothing is asked, and begins with no prefix computed and no adapter resident: what was asked
        before is of no effect either.
        """
        with self._wake:
            self.scheduler.forget()
            self.slots.forget()
            self._lockstep = True
        try:
            yield
        finally:
            self._lockstep = False

    def check_health(self) -> None:
        """Raise RuntimeError if one of the engine's threads is gone, or in one step for too long, or if steps fail."""
        if self._closed or not self._thread.is_alive() or not self._front.alive:
            raise RuntimeError("the engine's thread has ended")
        if self._failures >= _FAILURES:
            raise RuntimeError(f"the engine's last {self._failures} steps have all failed")
        since = self._busy_since
        if since is not None and (seconds := time.monotonic() - since) > self.config.step_timeout_s:
            raise RuntimeError(f"a step of the engine has taken {seconds:.0f} s, and has not ended")

    def close(self) -> None:
        """Stop after the current step; what still runs or waits fails."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()

    def submit(self, request: GenerationRequest, sink: Sink, *, wait: bool = False) -> ActiveSequence:
        """Take a request; `sink` is told each chunk, or the error that ended it, by the engine's front."""
        prompt, sampling = len(request.prompt), request.sampling
        known = prompt + len(request.generated)
        if known >= self.max_model_len:
            raise ContextLengthExceeded(known, self.max_model_len)
        biased = [token for token, _ in sampling.logit_bias]
        given = (("prompt", request.prompt), ("generated", request.generated), ("logit_bias", biased))
        for what, tokens in given:
            if tokens and not 0 <= min(tokens) <= max(tokens) < self.decoder.vocabulary:
                raise InvalidRequest(
                    f"the token ids of {what} are from {min(tokens)} to {max(tokens)}, but the model's are from 0 to "
                    f"{self.decoder.vocabulary - 1}",
                    param=what,
                )
        mixture = [(w if isinstance(w, PackedAdapter) else self.pack(w), weight) for w, weight in request.adapters]
        self.slots.check([packed for packed, _ in mixture])
        sequence = ActiveSequence(
            [*request.prompt, *request.generated],
            prompt,
            limit=min(self.max_model_len, prompt + sampling.max_tokens),
            mixture=tuple(sorted((packed.key, weight) for packed, weight in mixture)),
            sampling=sampling,
            seed=random.getrandbits(64) if sampling.seed is None else sampling.seed,
            adapters=[packed for packed, _ in mixture],
            tenant=request.tenant,
            ends=() if sampling.ignore_eos else self.codec.eos_ids,
        )
        text = self.codec.stream(sampling.stop)
        for token in request.generated:  # their text is known
            text.push(token)
        with self._wake:
            if wait:
                self._wake.wait_for(lambda: self._closed or not self._full)
            if self._closed:
                raise LorauterError("the engine is closed")
            if not request.generated:  # what has begun elsewhere is to end
                if self._full:
                    running, waiting = self.load
                    raise Overloaded(
                        f"{running} requests run and {waiting} wait, and no more may; try again later",
                        retry_after_s=_RETRY_AFTER_S,
                    )
                if not wait:
                    self.pace.check(self._unfinished + 1)
            self._front.expect(sequence, sink, text)
            self._unfinished += 1
            self._inbox.append(("begin", sequence))
            self._wake.notify_all()
        return sequence

    @property
    def _full(self) -> bool:
        """Whether as many requests are here as may run and wait together."""
        return self._unfinished >= self.config.max_batch + self.config.max_queue

    def _cancel(self, sequence: ActiveSequence) -> None:
        """Let a sequence go at the next step; of no effect on one that has ended."""
        self._front.forget(sequence)
        if not sequence.ended:
            with self._wake:
                self._inbox.append(("drop", sequence))
                self._wake.notify_all()

    # --- the thread's side

    def _run(self) -> None:
        try:
            while self._wait():
                self._busy_since = time.monotonic()
                try:
                    if self._turn():
                        self._failures = 0
                except Exception as error:  # noqa: BLE001 (one bad step must not end the service)
                    self._failures += 1
                    self._flights.clear()
                    self._end([(sequence, error) for sequence in self.scheduler.abandon()])
                self._busy_since = None
        finally:  # also when the device is beyond use: nobody may be left waiting
            with self._wake:
                self._closed = True
                self._wake.notify_all()
            self._front.close(LorauterError("the engine was closed"))
            self._runner.close()

    def _wait(self) -> bool:
        """Wait for work, and take it in; False once the engine is closed."""
        if self._lockstep:
            self._front.drain()
        with self._wake:
            self._wake.wait_for(
                lambda: self._closed or self._inbox or self._flights or self.scheduler.running or self.scheduler.waiting
            )
            while self._inbox:
                what, sequence = self._inbox.popleft()
                if what == "begin":
                    self.scheduler.waiting.append(sequence)
                elif not sequence.ended:
                    self.scheduler.drop(sequence)
                    self._finished([sequence])
            return not self._closed

    def _turn(self) -> bool:
        """Launch the next step if there is one, and take the tokens of the one before it, or of this one, if it is time
        to. Returns whether it has."""
        self.slots.begin_step()
        plan = self.scheduler.plan()
        if plan is not None:
            self._flights.append((plan, self._runner.launch(plan), time.perf_counter()))
        if self._flights and (plan is None or len(self._flights) > self._runner.overlaps):
            done, flight, launched = self._flights.popleft()
            tokens = flight.wait()
            events = self.scheduler.take(tokens)
            now = time.perf_counter()
            prompt_tokens = sum(piece.count for piece in done.prompts)
            self.pace.step(len(done.decoding), prompt_tokens, now - max(launched, self._taken))
            self._taken = now
            self._end([event if event.token != NOT_FINITE else _not_finite(event.sequence) for event in events])
            return True
        return False

    def _fail(self, sequence: ActiveSequence, error: Exception) -> None:
        self._end([(sequence, error)])

    def _end(self, events: Sequence[Event | tuple[ActiveSequence, Exception]]) -> None:
        """Hand out what a step brought, and count who has ended by it."""
        if events:
            self._front.put(events)
        self._finished([s for s in (e.sequence if isinstance(e, Event) else e[0] for e in events) if s.ended])

    def _finished(self, sequences: Sequence[ActiveSequence]) -> None:
        if sequences:
            for sequence in sequences:
                if len(sequence.tokens) > sequence.prompt:  # else nothing of it was answered
                    self.pace.answered(sequence.prompt - sequence.reused, len(sequence.tokens) - sequence.prompt)
            with self._wake:
                self._unfinished -= len(sequences)
                self._wake.notify_all()


def _weakly(method: Callable[P, None]) -> Callable[P, None]:
    """A method that keeps its object no longer: a closed engine's memory is free once nobody has the engine."""
    reference = WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        alive = reference()
        if alive is not None:
            alive(*args, **kwargs)

    return call


def _not_finite(sequence: ActiveSequence) -> tuple[ActiveSequence, LorauterError]:
    names = [name for (name, _), _ in sequence.mixture]
    if names:
        problem = f"the model's output is not finite under the adapters {names} with these weights"
        return sequence, InvalidRequest(problem, param="adapters")
    return sequence, LorauterError("the base model's output is not finite, without any adapter")


def _make_runner(model: Decoder, config: EngineConfig, length: int) -> tuple[AdapterSlots, Runner]:
    """The adapters' place on the device, and what runs steps there."""
    budget = config.adapter_bytes or default_budget(model.device)
    if model.device.type == "cuda":
        from lorauter.engine.cuda_runner import make_cuda_runner

        return make_cuda_runner(model, config, length, budget)
    slots = AdapterSlots(
        model.shape, budget_bytes=budget, max_rank=config.max_rank, dtype=model.dtype, device=model.device
    )
    wanted = config.max_batch * blocks_of(length)
    blocks = min(wanted, (config.cache_bytes or _CPU_CACHE_BYTES) // model.block_bytes())
    model.check_blocks(blocks, length)
    runner = Runner(model, slots, rows=config.max_batch, blocks=blocks, length=length, step_tokens=config.step_tokens)
    return slots, runner
