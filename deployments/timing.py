"""What the steps of an answer took, and where its adapters were. Knows nothing of how it is sent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from deployments import observe
from deployments.calls import Admitted
from lorauter.engine.types import Chunk
from lorauter.routing.compose import RoutingDecision


class Timing:
    """The answers to one prompt, from their first token on.

    Args:
        deciding: seconds of routing's steps; none where adapters were chosen by hand.
        admitted: what the replica told.
    """

    def __init__(self, deciding: Mapping[str, float], admitted: Admitted) -> None:
        self._first = self._last = time.perf_counter()
        self._admitted = admitted
        self._seconds = {
            "embed_s": deciding.get("embed"),
            "retrieve_s": deciding.get("retrieve"),
            "adapters_s": admitted.fetched_s,
            "queue_s": admitted.waited_s,
            "first_token_s": self._first - observe.current().started,
        }
        self._begun: int | None = None  # tokens of the first piece
        self._tokens = 0

    def note(self, chunk: Chunk) -> None:
        """A piece of an answer is here."""
        self._last = time.perf_counter()
        self._tokens += len(chunk.token_ids)
        if self._begun is None:
            self._begun = self._tokens

    def told(self) -> dict[str, float | None]:
        """As the HTTP API shows it; tokens a second, of all answers together, after the first piece."""
        later, seconds = self._tokens - (self._begun or 0), self._last - self._first
        rate = later / seconds if later > 0 and seconds > 0 else None
        rounded = {name: None if of is None else round(of, 6) for name, of in self._seconds.items()}
        return {**rounded, "tokens_per_second": rate and round(rate, 2)}

    def beside(self, decision: RoutingDecision) -> dict[str, Any]:
        """A decision as the HTTP API shows it, with all of this that is known."""
        shown, tiers = decision.to_json(), dict(self._admitted.tiers)
        adapters = [{**adapter, "tier": tiers.get(adapter["name"])} for adapter in shown["adapters"]]
        return {**shown, "adapters": adapters, "timings": self.told()}
