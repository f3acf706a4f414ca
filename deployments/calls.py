"""What the deployments say to each other. Plain values, no logic and no Ray."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorauter.engine.types import Chunk, Prompt, SamplingParams
from lorauter.pickled import Sparse
from lorauter.routing.compose import AdapterWeight, LeftOut
from lorauter.tools.formats import FormatName
from lorauter.turns import ExampleTurns


class Choice(NamedTuple):
    """One of the answers to a prompt: which, and what another replica has answered of it before it died: it goes on
    after these tokens."""

    place: int
    generated: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenerateCall(Sparse):
    """What the ingress asks of a replica: a prompt to be answered under a mixture of adapters.

    Attributes:
        routed: nobody named the adapters: one that cannot be had is left out, as long as one is left.
        choices: the answers that are wanted.
        tenant: whose prompts alone this one may share computed beginnings with, so that nobody learns by time or count
            what others ask.
        number: tells it from the other calls of its ingress replica; it stays with a call that is sent again.
        avoid: replicas that are asked last: they have refused it, or kept it waiting.
        whole: nobody reads the answer before its end.
        tells_prompt: the prompt's tokens are wanted too.
        tells_tiers: where the adapters were is wanted too.
        examples: what goes before the prompt, as far as there is room, the nearest first.
        unshown: the adapters in place of its own, if there is room for none.
    """

    prompt: Prompt
    adapters: tuple[AdapterWeight, ...]
    sampling: SamplingParams
    routed: bool = False
    choices: tuple[Choice, ...] = (Choice(0),)
    tenant: str | None = None
    number: int = field(default_factory=itertools.count(1).__next__, compare=False)
    avoid: tuple[str, ...] = ()
    whole: bool = False
    tells_prompt: bool = False
    tells_tiers: bool = False
    examples: tuple[ExampleTurns, ...] = ()
    unshown: tuple[AdapterWeight, ...] = ()

    @property
    def resumed(self) -> bool:
        """Whether it has begun elsewhere."""
        return any(choice.generated for choice in self.choices)


@dataclass(frozen=True)
class Admitted(Sparse):
    """First known of an answer: the request is valid, its adapters are here, and this is its prompt's size.

    `left_out` are those of the call's adapters that the answer goes on without, `cached_tokens` the prompt's tokens
    that were found computed, `prompt` their ids and texts, if they are wanted. `tool_format` is how calls are written
    in the answer, if it may have any. `tiers` says of each adapter where it was, if that is wanted; `fetched_s` and
    `waited_s` how long it took until the adapters were here, and then until the engine began. `examples` is how many
    went before the prompt.
    """

    prompt_tokens: int
    left_out: tuple[LeftOut, ...] = ()
    cached_tokens: int = 0
    prompt: tuple[tuple[int, bytes], ...] = ()
    tool_format: FormatName | None = None
    tiers: tuple[tuple[str, str], ...] = ()
    fetched_s: float = field(default=0.0, compare=False)
    waited_s: float = field(default=0.0, compare=False)
    examples: int = 0


@dataclass(frozen=True)
class Begun:
    """The first thing a replica says, in one message: the answer is admitted, and begins so."""

    admitted: Admitted
    chunk: Chunk


@dataclass(frozen=True)
class CatalogDescription:
    """What a catalog holds, for people: `tasks` as JSON objects, `adapters` by name.

    `refused` is the published version that is not used, and why not.
    """

    version: str
    tasks: list[dict[str, Any]]
    adapters: list[str]
    refused: tuple[str, str] | None = None


class Residency(NamedTuple):
    """Of a version of an adapter: on how many replicas it is in a tier, and how much it was wanted lately, in requests
    that count half as much with every ten minutes."""

    tiers: Mapping[str, int]
    demand: float


class Want(NamedTuple):
    """An amount to be counted against a limit: the name of its counter, and how much a minute allows."""

    name: str
    amount: float
    per_minute: int


class Refused(NamedTuple):
    """Which of some wants goes beyond its limit, and the seconds until it will not."""

    want: int
    wait_s: float


class Taken(NamedTuple):
    """All of some wants were there; what is left of each."""

    left: tuple[float, ...]
