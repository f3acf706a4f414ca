"""Answers held to grammars: which tokens may come next, found beside the device's work, by llguidance.

One thread takes all tokens that have come, and finds together what may come after them: where that is little, a dozen
answers take it a fraction of what a step takes the device. In the midst of free text, where nearly anything may come,
it takes thirty times as long, and so it does with a grammar that is made to: another thread finds that, which keeps
nobody waiting; where cores are few it finds what is asked for alone. What has not been found when it is needed is not
waited for: whether the token that was chosen may come is asked of a second matcher then. Both threads leave the
interpreter to whoever else runs, all but a moment. Knows tokens and grammars; knows nothing of models, steps or
devices.
"""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from lorauter.engine.board import MaskBoard, Seat
from lorauter.engine.grammar_sources import LIMITS, check_grammar, check_length, one_line, param_of, source_of
from lorauter.engine.types import Grammar
from lorauter.errors import InvalidRequest
from lorauter.tools.formats import ToolFormat
from lorauter.tools.grammar import calls_grammar
from lorauter.tools.types import ToolUse

if TYPE_CHECKING:
    from torch import Tensor

_KEPT, _KEPT_CHARACTERS = 256, 1 << 20  # compiled grammars, and what they are made of: they take a hundred times that
_MOST_THREADS = 4  # masks of a step are so short that more would wait for one another
_DEAR_S = 0.05  # to compile a grammar
_SLOW_S = 0.003  # to tell of a token whether it may come: nobody else is to wait for that
_LONG_S = 0.003  # to find what may come: the same
_PROBE = "e"  # where it may come next, nearly anything may


@dataclass(eq=False)
class _Lane:
    """A compiled grammar. Copies of a matcher share its lexer behind a lock, so that their masks are found one after
    another: answers beside each other are copies of several, unless these take long to compile."""

    matcher: LLMatcher
    answers: weakref.WeakSet[Held] = field(default_factory=weakref.WeakSet)


@dataclass(eq=False)
class _Form:
    """A grammar in all its copies: one that tokens are checked by, and those that masks are found by."""

    checker: LLMatcher
    lanes: list[_Lane]
    is_dear: bool
    ends: Collection[int]


class Held(Seat):
    """An answer that is held to a grammar: what it has so far, and what may come next.

    Attributes:
        greedy: whether it takes the likeliest of the tokens that may come.
        since: since when it is looked for what may come, in seconds of `time.perf_counter`.
        matcher: what it has, but for `coming`: the tokens from `reached` on.
        busy: whether a thread has it.
        queued: whether the thread that keeps nobody waiting is to take it.
        long: whether it took long to find what may come, and would keep others waiting.
        slow: whether it takes too long to tell of one token whether it may.
        error: why it cannot go on.
        wanted: whether it is of use to find what may come, even where that takes long and there are few cores.
    """

    def __init__(
        self, form: _Form, lane: _Lane, index: int, greedy: bool, wait: Callable[[Sequence[Held]], None]
    ) -> None:
        super().__init__(index)
        self.greedy = greedy
        self.since = time.perf_counter()
        self.matcher = lane.matcher.deep_copy()
        self.reached = index
        self.coming: list[int] = []
        self.busy = self.queued = self.slow = self.long = False
        self.error: str | None = None
        self.wanted = True  # as it is at the beginning
        self._wait = wait
        self._ends = form.ends
        self._checker = form.checker.deep_copy()
        self._unchecked: list[int] = []  # what it has beyond the checker
        lane.answers.add(self)

    def begin(self, tokens: Sequence[int]) -> bool:
        """It has these; False if they do not fit."""
        self._unchecked = list(tokens)
        return self.matcher.consume_tokens(list(tokens))

    @property
    def known(self) -> bool:
        """Whether `mask` would return, or raise, at once."""
        return self.words is not None or self.error is not None

    def mask(self) -> Tensor:
        """The tokens that may come next, 32 in each number, (n,) int32; waits until they are known.

        Raises:
            InvalidRequest: the grammar has become too complex.
        """
        import torch  # whoever only checks a grammar needs none

        self._wait([self])
        self.check()
        assert self.words is not None
        return torch.from_numpy(self.words)

    def takes(self, token: int) -> bool:
        """Whether a token may come next: it has it then. False too if that cannot be told before `mask`.

        Raises:
            InvalidRequest: the grammar has become too complex.
        """
        self.check()
        words = self.words
        known = words is not None and bool(words[token // 32] >> (token % 32) & 1)
        if not known and (words is not None or self.slow or not self._fits(token)):
            return False
        self._unchecked.append(token)
        return True

    def _fits(self, token: int) -> bool:
        began = time.thread_time()
        checker, tokens = self._checker, self._unchecked
        if tokens:
            checker.consume_tokens(tokens)
            self._unchecked = []
        fits: bool
        if checker.is_stopped():
            fits = token in self._ends
        elif given := checker.compute_ff_tokens():  # a text, of which masks have the first token alone
            fits = given[0] == token
        else:
            fits = checker.validate_tokens([token]) == 1
        if time.thread_time() - began > _SLOW_S:
            self.slow = True
        return fits

    def check(self) -> None:
        """Raise InvalidRequest if the grammar has become too complex."""
        if self.error is not None:
            raise InvalidRequest(f"the answer cannot be held to its grammar: {one_line(self.error)}")


class Grammars:
    """Compiles grammars for a tokenizer, and finds what may come next in answers.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        ends: tokens that end an answer; at least one.
        vocabulary: tokens that the model knows.
        tool_format: how it writes calls of tools, if it does.
        board: where what may come next is posted.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Collection[int],
        vocabulary: int,
        tool_format: ToolFormat | None = None,
        board: MaskBoard | None = None,
    ) -> None:
        self._source = tokenizer
        self._ends = ends
        self._vocabulary = vocabulary
        self._tool_format = tool_format
        self._board = board
        self._probe: list[int] = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[Grammar | None, ToolUse | None], _Form] = OrderedDict()
        self._lock = threading.Lock()
        self._parallel = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 4))
        self._news = threading.Condition()
        self._came: SimpleQueue[Sequence[tuple[Held, int | None]] | None] = SimpleQueue()
        self._long: SimpleQueue[Held | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def begin(
        self,
        grammar: Grammar | None,
        tokens: Sequence[int] = (),
        calls: ToolUse | None = None,
        *,
        index: int = 1,
        greedy: bool = False,
    ) -> Held:
        """An answer that is to be held to a grammar, to calls of tools, or to either. Compiles them, if they are new.

        Args:
            grammar: of the answer, or of what is no call.
            tokens: what the answer has already.
            calls: the tools that it may call, or has to.
            index: of its next token, in its sequence.
            greedy: whether it takes the likeliest of the tokens that may come.

        Raises:
            InvalidRequest: it is no such grammar, or the tokens are not of it.
        """
        form, lane = self._lane(grammar, calls)
        held = Held(form, lane, index, greedy, self.wait)
        if tokens and not held.begin(tokens):
            raise InvalidRequest("what the answer has so far does not fit its grammar", param=param_of(grammar))
        self._start()
        self._came.put([(held, None)])
        return held

    def advance(self, came: Sequence[tuple[Held, int]]) -> None:
        """Answers have got a token each; what may come after it is looked for. Returns at once."""
        now = time.perf_counter()
        for one, _ in came:
            one.index += 1
            one.since, one.wanted = now, not one.greedy
        self._came.put(came)

    def wait(self, held: Sequence[Held], timeout: float | None = None) -> None:
        """Wait until it is known what may come next in all of these, but not longer than so many seconds."""
        for one in held:
            self.want(one)
        with self._news:
            self._news.wait_for(lambda: all(one.known for one in held), timeout)

    def want(self, held: Held) -> None:
        """Find what may come next in any case. Returns at once."""
        if not (held.wanted or held.known):
            held.wanted = True
            self._came.put([(held, None)])

    def close(self) -> None:
        """Find nothing more."""
        with self._lock:
            threads, self._threads = self._threads, []
        if threads:
            self._came.put(None)
        for _ in threads[1:]:
            self._long.put(None)
        for thread in threads:
            thread.join()

    # --- the threads' side

    def _start(self) -> None:
        with self._lock:
            if not self._threads:
                self._threads = [
                    threading.Thread(target=run, name="masks", daemon=True)
                    for run in (self._find_short, self._find_long)
                ]
                for thread in self._threads:
                    thread.start()

    def _find_short(self) -> None:
        """Find what may come next where that is soon found."""
        executor, idle = LLExecutor(self._parallel), self._idle()
        while self._take_short(executor, idle):
            pass

    def _take_short(self, executor: LLExecutor, idle: LLMatcher) -> bool:
        """Take all tokens that have come, once there are any. Whether there may be more."""
        answers: dict[Held, None] = {}  # in their order
        came = self._came.get()
        while came is not None:
            for held, token in came:
                if token is not None:
                    held.coming.append(token)
                answers[held] = None
            if self._came.empty():
                break
            came = self._came.get()
        with self._lock:  # those that the other thread has come again
            mine = [held for held in answers if not (held.busy or held.long)]
            for held in mine:
                held.busy = True
        began = time.perf_counter()
        _consume(executor, idle, mine)
        if time.perf_counter() - began > _LONG_S:
            for held in mine:
                held.long = True
        most = len(self._probe)
        short = [held for held in mine if not held.long and held.matcher.validate_tokens(self._probe) < most]
        if short:
            self._find(executor, idle, short)
        for held in mine:
            held.busy = False
        for held in answers.keys() - set(short):
            if not held.queued:
                held.queued = True
                self._long.put(held)
        return came is not None

    def _find_long(self) -> None:
        """Find what may come next in the other answers."""
        executor, idle = LLExecutor(self._parallel), self._idle()
        while self._take_long(executor, idle):
            pass

    def _take_long(self, executor: LLExecutor, idle: LLMatcher) -> bool:
        """Take some answers, once there are any. Whether there may be more."""
        waiting: dict[Held, None] = {}  # one may have come again meanwhile
        held = self._long.get()
        while held is not None:
            held.queued = False
            waiting[held] = None
            if self._long.empty() or len(waiting) == self._parallel:
                break
            held = self._long.get()
        with self._lock:  # those that the other thread has it will pass on again
            wanted = [one for one in waiting if one.wanted or self._parallel > 1]
            mine = [one for one in wanted if not one.busy and (one.coming or not one.known)]
            for one in mine:
                one.busy = True
        if mine:
            self._find(executor, idle, mine)
        for one in mine:
            one.busy = False
            if one.coming:
                self._came.put([(one, None)])
        return held is not None

    def _idle(self) -> LLMatcher:
        """A matcher that does nothing."""
        return LLMatcher(self._llguidance, "", log_level=0)

    def _find(self, executor: LLExecutor, idle: LLMatcher, answers: Sequence[Held]) -> None:
        """Find what may come next after what has come, and post it."""
        began = time.perf_counter()
        masks = np.empty((len(answers), -(-self._llguidance.vocab_size // 32)), np.int32)
        matchers = [(held.matcher, place) for place, held in enumerate(answers)]
        try:
            _consume(executor, idle, answers)
            executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, masks.strides[0], len(answers))
        except Exception as error:  # noqa: BLE001 (the trouble of these answers alone)
            for held in answers:
                held.error = str(error)
        took = time.perf_counter() - began > _LONG_S
        for held, words in zip(answers, masks, strict=True):
            held.found = held.reached, words
            held.long = took
            if held.matcher.is_error():
                held.error = held.matcher.get_error()
        if self._board is not None:
            self._board.post(answers)
        with self._news:
            self._news.notify_all()

    # --- compiling

    @property
    def _llguidance(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._source.to_str(),
                    n_vocab=max(self._vocabulary, self._source.get_vocab_size()),
                    eos_token=sorted(self._ends),
                )
            return self._tokenizer

    def _lane(self, grammar: Grammar | None, calls: ToolUse | None) -> tuple[_Form, _Lane]:
        """The lane with the fewest answers; a new one rather than their second, as far as masks are found at once."""
        if not self._ends:
            raise InvalidRequest("the base model has no token that ends an answer", param=param_of(grammar))
        named = grammar, calls
        with self._lock:
            form = self._compiled.get(named)
            if form is not None:
                self._compiled.move_to_end(named)
                lane = min(form.lanes, key=lambda lane: len(lane.answers))
                if not lane.answers or form.is_dear or len(form.lanes) >= self._parallel:
                    return form, lane
        began = time.perf_counter()
        matchers = self._compile(grammar, calls, 1 if form is not None else 2)
        is_dear = time.perf_counter() - began > _DEAR_S
        lane = _Lane(matchers[0])
        with self._lock:
            form = self._compiled.setdefault(named, form or _Form(matchers[1], [], is_dear, self._ends))
            form.lanes.append(lane)
            while len(self._compiled) > _KEPT or self._is_too_much():
                self._compiled.popitem(last=False)
        return form, lane

    def _is_too_much(self) -> bool:
        """Whether more is kept than may be, beside what was compiled last."""
        sizes = [_characters(*named) for named in self._compiled]
        return len(sizes) > 1 and sum(sizes) > _KEPT_CHARACTERS

    def _compile(self, grammar: Grammar | None, calls: ToolUse | None, copies: int) -> list[LLMatcher]:
        """Matchers that share nothing."""
        schemas = [Grammar("json", tool.schema, tool.param) for tool in calls.tools] if calls is not None else []
        parts = schemas if grammar is None else [grammar, *schemas]
        for part in parts:
            check_length(part)
        source = self._source_of_calls(calls, grammar) if calls is not None else source_of(parts[0])
        tokenizer = self._llguidance
        with ThreadPoolExecutor(copies) as pool:
            makes = [pool.submit(LLMatcher, tokenizer, source, log_level=0, limits=LIMITS) for _ in range(copies)]
        matchers = [make.result() for make in makes]
        if matchers[0].is_error():
            for part in parts:
                check_grammar(part)
            problem = f"{param_of(grammar)} cannot be compiled: {one_line(matchers[0].get_error())}"
            raise InvalidRequest(problem, param=param_of(grammar))
        return matchers

    def _source_of_calls(self, calls: ToolUse, grammar: Grammar | None) -> str:
        """Calls as llguidance takes them. Raises InvalidRequest."""
        format = self._tool_format
        if format is None:
            raise InvalidRequest("it is not known how the base model calls tools", param="tools")
        ids = {mark: id for mark in format.marks if (id := self._source.token_to_id(mark)) is not None}
        answer: list[dict[str, Any]] = []
        if grammar is not None and not calls.forced:
            source = source_of(grammar)
            answer = json.loads(source)["grammars"] if source.startswith("{") else [{"lark_grammar": source}]
        added = self._source.get_added_tokens_decoder().items()
        beside = [id for id, token in added if not token.special and id not in ids.values() and id not in self._ends]
        return calls_grammar(format, calls, ids, beside=beside, answer=answer)


def _characters(grammar: Grammar | None, calls: ToolUse | None) -> int:
    texts = [tool.schema for tool in calls.tools] if calls is not None else []
    texts += [grammar.text, grammar.whitespace or ""] if grammar is not None else []
    return sum(map(len, texts))


def _consume(executor: LLExecutor, idle: LLMatcher, answers: Sequence[Held]) -> None:
    """The matchers of answers have what has come."""
    while waiting := [held for held in answers if held.coming]:
        came = []
        for held in waiting:
            held.reached += 1
            came.append((held.matcher, held.coming.pop(0)))
        executor.consume_token_par([*came, (idle, 0)])  # of one alone llguidance would let nobody else run
