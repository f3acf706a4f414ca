"""The engine: continuous batching of requests that each carry their own mixture of adapters.

One thread owns the model. Each step it drops what was cancelled, admits what fits, runs one packed batch (one
token for every decoding row, and prompt pieces up to a budget, so that a long prompt does not stall the rest),
samples, and hands out text. Knows nothing of HTTP, Ray, or where adapters come from.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from weakref import WeakValueDictionary

import torch

from lorauter.adapters.weights import LoraWeights
from lorauter.engine.config import EngineConfig
from lorauter.engine.graphs import NOT_FINITE, DecodeGraphs, Flight
from lorauter.engine.kv_cache import KVCache
from lorauter.engine.lora import LoraBatch
from lorauter.engine.model import Decoder, PrefillSpan, StepBatch
from lorauter.engine.pace import Pace
from lorauter.engine.sampling import sample
from lorauter.engine.sequence import ActiveSequence, Sink
from lorauter.engine.slots import AdapterKey, AdapterSlots, Mixture, PackedAdapter, default_budget
from lorauter.engine.stacks import to_device
from lorauter.engine.text import TextCodec
from lorauter.engine.types import Chunk, Completion, GenerationRequest
from lorauter.errors import ContextLengthExceeded, InvalidRequest, LorauterError, Overloaded

_RETRY_AFTER_S = 1.0


class MultiLoraEngine:
    """Serves one base model with any mixture of adapters for every request.

    Args:
        model: the base model.
        codec: its tokenizer.
        config: sizes.

    Attributes:
        decoder: the base model. Whoever else runs on it does so while nothing is to be answered here.
    """

    def __init__(self, model: Decoder, codec: TextCodec, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.codec = codec
        self.max_model_len = min(self.config.max_model_len, model.max_positions)
        self.decoder = model
        on_gpu = model.device.type == "cuda"
        self._cache = KVCache(
            layers=model.shape.layers,
            rows=self.config.max_batch + on_gpu,  # the graphs' padding needs a row of its own
            kv_heads=model.kv_heads,
            length=self.max_model_len,
            head_dim=model.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        self.slots = AdapterSlots(
            model.shape,
            budget_bytes=self.config.adapter_bytes or default_budget(model.device),
            max_rank=self.config.max_rank,
            dtype=model.dtype,
            device=model.device,
        )
        self.pace = Pace(self.config.max_batch, self.config.max_slowdown)
        self._graphs = DecodeGraphs(model, self._cache, self.config.max_batch) if on_gpu else None
        self._flights: deque[tuple[list[ActiveSequence], Flight]] = deque()  # steps whose tokens are not taken yet
        self._graph_rows: list[ActiveSequence] = []  # whose next tokens the graphs' buffers hold
        self._packed: WeakValueDictionary[AdapterKey, PackedAdapter] = WeakValueDictionary()
        self._waiting: deque[ActiveSequence] = deque()
        self._rows: list[ActiveSequence] = []  # decoding rows first; the index is the cache row
        self._lora: LoraBatch | None = None  # the mixtures of `_rows` for graphs, else of `_decode_mixtures`
        self._decode_mixtures: list[Mixture] = []
        self._rows_changed = False
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lorauter-engine", daemon=True)
        self._thread.start()

    # --- the callers' side

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk]:
        """See `Engine.stream`. Chunks that are ready together come as one."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()
        sequence = self.submit(request, lambda item: loop.call_soon_threadsafe(ready.put_nowait, item))
        try:
            while True:
                items = [await ready.get()]
                while not ready.empty():
                    items.append(ready.get_nowait())
                chunks = [item for item in items if isinstance(item, Chunk)]
                if chunks:
                    yield Chunk(
                        "".join(chunk.text for chunk in chunks),
                        tuple(token for chunk in chunks for token in chunk.token_ids),
                        chunks[-1].finish_reason,
                    )
                    if chunks[-1].finish_reason is not None:
                        return
                for item in items:
                    if isinstance(item, BaseException):
                        raise item
        finally:
            self._cancel(sequence)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """See `Engine.generate`. The first request that fails ends the call, and cancels the others."""
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
    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        return len(self._rows), len(self._waiting)

    def held(self) -> threading.Condition:
        """While this is entered no step begins that would admit a request: those submitted meanwhile begin together."""
        return self._wake

    def check_health(self) -> None:
        """Raise RuntimeError if the engine's thread is gone."""
        if self._closed or not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended")

    def close(self) -> None:
        """Stop after the current step; what still runs or waits fails."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()

    def submit(self, request: GenerationRequest, sink: Sink, *, wait: bool = False) -> ActiveSequence:
        """Take a request; `sink` is told each chunk, or the error that ended it, by the engine's thread."""
        prompt = len(request.prompt)
        if prompt >= self.max_model_len:
            raise ContextLengthExceeded(prompt, self.max_model_len)
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.decoder.vocabulary:
            raise InvalidRequest(
                f"the prompt's token ids are from {min(request.prompt)} to {max(request.prompt)}, but the model's "
                f"are from 0 to {self.decoder.vocabulary - 1}",
                param="prompt",
            )
        mixture = [(w if isinstance(w, PackedAdapter) else self.pack(w), weight) for w, weight in request.adapters]
        self.slots.check([packed for packed, _ in mixture])
        sampling = request.sampling
        sequence = ActiveSequence(
            request,
            sink,
            self.codec.stream(sampling.stop),
            random.Random(sampling.seed),
            [*request.prompt, *request.generated],
            limit=min(self.max_model_len, prompt + sampling.max_tokens),
            adapters=[packed for packed, _ in mixture],
            mixture=tuple((packed.key, weight) for packed, weight in mixture),
        )
        for token in request.generated:  # their text is known, and their random numbers are drawn
            sequence.text.push(token)
            sequence.random.random()
        with self._wake:
            if wait:
                self._wake.wait_for(lambda: self._closed or not self._full)
            if self._closed:
                raise LorauterError("the engine is closed")
            if self._full:
                raise Overloaded(
                    f"{len(self._rows)} requests run and {len(self._waiting)} wait, and no more may; try again later",
                    retry_after_s=_RETRY_AFTER_S,
                )
            if not wait and not request.generated:  # what has begun elsewhere is to end
                self.pace.check(len(self._rows) + len(self._waiting) + 1)
            self._waiting.append(sequence)
            self._wake.notify_all()
        return sequence

    @property
    def _full(self) -> bool:
        """Whether as many requests are here as may run and wait together."""
        return len(self._rows) + len(self._waiting) >= self.config.max_batch + self.config.max_queue

    def _cancel(self, sequence: ActiveSequence) -> None:
        """Let a sequence go at the next step; of no effect on one that has ended."""
        sequence.cancelled = True

    # --- the thread's side

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    self._drop_cancelled()
                    self._admit()
                    if self._rows:
                        started = time.perf_counter()
                        work = self._step()
                        self.pace.step(*work, time.perf_counter() - started)
                except Exception as error:  # noqa: BLE001 (one bad step must not end the service)
                    self._flights.clear()
                    for sequence in self._rows:
                        self._deliver(sequence, error)
                    for row in reversed(range(len(self._rows))):
                        self._remove(row)
        finally:  # also when the device is beyond use: nobody may be left waiting
            with self._wake:
                self._closed = True
                self._wake.notify_all()
            for sequence in [*self._rows, *self._waiting]:
                self._deliver(sequence, LorauterError("the engine was closed"))

    def _wait(self) -> bool:
        """Wait for work; False once the engine is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting or self._rows)
            return not self._closed

    def _drop_cancelled(self) -> None:
        if any(sequence.cancelled for sequence in self._rows):
            self._land()
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                self._remove(row)
        with self._wake:
            if any(sequence.cancelled for sequence in self._waiting):
                self._waiting = deque(sequence for sequence in self._waiting if not sequence.cancelled)
                self._wake.notify_all()

    def _admit(self) -> None:
        """Move waiting requests to rows while there is a row and room for their adapters.

        First come, first served, but while a request waits for adapter room, later ones whose adapters are all
        resident go before it (loading for them would only take more room): as many as `max_batch`, then it is next.
        """
        blocked: list[ActiveSequence] = []
        for sequence in list(self._waiting):
            if len(self._rows) == self.config.max_batch:
                return
            if blocked and not (
                blocked[0].passed_over < self.config.max_batch and self.slots.has(key for key, _ in sequence.mixture)
            ):
                continue
            admitted = False
            try:
                soon = {key for other in blocked or [sequence] for key, _ in other.mixture}
                admitted = self.slots.acquire(sequence.adapters, wanted_soon=soon)
            except Exception as error:  # noqa: BLE001 (this request's trouble alone)
                self._deliver(sequence, error)
            else:
                if not admitted:
                    blocked.append(sequence)
                    continue
                for other in blocked:
                    other.passed_over += 1
            self._rows_changed = True  # even if it failed: columns of other adapters may have moved before
            with self._wake:
                self._waiting.remove(sequence)
                if admitted:
                    self._rows.append(sequence)
                self._wake.notify_all()

    def _step(self) -> tuple[int, int]:
        """One step; returns how many rows decoded and how many prompt tokens went through."""
        decoding = sum(sequence.decoding for sequence in self._rows)
        if self._flights and (self._rows_changed or decoding < len(self._rows)):
            self._land()  # what it ends changes the rows again
            return 0, 0
        if self._graphs is None:
            return decoding, self._packed_step(decoding)
        if self._rows_changed:
            self._lora = self.slots.batch([sequence.mixture for sequence in self._rows])
            self._rows_changed = False
            self._graphs.set_mixtures(self._lora)
        prompt_tokens = 0
        if decoding < len(self._rows):
            prompt_tokens = self._packed_step(decoding, prompts_only=True)
        # What a prompt has ended leaves the rows as they were planned, or changes them: then the next step decodes.
        if not decoding or self._rows_changed:
            return 0, prompt_tokens
        self._graph_step(self._graphs, self._rows[:decoding])
        return decoding, prompt_tokens

    def _packed_step(self, decoding: int, *, prompts_only: bool = False) -> int:
        """One forward pass of prompt pieces, whose tokens it counts, and, unless a graph does it, of decoding rows."""
        spans = self._plan_prefill(decoding)
        batch, sampled = self._pack(0 if prompts_only else decoding, spans)
        logits = self.decoder.forward(batch, self._cache)
        for span in spans:
            self._rows[span.row].cached += span.length
        for sequence in self._rows[: batch.decoding]:
            sequence.cached += 1
        self._advance([self._rows[row] for row in sampled], self._sample(sampled, logits))
        return sum(span.length for span in spans)

    def _graph_step(self, graphs: DecodeGraphs, rows: list[ActiveSequence]) -> None:
        """Decode by a graph. Greedy rows go on before the last step's tokens are taken: device and host overlap."""
        if rows != self._graph_rows:
            self._land()
            if self._rows_changed:
                return
            graphs.set_rows([row.tokens[-1] for row in rows], [len(row.tokens) - 1 for row in rows])
            self._graph_rows = rows
        flight = graphs.replay(len(rows))
        if any(row.request.sampling.temperature > 0 for row in rows):
            self._graph_rows = []  # the buffers hold the likeliest tokens, not the sampled ones
            for row in rows:
                row.cached += 1
            self._advance(rows, self._sample(list(range(len(rows))), flight.logits))
            return
        self._flights.append((rows, flight))
        if len(self._flights) > 1:
            self._take_flight()

    def _take_flight(self) -> None:
        """Take the tokens of the oldest step on its way; if that ends a row, of all of them."""
        rows, flight = self._flights.popleft()
        tokens = flight.wait()
        going_on = [(row, token) for row, token in zip(rows, tokens, strict=True) if not row.ended]
        for row, _ in going_on:
            row.cached += 1
        self._advance([row for row, _ in going_on], [token for _, token in going_on])

    def _land(self) -> None:
        """Take the tokens of all steps on their way, so that rows may change."""
        while self._flights:
            self._take_flight()

    def _plan_prefill(self, decoding: int) -> list[PrefillSpan]:
        spans, budget = [], self.config.prefill_tokens
        for row, sequence in enumerate(self._rows[decoding:], start=decoding):
            length = min(budget, len(sequence.tokens) - sequence.cached)
            if not length:
                break
            spans.append(PrefillSpan(row, sequence.cached, length))
            budget -= length
        return spans

    def _pack(self, decoding: int, spans: Sequence[PrefillSpan]) -> tuple[StepBatch, list[int]]:
        """The step's batch, and the rows that its logits belong to."""
        tokens = [sequence.tokens[-1] for sequence in self._rows[:decoding]]
        positions = [len(sequence.tokens) - 1 for sequence in self._rows[:decoding]]
        rows, sampled, outputs = list(range(decoding)), list(range(decoding)), list(range(decoding))
        for span in spans:
            sequence, end = self._rows[span.row], span.start + span.length
            tokens += sequence.tokens[span.start : end]
            positions += range(span.start, end)
            rows += [span.row] * span.length
            if end == len(sequence.tokens):
                sampled.append(span.row)
                outputs.append(len(tokens) - 1)
        device = self.decoder.device

        def ids(values: list[int]) -> torch.Tensor:
            return to_device(torch.tensor(values, dtype=torch.long), device)

        if self._graphs is None:
            lora = self._mixtures(decoding, spans)
        else:
            lora = [(slice(None), self._lora.select(ids(rows)))] if self._lora is not None else []
        return StepBatch(ids(tokens), ids(positions), decoding, spans, ids(outputs), lora), sampled

    def _mixtures(self, decoding: int, spans: Sequence[PrefillSpan]) -> list[tuple[slice, LoraBatch]]:
        """The mixtures of the decoding rows, and of each prompt: of its tokens together, as they are the same."""
        mixtures = [sequence.mixture for sequence in self._rows[:decoding]]
        if self._rows_changed or mixtures != self._decode_mixtures:
            self._lora = self.slots.batch(mixtures)
            self._decode_mixtures, self._rows_changed = mixtures, False
        parts = [(slice(decoding), self._lora)]
        offset = decoding
        for span in spans:
            sequence = self._rows[span.row]
            parts.append(
                (
                    slice(offset, offset + span.length),
                    self.slots.batch([sequence.mixture]),
                )
            )
            offset += span.length
        return [(tokens, lora) for tokens, lora in parts if lora is not None]

    def _sample(self, rows: Sequence[int], logits: torch.Tensor) -> list[int]:
        """A token for each of these rows, or NOT_FINITE."""
        if not rows:
            return []
        sequences = [self._rows[row] for row in rows]
        finite = logits.amax(dim=-1).isfinite() & logits.amin(dim=-1).isfinite()
        tokens = sample(
            logits.nan_to_num(),
            [sequence.request.sampling.temperature for sequence in sequences],
            [sequence.request.sampling.top_p for sequence in sequences],
            [sequence.random.random() for sequence in sequences],
        )
        result: list[int] = tokens.where(finite, NOT_FINITE).tolist()
        return result

    def _advance(self, sequences: Sequence[ActiveSequence], tokens: Sequence[int]) -> None:
        """Hand each of these running sequences its token, and remove what has ended."""
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.sound = token != NOT_FINITE
            if sequence.sound:
                chunk = sequence.take(token, self.codec.eos_ids)
                sequence.ended = chunk.finish_reason is not None
                self._deliver(sequence, chunk)
                continue
            names = [packed.name for packed in sequence.adapters]
            error = (
                InvalidRequest(
                    f"the model's output is not finite under the adapters {names} with these weights", param="adapters"
                )
                if names
                else LorauterError("the base model's output is not finite, without any adapter")
            )
            sequence.tokens.append(0)
            sequence.ended = True
            self._deliver(sequence, error)
        if any(sequence.ended for sequence in sequences):
            self._land()  # steps on their way still write to the rows as they are
            for row in reversed(range(len(self._rows))):
                if self._rows[row].ended:
                    self._remove(row)

    def _remove(self, row: int) -> None:
        """Free a row, keeping the rows dense and the decoding ones first."""
        sequence = self._rows[row]
        if not sequence.sound:
            self._cache.clear(row, len(sequence.tokens))
        self.slots.release([key for key, _ in sequence.mixture])
        self.pace.answered(len(sequence.request.prompt), len(sequence.tokens) - len(sequence.request.prompt))
        decoding = sum(sequence.decoding for sequence in self._rows)
        if row < decoding:
            self._move(decoding - 1, row)
            row = decoding - 1
        self._move(len(self._rows) - 1, row)
        self._rows_changed = True
        self._graph_rows = []
        with self._wake:
            self._rows.pop()
            self._wake.notify_all()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._cache.move(source, target, self._rows[source].cached)
            self._rows[target] = self._rows[source]

    def _deliver(self, sequence: ActiveSequence, item: Chunk | BaseException) -> None:
        try:
            sequence.sink(item)
        except RuntimeError:  # the event loop that waited is gone
            sequence.cancelled = True
