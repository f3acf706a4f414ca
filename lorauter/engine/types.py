"""What goes into an engine and what comes out.

Knows nothing of models, schedulers or HTTP.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from lorauter.errors import InvalidRequest
from lorauter.pickled import Sparse
from lorauter.tools.types import ToolUse

if TYPE_CHECKING:
    from lorauter.adapters.weights import LoraWeights
    from lorauter.engine.messages import Adapter

FinishReason = Literal["stop", "length"]
GrammarKind = Literal["json", "regex", "choice", "grammar"]
MOST_LOGPROBS = 20
MOST_BAD_WORDS, MOST_BAD = 1024, 1 << 14  # texts that may not come, and their characters


@dataclass(frozen=True)
class Grammar:
    """What an answer has to be.

    Attributes:
        kind: what `text` is: a JSON schema, a regular expression, a JSON list of texts of which it is one, or a grammar
            in Lark's or GBNF's language.
        text: it.
        param: what the request calls it, for errors.
        whitespace: of a schema, a regular expression of what may be between JSON's tokens; None takes little.
    """

    kind: GrammarKind
    text: str
    param: str = field(default="grammar", compare=False)
    whitespace: str | None = None

    @classmethod
    def of_answers(cls, answers: Sequence[str] | Mapping[str, Any], *, param: str) -> Grammar:
        """One of some texts, or what is of a JSON schema."""
        return cls("json" if isinstance(answers, Mapping) else "choice", json.dumps(answers), param)


@dataclass(frozen=True)
class Prompt(Sparse):
    """What is to be answered: a chat, a text, or token ids; one of them.

    Attributes:
        messages: a chat of `{"role", "content", "tool_calls"?, "tool_call_id"?, "name"?}`.
        text: a text that is continued.
        token_ids: the same as tokens; an `array` of C's ints travels and is checked at once.
        add_generation_prompt: a chat's prompt ends where the assistant's answer begins.
        continue_final_message: it ends with its last message, which the answer goes on with.
        template_kwargs: variables of the chat template.
        add_special_tokens: a text begins with what the tokenizer puts before one.
        parse_special: what looks like a control token in a text is one.
        tools: what a chat's answer may call, as chat templates take it: `{"type": "function", "function": {...}}`.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    token_ids: Sequence[int] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = True
    parse_special: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()

    @cached_property
    def characters(self) -> int:
        """The length of all its text."""
        return len(self.text or "") + sum(map(_characters, (*self.messages, *self.tools)))


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict | Mapping):  # the first is told at once
        return sum(map(_characters, [*value, *value.values()]))
    return sum(map(_characters, value)) if isinstance(value, list) else 0


@dataclass(frozen=True)
class SamplingParams(Sparse):
    """How tokens are chosen.

    Attributes:
        max_tokens: tokens to generate at most, at least 1; the room left in the context bounds it too.
        temperature: 0 takes the likeliest token; above, logits are divided by it before sampling.
        top_p: sample only from the likeliest tokens whose probabilities sum to this, in (0, 1].
        stop: texts that end the answer; they are not part of it, but for `include_stop_str_in_output`.
        seed: makes the sample repeatable, as far as the hardware's arithmetic is. None draws a fresh one.
        ignore_eos: go on after an end-of-text token; `stop_token_ids` still end the answer.
        top_k: sample only from so many of the likeliest tokens; 0 from all.
        min_p: sample only from tokens at least this share as likely as the likeliest, in [0, 1].
        presence_penalty: taken from the logit of every token that the answer has already, in [-2, 2].
        frequency_penalty: the same for each time that it has it.
        repetition_penalty: divides the logits above 0, and multiplies those below, of tokens that the prompt or the
            answer has (arXiv 1909.05858); above 0, and 1 changes nothing.
        logit_bias: (token, what is added to its logit).
        min_tokens: nothing ends the answer before it has so many.
        stop_token_ids: tokens that end the answer, beside the model's own.
        include_stop_str_in_output: whether what ends the answer, stop string or token, is part of its text.
        skip_special_tokens: whether the text is without the tokenizer's special tokens.
        allowed_token_ids: the only tokens that may come; empty is all.
        bad_words: texts that may not come, or the tokens of one; the engine takes a text as the tokens that the
            tokenizer makes of it, alone and after a space.
        logprobs: how many of the likeliest tokens are told with each token of the answer, beside itself, with the
            logarithms of their probabilities by the model alone, whatever changes or forbids tokens; None tells none.
        prompt_logprobs: the same for the tokens of the prompt, all of which are computed then.
        grammar: what the answer has to be; it ends with an end-of-text token, also where these are ignored.
        calls: the tools that the answer may call, or has to: then, and where one of them is strict or there is a
            grammar, it is held to their schemas, and to the grammar where it is no call. The marks of calls are part of
            its text.
        detokenize: whether the answer comes as text, too. Where it does not, text ends nothing, and no token is told
            with what it was chosen from.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    calls: ToolUse | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens is {self.max_tokens}; it must be at least 1", param="max_tokens")
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 100):
            raise InvalidRequest(
                f"temperature is {self.temperature}; it must be between 0 and 100", param="temperature"
            )
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p is {self.top_p}; it must be above 0 and at most 1", param="top_p")
        if not all(self.stop):
            raise InvalidRequest("stop holds an empty string", param="stop")
        if self.top_k < 0:
            raise InvalidRequest(f"top_k is {self.top_k}; it must be at least 0", param="top_k")
        for name, least, most in (("min_p", 0, 1), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2)):
            if not least <= getattr(self, name) <= most:
                problem = f"{name} is {getattr(self, name)}; it must be between {least} and {most}"
                raise InvalidRequest(problem, param=name)
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            problem = f"repetition_penalty is {self.repetition_penalty}; it must be above 0"
            raise InvalidRequest(problem, param="repetition_penalty")
        if not all(math.isfinite(bias) for _, bias in self.logit_bias):
            raise InvalidRequest("logit_bias holds a number that is not finite", param="logit_bias")
        if not 0 <= self.min_tokens <= self.max_tokens:
            problem = (
                f"min_tokens is {self.min_tokens}; it must be at least 0 and at most max_tokens, {self.max_tokens}"
            )
            raise InvalidRequest(problem, param="min_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            if not 0 <= (getattr(self, name) or 0) <= MOST_LOGPROBS:
                problem = f"{name} is {getattr(self, name)}; it must be between 0 and {MOST_LOGPROBS}"
                raise InvalidRequest(problem, param=name)
        if not all(self.bad_words):
            raise InvalidRequest("bad_words holds an empty string", param="bad_words")
        texts = [word for word in self.bad_words if isinstance(word, str)]  # which take time to be made tokens
        if len(texts) > MOST_BAD_WORDS or sum(map(len, texts)) > MOST_BAD:
            problem = f"got {len(texts)} bad_words of {sum(map(len, texts))} characters; at most {MOST_BAD_WORDS}"
            raise InvalidRequest(f"{problem} of {MOST_BAD} are taken", param="bad_words")
        if not self.detokenize and self.needs_text:
            raise InvalidRequest("stop, logprobs and prompt_logprobs need detokenize", param="detokenize")

    @property
    def needs_text(self) -> bool:
        """Whether text ends the answer, or is told of single tokens."""
        return bool(self.stop) or self.logprobs is not None or self.prompt_logprobs is not None

    @property
    def penalises(self) -> bool:
        """Whether a token's chance depends on what came before, or on a bias, beside the model's logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1 or self.logit_bias)

    @property
    def is_held(self) -> bool:
        """Whether the answer has to be of a grammar."""
        return self.grammar is not None or (self.calls is not None and self.calls.is_held)

    @property
    def forbids(self) -> bool:
        """Whether there are tokens that may not come, now or at times, beside what a grammar forbids."""
        return bool(self.min_tokens or self.allowed_token_ids or self.bad_words)

    @property
    def greedy(self) -> bool:
        """Whether the model's likeliest token is taken, of all or of those that a grammar allows."""
        return self.temperature == 0 and not self.penalises and not self.forbids

    def of_choice(self, index: int) -> SamplingParams:
        """The same for one of several answers to a prompt: each draws from its own numbers, the first as one alone.
        Of the prompt the first one tells."""
        if not index:
            return self
        digest = hashlib.blake2b(f"{self.seed} {index}".encode(), digest_size=8).digest()
        seed = None if self.seed is None else int.from_bytes(digest) >> 1
        return replace(self, seed=seed, prompt_logprobs=None)


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue under a mixture of adapters.

    Attributes:
        prompt: token ids; see `Prompt`.
        adapters: adapters with their weights w_k; empty means the base model. The weights are used as they are:
            every adapted layer computes `y = W x + sum_k w_k s_k B_k A_k x`. An adapter that serves many requests is
            best packed once (`MultiLoraEngine.pack`, `Engine.read`).
        sampling: how tokens are chosen.
        generated: the answer's first tokens, which another engine has made: what comes is what would have come after
            them. Repeatable sampling needs a seed.
        tenant: what was computed of a prompt is used again for those of the same tenant alone.
    """

    prompt: Sequence[int]
    adapters: tuple[tuple[LoraWeights | Adapter, float], ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generated: tuple[int, ...] = ()
    tenant: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if len(self.generated) >= self.sampling.max_tokens:
            raise InvalidRequest("as many tokens as max_tokens are generated already", param="generated")
        for weights, weight in self.adapters:
            if not math.isfinite(weight):
                raise InvalidRequest(f"the weight of adapter {weights.name!r} is {weight}", param="adapters")

    def choices(self, n: int) -> list[GenerationRequest]:
        """Requests for n answers, which differ where tokens are drawn. The prompt is computed once for those that are
        submitted together."""
        return [replace(self, sampling=self.sampling.of_choice(index)) for index in range(n)]


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and the natural logarithm of its probability.

    Attributes:
        token_id: which.
        logprob: the logarithm.
        rank: its place among all tokens, the likeliest being 1.
        token: its text, which need not be whole characters.
    """

    token_id: int
    logprob: float
    rank: int
    token: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token that is there, and the likeliest in its place, itself perhaps among them, the likeliest first."""

    own: Logprob
    top: tuple[Logprob, ...]


PromptLogprobs = tuple[TokenLogprobs | None, ...]
"""Of each token of a prompt; the first has none."""


@dataclass(frozen=True)
class Chunk(Sparse):
    """A piece of an answer.

    Attributes:
        text: new text.
        token_ids: of the tokens behind it.
        finish_reason: in the last one, why it ended.
        cached_tokens: in the first one, how many of the prompt's tokens were found computed.
        waited_s: in the first one, the seconds for which the request waited for a row and its adapters.
        index: of several answers to a prompt, which it belongs to.
        logprobs: of the tokens, if they are wanted.
        prompt_logprobs: in the first one, of the prompt's tokens, if they are wanted.
        stop_string: in the last one, which of the stop strings ended it, if one did.
        kept_s: in the first one, the seconds for which it was there before it was told.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    waited_s: float = field(default=0.0, compare=False)
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs = ()
    stop_string: str | None = None
    kept_s: float = field(default=0.0, compare=False)

    @classmethod
    def joined(cls, chunks: Sequence[Chunk]) -> Chunk:
        """Pieces that follow one another as one."""
        return cls(
            "".join(chunk.text for chunk in chunks),
            tuple(token for chunk in chunks for token in chunk.token_ids),
            chunks[-1].finish_reason,
            chunks[0].cached_tokens,
            chunks[0].waited_s,
            chunks[0].index,
            tuple(logprobs for chunk in chunks for logprobs in chunk.logprobs),
            chunks[0].prompt_logprobs,
            chunks[-1].stop_string,
            chunks[0].kept_s,
        )


@dataclass(frozen=True)
class Completion:
    """A whole answer; see `Chunk`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs = ()

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Completion:
        """Join an answer's chunks, the last of which carries the finish reason."""
        whole = Chunk.joined(chunks)
        assert whole.finish_reason is not None
        return cls(whole.text, whole.token_ids, whole.finish_reason, whole.logprobs, whole.prompt_logprobs)
