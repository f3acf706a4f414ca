"""What the deployments say to each other. Plain values, no logic and no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorauter.engine.types import SamplingParams
from lorauter.routing.retrieve import Retrieved


@dataclass(frozen=True)
class Prompt:
    """A chat (`{"role", "content"}` messages) or a plain text; one of them."""

    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None

    @property
    def characters(self) -> int:
        """The length of all its text."""
        return len(self.text or "") + sum(len(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class GenerateCall:
    """What the ingress asks of a replica: a prompt to be answered under adapters by name and weight.

    `generated` is what another replica has answered before it died: the answer goes on after these tokens.
    """

    prompt: Prompt
    adapters: tuple[tuple[str, float], ...]
    sampling: SamplingParams
    generated: tuple[int, ...] = ()


@dataclass(frozen=True)
class Admitted:
    """The first thing a replica says: the request is valid, its adapters are here, and this is its prompt's size.

    `versions` are those of the call's adapters, in its order.
    """

    prompt_tokens: int
    versions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Retrieval:
    """What was found for n queries, and the version of the catalog that it was found in."""

    catalog_version: str
    found: list[Retrieved]


@dataclass(frozen=True)
class CatalogDescription:
    """What a catalog holds, for people: `tasks` as JSON objects, `adapters` by name.

    `refused` is the published version that is not used, and why not.
    """

    version: str
    tasks: list[dict[str, Any]]
    adapters: list[str]
    refused: tuple[str, str] | None = None
