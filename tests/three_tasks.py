"""A catalog of three tasks, of which two have scores, and what is found in it."""

from __future__ import annotations

from typing import Any

from lorauter.catalog import Catalog
from lorauter.encoder import HashingEncoder
from lorauter.routing import Retrieved, Retriever, RoutingConfig, RoutingOptions

ANY = RoutingOptions()
ENCODER = HashingEncoder()
TEXTS = {
    "films": ("was this film good", "is the film worth seeing", "rate the film", "a film review"),
    "news": ("which section of the news", "sort this news article", "news of sports", "news of business"),
    "law": ("does the contract bind the tenant", "may the landlord keep it", "is the contract void", "law of torts"),
}
SCORES = {
    "films": {"critic": {0: 0.9, 1: 0.7, 2: 0.8, 3: 0.6}, "writer": {0: 0.5, 1: 0.5}},
    "news": {"writer": {0: 0.6, 1: 0.6, 2: 0.2, 3: 0.2}, "editor": {0: 0.2, 1: 0.2, 2: 0.6, 3: 0.6}},
}


def retrieve(catalog: Catalog, text: str, options: RoutingOptions = ANY, **config: Any) -> Retrieved:
    (result,) = Retriever(catalog, RoutingConfig(**config)).retrieve(ENCODER.encode([text]), [text], [options])
    return result


def utilities(result: Retrieved) -> dict[str, float]:
    return {adapter.name: adapter.utility for adapter in result.adapters}


WORTHS = {  # scores over the best one's, and by rank where there are none
    "films": {"critic": 1, "writer": 0.5 / 0.75},
    "news": {"writer": 1, "editor": 1},
    "law": {"lawyer": 1, "writer": 0.5},
}
