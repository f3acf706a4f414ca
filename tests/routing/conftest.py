"""The catalog of `three_tasks`."""

from __future__ import annotations

import pytest
from three_tasks import ENCODER, SCORES, TEXTS

from lorauter.catalog import Catalog, CatalogTask, RankedAdapter


@pytest.fixture
def catalog(make_task) -> Catalog:
    """Films and news with scores, and law, whose adapters were only named."""
    embeddings = {name: ENCODER.encode(texts) for name, texts in TEXTS.items()}
    tasks = []
    for name, texts in TEXTS.items():
        means = {a: sum(of.values()) / len(of) for a, of in SCORES.get(name, {}).items()}
        ranked = [RankedAdapter(a, means[a]) for a in sorted(means, key=lambda a: (-means[a], a))]
        if name == "law":
            ranked = [RankedAdapter("lawyer"), RankedAdapter("writer")]
        tasks.append(CatalogTask(make_task(name, *texts), tuple(ranked), SCORES.get(name, {})))
    named = dict.fromkeys(("critic", "editor", "lawyer", "writer"), "0a1b2c3d")
    return Catalog.of(tasks, list(embeddings.values()), embeddings["films"][0], named)
