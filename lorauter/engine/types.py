"""What goes into an engine and what comes out: the engine seam, and the fake behind it.

Knows nothing of models, schedulers or HTTP.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from lorauter.errors import InvalidRequest

if TYPE_CHECKING:
    from lorauter.adapters.weights import LoraWeights
    from lorauter.engine.slots import PackedAdapter

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen.

    Attributes:
        max_tokens: tokens to generate at most, at least 1; the room left in the context bounds it too.
        temperature: 0 takes the likeliest token; above, logits are divided by it before sampling.
        top_p: sample only from the likeliest tokens whose probabilities sum to this, in (0, 1].
        stop: texts that end the answer; they are not part of it.
        seed: makes the sample repeatable, as far as the hardware's arithmetic is. None draws a fresh one.
        ignore_eos: go on after an end-of-text token; for measuring.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

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


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to continue under a mixture of adapters.

    Attributes:
        prompt: token ids.
        adapters: adapters with their weights w_k; empty means the base model. The weights are used as they are:
            every adapted layer computes `y = W x + sum_k w_k s_k B_k A_k x`. An adapter that serves many requests is
            best packed once (`MultiLoraEngine.pack`).
        sampling: how tokens are chosen.
        generated: the answer's first tokens, which another engine has made: what comes is what would have come after
            them. Repeatable sampling needs a seed.
    """

    prompt: tuple[int, ...]
    adapters: tuple[tuple[LoraWeights | PackedAdapter, float], ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if len(self.generated) >= self.sampling.max_tokens:
            raise InvalidRequest("as many tokens as max_tokens are generated already", param="generated")
        for weights, weight in self.adapters:
            if not math.isfinite(weight):
                raise InvalidRequest(f"the weight of adapter {weights.name!r} is {weight}", param="adapters")


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer: new text, the ids of the tokens behind it, and in the last one why it ended."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> Completion:
        """Join an answer's chunks, the last of which carries the finish reason."""
        reason = chunks[-1].finish_reason
        assert reason is not None
        return cls("".join(c.text for c in chunks), tuple(t for c in chunks for t in c.token_ids), reason)


class Engine(Protocol):
    """Continues prompts, many at a time."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk]:
        """The answer as it comes. Closing the iterator cancels the request.

        Raises (on the first step):
            Overloaded: the queue is full, or too long for `max_slowdown`.
            ContextLengthExceeded: the prompt leaves no room for an answer.
            AdapterRejected, AdapterUnavailable: an adapter does not fit the model or the memory.
        """

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """All answers, in the order of the requests; waits for a place in the queue."""

    def check_health(self) -> None:
        """Raise if the engine no longer works."""

    def close(self) -> None:
        """Stop, cancelling what runs."""


class EchoEngine:
    """The fake: answers with the prompt's own token ids, one a chunk, spelled out as numbers."""

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk]:
        ids = request.prompt[: request.sampling.max_tokens]
        for i, token in enumerate(ids):
            last = i == len(ids) - 1
            yield Chunk(f"{token} ", (token,), ("length" if last else None))

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        return [
            Completion("".join(f"{t} " for t in ids), ids, "length")
            for request in requests
            for ids in [request.prompt[: request.sampling.max_tokens]]
        ]

    def check_health(self) -> None:
        return

    def close(self) -> None:
        return
