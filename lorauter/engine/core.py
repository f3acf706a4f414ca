"""The device's side of an engine: takes orders, plans and launches steps, and reports what each of them brought.

It joins two rooms. The scheduler decides what a step processes, the runner computes it. One thread plans and launches;
on a GPU it plans a step while the one before it is computed. Answers that are held to grammars and take the likeliest
token are like others: a step chooses among the tokens that may come, if it has been found in time which these are, and
else among all; a token that may not come then is refused, and the answer goes on from the one before. Tokens that are
sampled for answers held to grammars are chosen between two steps, once it is known what may come: while that is looked
for, and it goes on longer than the device is busy, steps are launched without them. Knows nothing of text or of who
asks.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lorauter.adapters.weights import LoraWeights
from lorauter.engine.blocks import BlockPool, blocks_of
from lorauter.engine.config import EngineConfig
from lorauter.engine.grammars import Grammars, Held
from lorauter.engine.messages import Begin, Counters, Drop, Facts, Handled, Lockstep, Order, Report
from lorauter.engine.model import Decoder
from lorauter.engine.plan import NOT_FINITE, REFUSED, RowStart, StepPlan
from lorauter.engine.runner import Flight, Runner
from lorauter.engine.scheduler import Scheduler
from lorauter.engine.sequences import ActiveSequence
from lorauter.engine.slots import AdapterSlots, PackedAdapter, default_budget
from lorauter.engine.text import TextCodec
from lorauter.errors import InvalidRequest, LorauterError
from lorauter.weakly import weakly

_CPU_CACHE_BYTES = 4 << 30  # where no setting says how many, at most
_TELL_S = 0.5  # between two reports with counters, while steps go on
_PATIENCE_S = 0.002  # for which it is waited for what may come in an answer, though a step could begin
_POLL_S = 0.0001


class EngineCore:
    """Computes sequences.

    Args:
        model: the base model.
        codec: its tokenizer, for grammars.
        config: settings.
        told: is given each report, by the core's thread; an error once it has ended.

    Attributes:
        facts: what does not change of it.
        slots: the adapters on the device.
        scheduler: for its counters.
    """

    def __init__(
        self, model: Decoder, codec: TextCodec, config: EngineConfig, told: Callable[[Report | Exception], None]
    ) -> None:
        length = min(config.max_model_len, model.max_positions)
        self.slots, self._runner = _make_runner(model, config, length)
        blocks = self._runner.memory.cache.blocks
        self.facts = Facts(model.shape, model.vocabulary, length, self.slots.budget_bytes, blocks)
        self.scheduler = Scheduler(
            config.rows,
            BlockPool(blocks),
            self.slots,
            self._runner.budget,
            reuse=config.prefix_reuse,
            failed=weakly(self._fail),
        )
        board = self._runner.board
        self._grammars = Grammars(codec.backend, codec.eos_ids, model.vocabulary, codec.tool_format, board)
        self._held: dict[int, Held] = {}  # answers that have to be of a grammar
        self._max_rank = config.max_rank
        self._told = told
        self._report = Report()
        self._counted = (0.0, -1)  # when the counters were told last, and whether anything has happened since
        self._sequences: dict[int, ActiveSequence] = {}
        self._came: dict[int, float] = {}  # when those came that do not run yet
        self._waited: dict[int, float] = {}  # how long those waited that have no token yet
        # What is on its way and when it was launched: steps with their plans, and choices.
        self._flights: deque[tuple[StepPlan | None, Flight, float]] = deque()
        self._taken = 0.0  # when the last one's tokens were taken
        self._inbox: deque[Begin | Drop | Lockstep | tuple[Begin, Held | Exception]] = deque()
        self._wake = threading.Condition()
        self._lockstep = False
        self._awaited = 0  # reports that are not handled yet
        self._failures = 0
        self._closed = False
        self._turns = 0
        self._thread = threading.Thread(target=self._run, name="lorauter-engine", daemon=True)
        self._thread.start()

    # --- the callers' side

    def take(self, orders: Sequence[Order]) -> None:
        """Take orders; what is to begin or to end does so together, before the next step is planned. Grammars are
        compiled first."""
        ready = [self._with_grammar(order) for order in orders]
        with self._wake:
            for order in ready:
                if isinstance(order, Handled):
                    self._awaited -= 1
                else:
                    self._inbox.append(order)
            self._wake.notify_all()

    def _with_grammar(self, order: Order) -> Order | tuple[Begin, Held | Exception]:
        if not isinstance(order, Begin) or not order.sampling.is_held:
            return order
        try:
            sampling, answered = order.sampling, order.tokens[order.prompt :]
            index, greedy = len(order.tokens), sampling.greedy
            return order, self._grammars.begin(sampling.grammar, answered, sampling.calls, index=index, greedy=greedy)
        except Exception as error:  # noqa: BLE001 (this request's trouble alone)
            return order, error

    def read(self, path: Path, *, name: str, version: str) -> tuple[PackedAdapter, tuple[str, ...]]:
        """An adapter of a folder, ready for use, and what of it has no effect or is not there; see `Engine.read`."""
        weights = LoraWeights.load(path, name=name, version=version)
        missing = weights.check_fits(self.facts.shape, max_rank=self._max_rank)
        return self.slots.pack(weights), (*weights.warnings, *missing)

    @property
    def running(self) -> int:
        """How many sequences run."""
        return len(self.scheduler.running)

    @property
    def counters(self) -> Counters:
        """What has been counted; may be asked for by any thread."""
        scheduler, slots = self.scheduler, self.slots
        return Counters(
            scheduler.cache_used,
            scheduler.preemptions,
            scheduler.reused,
            replace(slots.counters),
            slots.resident,
            slots.used_bytes,
        )

    def check_health(self) -> None:
        """Raise RuntimeError if the thread is gone."""
        if self._closed or not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended")

    def close(self) -> None:
        """Stop after the current step."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()

    # --- the thread's side

    def _run(self) -> None:
        try:
            while self._wait():
                try:
                    if self._turn():
                        self._failures = 0
                        self._turns += 1
                except Exception as error:  # noqa: BLE001 (one bad step must not end the service)
                    self._failures += 1
                    self._flights.clear()
                    self._end([(sequence, error) for sequence in self.scheduler.abandon()])
                    self._turns += 1
                self._tell()
        finally:  # also when the device is beyond use: nobody may be left waiting
            with self._wake:
                self._closed = True
            self._told(LorauterError("the engine was closed"))
            self._grammars.close()
            self._runner.close()

    def _busy(self) -> bool:
        return bool(self._flights or self.scheduler.running or self.scheduler.waiting)

    def _wait(self) -> bool:
        """Wait for work, and take it in; False once the engine is closed."""
        if not self._busy():
            self._tell(idle=True)
        with self._wake:
            self._wake.wait_for(lambda: self._closed or (self._awaited <= 0 and (self._inbox or self._busy())))
            orders, self._inbox = self._inbox, deque()
            closed = self._closed
        self._turns += bool(orders)
        for order in orders:
            if isinstance(order, Begin):
                self._begin(order)
            elif isinstance(order, tuple):
                begin, held = order
                if isinstance(held, Exception):
                    self._report.failed.append((begin.id, held))
                else:
                    self._held[begin.id] = held
                    self._begin(begin)
            elif isinstance(order, Lockstep):
                self._lockstep = order.on
                if order.on:
                    self.scheduler.forget()
                    self.slots.forget()
            elif (sequence := self._sequences.get(order.id)) is not None:
                self.scheduler.drop(sequence)
                self._report.let_go.append(order.id)
                self._forget(sequence)
        return not closed

    def _begin(self, order: Begin) -> None:
        packed = [adapter for adapter, _ in order.adapters if isinstance(adapter, PackedAdapter)]
        try:
            self.slots.check(packed)
        except LorauterError as error:
            self._report.failed.append((order.id, error))
            self._held.pop(order.id, None)
            return
        sequence = ActiveSequence(
            array("i", order.tokens),
            order.prompt,
            limit=order.limit,
            mixture=tuple(sorted((adapter.key, weight) for adapter, weight in order.adapters)),
            sampling=order.sampling,
            seed=order.seed,
            adapters=packed,
            tenant=order.tenant,
            ends=order.ends,
            id=order.id,
        )
        self._sequences[order.id] = sequence
        self._came[order.id] = order.came
        self.scheduler.waiting.append(sequence)

    def _turn(self) -> bool:
        """Choose what can be chosen, launch the next step if there is one, and take the tokens of all that came before
        it, or of this one too, if it is time to. Returns whether any were taken."""
        self.slots.begin_step()
        aligned = self._lockstep and bool(self._held)
        if aligned:  # what a step is of must not depend on how long it takes to find out what may come
            self._grammars.wait(list(self._held.values()))
        landed = self._choose() if self._held else False
        plan = self.scheduler.plan()
        if self._came:
            self._note_begun()
        if plan is not None:
            if plan.starts:
                self._seat(plan.starts)
            self._flights.append((plan, self._runner.launch(plan), time.perf_counter()))
        ahead = int(self._runner.overlaps and plan is not None and not aligned)
        while len(self._flights) > ahead:
            self._land()
            landed = True
        return landed

    def _note_begun(self) -> None:
        """Note how long those have waited that run now."""
        now = time.monotonic()
        for sequence in self.scheduler.running:
            if (came := self._came.pop(sequence.id, None)) is not None:
                self._waited[sequence.id] = now - came

    def _seat(self, starts: Sequence[RowStart]) -> None:
        """Rows have others now: let what may come in their answers be posted there."""
        rows = {start.row for start in starts}
        for sequence in self.scheduler.running:
            if sequence.row in rows and sequence.row is not None:
                held = self._held.get(sequence.id)
                self._runner.board.give(sequence.row, held if held is not None and held.greedy else None)

    def _choose(self) -> bool:
        """Choose the tokens of answers that are held to grammars, where it is known what may come, or let those go on
        that take the likeliest. Returns whether tokens were taken."""
        undecided = [(sequence, self._held[sequence.id]) for sequence in self.scheduler.undecided]
        self._await_masks([held for _, held in undecided if not (held.greedy and self._flights)])
        chosen, masks = [], []
        for sequence, held in undecided:
            try:
                if not held.known:
                    continue
                mask = held.mask()
                if held.greedy:
                    self.scheduler.resume(sequence)
                else:
                    masks.append(mask)
                    chosen.append(sequence)
            except LorauterError as error:
                self.scheduler.drop(sequence)
                self._end([(sequence, error)])
        if not chosen:
            return False
        flight = self._runner.choose(self.scheduler.choose(chosen), masks)
        self._flights.append((None, flight, time.perf_counter()))
        if self._runner.overlaps:
            return False
        self._land()  # what may come after it is looked for while the next step is computed
        return True

    def _await_masks(self, held: Sequence[Held]) -> None:
        """Wait until it is known what may come in these answers, but no longer than the device is busy, or a moment
        for what is new. In lockstep what runs together must not depend on it."""
        waited = bool(self._flights)  # else there may be nothing to do but to wait
        while late := [one for one in held if not one.known]:
            busy = bool(self._flights) and not self._flights[-1][1].computed
            fresh = time.perf_counter() - max(one.since for one in late) < _PATIENCE_S
            if waited and not (busy or fresh or self._lockstep):
                return
            self._grammars.wait(late, _POLL_S)
            waited = True

    def _land(self) -> None:
        """Take the tokens of the oldest step or choice on its way."""
        done, flight, launched = self._flights.popleft()
        tokens = flight.wait()
        checked = self._check(tokens) if self._held else []
        self._take_scores(flight)
        came = self.scheduler.take(tokens)
        if goes_on := [(held, token) for sequence, held, token in checked if not sequence.ended]:
            self._grammars.advance(goes_on)
        now = time.perf_counter()
        report = self._report
        if done is not None:
            prompt_tokens = sum(piece.size for piece in done.prompts)
            report.step = len(done.decoding), prompt_tokens, now - max(launched, self._taken)
        self._taken = now
        ranked = flight.ranks.of_tokens() if flight.ranks is not None else {}
        if None in came.ended.values():
            self._end([(one.sequence, _not_finite(one.sequence)) for one in came if one.token == NOT_FINITE])
            came = came.sound()
        report.add([sequence.id for sequence in came.sequences], came.tokens, came.ended)
        if ranked:
            report.ranked.update((e.sequence.id, ranked[e.place]) for e in came if e.place in ranked)
        if self._waited:
            for sequence in came.sequences:
                if (waited := self._waited.pop(sequence.id, None)) is not None:  # it is its first
                    report.reused[sequence.id], report.waited[sequence.id] = sequence.reused, waited
        for i in came.ended:
            self._forget(came.sequences[i])

    def _check(self, tokens: list[int]) -> list[tuple[ActiveSequence, Held, int]]:
        """Refuse tokens that may not come, or of which it is not known whether they may; returns the others."""
        checked = []
        for place, sequence in enumerate(self.scheduler.decided):
            held = self._held.get(sequence.id)
            if held is None or self.scheduler.is_void(sequence) or tokens[place] == NOT_FINITE:
                continue
            try:
                if held.takes(tokens[place]):
                    checked.append((sequence, held, tokens[place]))
                else:
                    tokens[place] = REFUSED
                    self._grammars.want(held)
            except LorauterError as error:
                self.scheduler.drop(sequence)
                self._end([(sequence, error)])
        return checked

    def _take_scores(self, flight: Flight) -> None:
        """Note what a step that has landed tells of prompts, but for what is known already."""
        if flight.ranks is None:
            return
        for (sequence, start), scores in zip(self.scheduler.scored(), flight.ranks.of_prompts(), strict=True):
            fresh = start + len(scores) - sequence.told
            if fresh > 0 and not sequence.ended:
                self._report.scored[sequence.id] = scores.after(len(scores) - fresh)
                sequence.told += fresh

    def _fail(self, sequence: ActiveSequence, error: Exception) -> None:
        self._end([(sequence, error)])
        self._tell()  # the step that is about to begin may take its time

    def _end(self, failed: Sequence[tuple[ActiveSequence, Exception]]) -> None:
        for sequence, error in failed:
            self._report.failed.append((sequence.id, error))
            self._forget(sequence)

    def _forget(self, sequence: ActiveSequence) -> None:
        """A sequence has ended."""
        del self._sequences[sequence.id]
        self._held.pop(sequence.id, None)
        self._came.pop(sequence.id, None)
        self._waited.pop(sequence.id, None)
        if len(sequence.tokens) > sequence.prompt:  # else nothing of it was answered
            computed, answer = sequence.prompt - sequence.reused, len(sequence.tokens) - sequence.prompt
            self._report.answered.append((computed, answer))

    def _tell(self, *, idle: bool = False) -> None:
        """Report what there is to say; counters now and then, and before there is nothing to do."""
        report, now = self._report, time.monotonic()
        since, turns = self._counted
        if turns != self._turns and (idle or now - since > _TELL_S):
            report.counters = self.counters
            self._counted = now, self._turns
        if not (report.outcomes or report.step or report.counters):
            return
        self._report = Report()
        report.running, report.failures = self.running, self._failures
        if self._lockstep and report.outcomes:
            report.awaited = True
            with self._wake:
                self._awaited += 1
        self._told(report)


def _not_finite(sequence: ActiveSequence) -> LorauterError:
    names = [name for (name, _), _ in sequence.mixture]
    if names:
        problem = f"the model's output is not finite under the adapters {names} with these weights"
        return InvalidRequest(problem, param="adapters")
    return LorauterError("the base model's output is not finite, without any adapter")


def _make_runner(model: Decoder, config: EngineConfig, length: int) -> tuple[AdapterSlots, Runner]:
    """The adapters' place on the device, and what runs steps there."""
    budget = config.adapter_bytes or default_budget(model.device)
    if model.device.type == "cuda":
        from lorauter.engine.cuda_memory import make_cuda_runner

        return make_cuda_runner(model, config, length, budget)
    slots = AdapterSlots(
        model.shape, budget_bytes=budget, max_rank=config.max_rank, dtype=model.dtype, device=model.device
    )
    wanted = config.rows * blocks_of(length)
    blocks = min(wanted, (config.cache_bytes or _CPU_CACHE_BYTES) // model.block_bytes())
    model.check_blocks(blocks, length)
    runner = Runner(model, slots, rows=config.rows, blocks=blocks, length=length, step_tokens=config.step_tokens)
    return slots, runner
