"""Which of a task's examples go before a query, and why none does. Knows the catalog; knows nothing of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from lorauter.catalog.catalog import Catalog
from lorauter.catalog.shown import By
from lorauter.encoder import Embeddings
from lorauter.tasks import Task
from lorauter.turns import ExampleTurns

Why = Literal["unsure", "not_yours", "unchecked", "no_help", "too_long", "no_room", "not_one_turn", "held"]
"""Why none is shown: the task is in doubt; the caller has no adapter that was made for it; nobody has found out whether
they help it; they do not; the nearest one takes too many tokens by itself; the context has no room for one; the prompt
is more than a user's one turn; the answer is held to a form of the request's own."""


@dataclass(frozen=True)
class Shown:
    """What goes before a query.

    Attributes:
        turns: the examples, the nearest first.
        by: what answers, the mixture or the base model alone.
        why: why there are none.
    """

    turns: tuple[ExampleTurns, ...] = ()
    by: By = "mixture"
    why: Why | None = None

    def to_json(self, task: str | None) -> dict[str, Any]:
        """As it is shown: of which task they are, their places among its examples, and what answers; or why not."""
        if self.why is not None:
            return {"places": [], "why": self.why}
        return {"task": task, "places": sorted(turn.place for turn in self.turns), "by": self.by}


class Shelf(NamedTuple):
    """A task's examples as they are chosen from."""

    task: Task
    embeddings: Embeddings

    @classmethod
    def of(cls, catalog: Catalog, place: int) -> Shelf:
        """A task's. Raises CatalogError, StoreError: they cannot be read."""
        row = catalog.row(place)
        return cls(row.entry.task, row.examples.embeddings)

    def nearest(
        self, query: Embeddings, most: int, tokens: Sequence[int], room: int, *, but: int | None = None
    ) -> tuple[ExampleTurns, ...]:
        """The examples nearest to a query, as many as fit.

        Args:
            query: (d,), its embedding.
            most: of them.
            tokens: what each takes.
            room: tokens that they may take together.
            but: one that is left out.
        """
        turns: list[ExampleTurns] = []
        order = np.argsort(-(self.embeddings @ query), kind="stable").tolist()
        for place in [place for place in order if place != but][:most]:
            room -= tokens[place]
            if room < 0:
                break
            example = self.task.validation[place]
            turns.append(ExampleTurns(place, example.input, example.target, tokens[place]))
        return tuple(turns)
