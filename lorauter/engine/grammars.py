"""Answers held to grammars: which tokens may come next, found beside the device's work, by llguidance.

In the midst of free text a great many may, and it takes ten times as long as elsewhere to find out which; the likeliest
token is nearly always one of them there. So for answers that take it, it is only asked then whether it may come.
Knows tokens and grammars; knows nothing of models, steps or devices.
"""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from string import punctuation
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from lorauter.engine.board import MaskBoard, Seat, Words
from lorauter.engine.types import Grammar
from lorauter.errors import InvalidRequest
from lorauter.tools.formats import ToolFormat
from lorauter.tools.grammar import calls_grammar
from lorauter.tools.types import ToolUse

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = 256  # compiled grammars
_LONGEST = 1 << 20  # characters of one
# A space, or a new line and its indentation: where more may follow, some models make nothing else.
_WHITESPACE = r"( |\n {0,16}|\n\t{0,8})?"
_TRIED = 256  # parts of a schema that are looked at for what is wrong
_BATCHES = 4  # whose masks are found at once: what takes long keeps nobody else waiting
_MOST_THREADS = 4  # masks of a step are so short that more would wait for one another
_DEAR_S = 0.05  # to compile a grammar
_PROBE = "these"  # where it may come next, nearly anything may
# Of what a single step may take: about 15 ms.
_LIMITS = LLParserLimits(step_lexer_fuel=200_000, step_max_items=50_000)


class _Lane:
    """A compiled grammar. Copies of a matcher share its lexer behind a lock, so that their masks are found one after
    another: answers beside each other are copies of several, unless these take long to compile."""

    def __init__(self, matcher: LLMatcher, seconds: float) -> None:
        self._matcher = matcher
        self.is_dear = seconds > _DEAR_S
        self.answers: weakref.WeakSet[Held] = weakref.WeakSet()

    def begin(self, index: int, greedy: bool) -> Held:
        """An answer."""
        held = Held(self._matcher.deep_copy(), index, greedy)
        self.answers.add(held)
        return held


class Held(Seat):
    """An answer that is held to a grammar: what it has so far, and what may come next.

    Attributes:
        matcher: what it has.
        greedy: whether it takes the likeliest of the tokens that may come.
        masks: done once it is known what may come, or that nearly anything may.
        free: whether nearly anything may, as far as that has been looked at.
        since: since when that is looked for, in seconds of `time.perf_counter`.
    """

    def __init__(self, matcher: LLMatcher, index: int, greedy: bool) -> None:
        super().__init__(index)
        self.matcher = matcher
        self.greedy = greedy
        self.free: bool | None = None
        self.masks: Future[Sequence[Words | None]] = Future()
        self.since = 0.0
        self._place = 0

    def expect(self, masks: Future[Sequence[Words | None]], place: int) -> None:
        """What may come next will be found at this place."""
        self.masks, self._place, self.since = masks, place, time.perf_counter()

    def mask(self) -> Tensor | None:
        """The tokens that may come next, 32 in each number, (n,) int32, or None for nearly any; waits until they are
        known.

        Raises:
            InvalidRequest: the grammar has become too complex.
        """
        import torch  # whoever only checks a grammar needs none

        words = self._found()
        return None if words is None else torch.from_numpy(words)

    @property
    def known(self) -> bool:
        """Whether `allows` knows."""
        return self.words is not None or self.masks.done()

    def allows(self, token: int) -> bool | None:
        """Whether a token may come next; None if that is not known yet. Raises InvalidRequest as `mask` does."""
        words = self.words
        if words is None:
            if not self.masks.done():
                return None
            words = self._found()
        if words is not None:
            return bool(words[token // 32] >> (token % 32) & 1)
        fits: int = self.matcher.validate_tokens([token])
        self.check()
        return fits == 1

    def _found(self) -> Words | None:
        words = self.masks.result()[self._place]
        self.check()
        return words

    def check(self) -> None:
        """Raise InvalidRequest if the grammar has become too complex."""
        if self.matcher.is_error():
            raise InvalidRequest(f"the answer cannot be held to its grammar: {_short(self.matcher.get_error())}")


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
        self._plain: dict[int, bool] = {}  # tokens that have been looked at: whether they have no punctuation
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[Grammar | None, ToolUse | None], list[_Lane]] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_BATCHES, "masks")
        self._parallel = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 4))
        self._executor: LLExecutor | None = None

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
        held = self._lane(grammar, calls).begin(index, greedy)
        if tokens and not held.matcher.consume_tokens(list(tokens)):
            raise InvalidRequest("what the answer has so far does not fit its grammar", param=_param(grammar))
        self.find(held)
        return held

    def advance(self, came: Sequence[tuple[Held, int]], *, probe: bool = False) -> None:
        """Answers have got a token each; returns at once.

        Args:
            probe: whether for greedy answers not to find out what may come, where nearly anything may.
        """
        for one, _ in came:
            one.index += 1
        self._find([one for one, _ in came], [token for _, token in came], probe)
        time.sleep(0)  # whoever finds it may begin

    def find(self, held: Held) -> None:
        """Find out what may come next in an answer, whatever that takes; returns at once."""
        held.free = None
        self._find([held], (), False)

    def close(self) -> None:
        """Find nothing more."""
        self._threads.shutdown(cancel_futures=True)

    def _find(self, held: Sequence[Held], tokens: Sequence[int], probe: bool) -> None:
        for one in held:
            one.words = None
        masks = self._threads.submit(self._masks, held, tokens, probe)
        for place, one in enumerate(held):
            one.expect(masks, place)

    def _masks(self, held: Sequence[Held], tokens: Sequence[int], probe: bool) -> Sequence[Words | None]:
        with self._lock:
            if self._executor is None:
                self._executor = LLExecutor(self._parallel)
            executor = self._executor
        if tokens:
            executor.consume_token_par([(one.matcher, token) for one, token in zip(held, tokens, strict=True)])
        if probe:
            for one, token in zip(held, tokens, strict=True):
                if one.greedy and (one.free is None or not self._is_plain(token)):
                    one.free = self._is_free(one.matcher)
        wanted = [place for place, one in enumerate(held) if not (probe and one.free)]
        masks = np.zeros((len(held), -(-self._llguidance.vocab_size // 32)), np.int32)
        sound = [(held[place].matcher, place) for place in wanted if not held[place].matcher.is_error()]
        if sound:
            executor.unsafe_compute_mask_ptr(sound, masks.ctypes.data, masks.strides[0], len(held))
        found: list[Words | None] = [None] * len(held)
        for place in wanted:
            found[place] = masks[place]
        if self._board is not None:
            self._board.post([(held[place], masks[place]) for place in wanted if not held[place].matcher.is_error()])
        return found

    def _is_plain(self, token: int) -> bool:
        """Whether free text hardly begins or ends with a token."""
        plain = self._plain.get(token)
        if plain is None:
            text: str = self._source.id_to_token(token) or ""
            plain = self._plain[token] = not any(character in punctuation for character in text)
        return plain

    def _is_free(self, matcher: LLMatcher) -> bool:
        """Whether an answer is in the midst of free text."""
        return bool(matcher.validate_tokens(self._probe) == len(self._probe)) and not matcher.is_error()

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

    def _lane(self, grammar: Grammar | None, calls: ToolUse | None) -> _Lane:
        """The lane with the fewest answers; a new one rather than their second, as far as masks are found at once."""
        if not self._ends:
            raise InvalidRequest("the base model has no token that ends an answer", param=_param(grammar))
        form = grammar, calls
        with self._lock:
            lanes = self._compiled.get(form, [])
            if lanes:
                self._compiled.move_to_end(form)
                lane = min(lanes, key=lambda lane: len(lane.answers))
                if not lane.answers or lane.is_dear or len(lanes) >= self._parallel:
                    return lane
        began = time.perf_counter()
        lane = _Lane(self._compile(grammar, calls), time.perf_counter() - began)
        with self._lock:
            self._compiled.setdefault(form, []).append(lane)
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return lane

    def _compile(self, grammar: Grammar | None, calls: ToolUse | None) -> LLMatcher:
        schemas = [Grammar("json", tool.schema, tool.param) for tool in calls.tools] if calls is not None else []
        parts = schemas if grammar is None else [grammar, *schemas]
        for part in parts:
            _check_length(part)
        source = self._source_of_calls(calls, grammar) if calls is not None else _source(parts[0])
        matcher = LLMatcher(self._llguidance, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            for part in parts:
                check_grammar(part)
            problem = f"{_param(grammar)} cannot be compiled: {_short(matcher.get_error())}"
            raise InvalidRequest(problem, param=_param(grammar))
        return matcher

    def _source_of_calls(self, calls: ToolUse, grammar: Grammar | None) -> str:
        """Calls as llguidance takes them. Raises InvalidRequest."""
        format = self._tool_format
        if format is None:
            raise InvalidRequest("it is not known how the base model calls tools", param="tools")
        ids = {mark: id for mark in format.marks if (id := self._source.token_to_id(mark)) is not None}
        answer: list[dict[str, Any]] = []
        if grammar is not None and not calls.forced:
            source = _source(grammar)
            answer = json.loads(source)["grammars"] if source.startswith("{") else [{"lark_grammar": source}]
        added = self._source.get_added_tokens_decoder().items()
        beside = [id for id, token in added if not token.special and id not in ids.values() and id not in self._ends]
        return calls_grammar(format, calls, ids, beside=beside, answer=answer)


def check_grammar(grammar: Grammar) -> None:
    """Raise InvalidRequest unless a grammar can be compiled, whatever the tokenizer."""
    _check_length(grammar)
    wrong, found = LLMatcher.validate_grammar_with_warnings(_source(grammar), limits=_LIMITS)
    if wrong:
        raise _broken(grammar, _short(found[0]))


def _check_length(grammar: Grammar) -> None:
    if len(grammar.text) > _LONGEST:
        raise InvalidRequest(
            f"got {len(grammar.text)} characters; a grammar has at most {_LONGEST}", param=grammar.param
        )


def _broken(grammar: Grammar, problem: str) -> InvalidRequest:
    """The error of a grammar that cannot be compiled: of a schema, with the place."""
    where, problem = _where(grammar, problem) if grammar.kind == "json" else ("", problem)
    return InvalidRequest(f"{grammar.param}{where} cannot be compiled: {problem}", param=grammar.param)


def _where(grammar: Grammar, problem: str) -> tuple[str, str]:
    """The smallest part of a schema that cannot be compiled, and what is wrong with it."""
    schema, path = json.loads(grammar.text), list[str]()
    tried = 0
    root = schema
    while tried < _TRIED:
        for name, part in _parts(schema):
            tried += 1
            defined = {key: root[key] for key in ("$defs", "definitions") if key in root and key not in part}
            whole = json.dumps({**part, **defined})
            compiled = LLMatcher.grammar_from_json_schema(whole)
            wrong, found = LLMatcher.validate_grammar_with_warnings(compiled, limits=_LIMITS)
            if wrong:
                schema, path, problem = part, [*path, name], _short(found[0])
                break
        else:
            break
    return f" at {'.'.join(path)}" if path else "", problem


def _parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas in a schema, with where they are."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if isinstance(value, dict) and key in ("properties", "patternProperties", "$defs", "definitions"):
            yield from ((f"{key}.{name}", part) for name, part in value.items() if isinstance(part, dict))
        elif isinstance(value, list) and key in ("anyOf", "allOf", "oneOf", "prefixItems"):
            yield from ((f"{key}.{i}", part) for i, part in enumerate(value) if isinstance(part, dict))
        elif isinstance(value, dict) and key in ("items", "additionalProperties", "not"):
            yield key, value


def _param(grammar: Grammar | None) -> str:
    return "tools" if grammar is None else grammar.param


def _source(grammar: Grammar) -> str:
    """A grammar as llguidance takes it. Raises InvalidRequest."""
    try:
        if grammar.kind == "json":
            options: Any = {"whitespace_pattern": grammar.whitespace or _WHITESPACE}
            return LLMatcher.grammar_from_json_schema(grammar.text, overrides=options)
        if grammar.kind == "choice":
            texts = [json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text)]
            if not texts:
                raise ValueError("there is nothing to choose from")
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(texts)}")
        return grammar_from("regex" if grammar.kind == "regex" else "grammar", grammar.text)
    except ValueError as error:
        raise InvalidRequest(
            f"{grammar.param} cannot be compiled: {_short(str(error))}", param=grammar.param
        ) from error


def _short(problem: str) -> str:
    """An error in one line that is not too long, without the parser's state."""
    return " ".join(problem.partition("<state>")[0].split())[:500]
