"""One request on its way through the engine. State, and what follows from it; no scheduling."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from lorauter.engine.slots import Mixture, PackedAdapter
from lorauter.engine.text import TextStream
from lorauter.engine.types import Chunk, FinishReason, GenerationRequest

Sink = Callable[[Chunk | BaseException], object]


@dataclass(eq=False)
class ActiveSequence:
    """A request that waits or runs.

    Attributes:
        request, sink: what was asked, and who is told.
        text: decodes its tokens.
        random: its own numbers, so that a seed means the same in any company.
        tokens: prompt and answer so far.
        limit: length at which it is full.
        cached: positions whose keys and values are in the cache.
        sound: these are known to be finite, as the latest logits are.
        adapters, mixture: the adapters that it uses, and their weights by key.
        passed_over: how many later requests were admitted before it.
        cancelled, ended: whether nobody waits for it any more, and whether its last token is there.
    """

    request: GenerationRequest
    sink: Sink
    text: TextStream
    random: random.Random
    tokens: list[int]
    limit: int
    cached: int = 0
    sound: bool = False
    adapters: list[PackedAdapter] = field(default_factory=list)
    mixture: Mixture = ()
    passed_over: int = 0
    cancelled: bool = False
    ended: bool = False

    @property
    def decoding(self) -> bool:
        """Whether its prompt is in the cache and its next token is due."""
        return self.cached == len(self.tokens) - 1 and len(self.tokens) > len(self.request.prompt)

    def take(self, token: int, eos_ids: Collection[int]) -> Chunk:
        """Append a token; what it adds to the answer, with the reason if it ends it."""
        sampling = self.request.sampling
        self.tokens.append(token)
        reason: FinishReason | None = None
        text = ""
        if token in eos_ids and not sampling.ignore_eos:
            reason = "stop"
        else:
            text, stopped = self.text.push(token)
            if stopped:
                reason = "stop"
            elif len(self.tokens) >= self.limit:
                reason = "length"
        if reason is not None:
            text += self.text.flush()
        return Chunk(text, (token,), reason)
