"""What the service tells of composed adapters: in the list of tasks, and in a decision."""

import asyncio
from types import SimpleNamespace
from typing import Any

from deployments.retriever import TaskRetriever
from lorauter.adapters import AdapterManifest
from lorauter.catalog import build_catalog, with_adapter
from lorauter.encoder import HashingEncoder


def test_composed_adapters_are_marked_and_stale_ones_said_to_be(make_task) -> None:
    catalog = build_catalog([make_task("rain", "is it dry?"), make_task("sums", "one and one?")], HashingEncoder())
    provenance = {"task": "rain", "sources": [{"name": "wet", "version": "1" * 16}]}
    provenance |= {"right_before": 0.25, "right_after": 0.75, "exact": True}
    catalog = with_adapter(
        catalog,
        AdapterManifest("wet", "1" * 16, {}),
        AdapterManifest("sums", "1" * 16, {}),
        AdapterManifest("rain.composed", "2" * 16, {}, provenance=provenance),
    )

    def told(of: Any) -> dict[str, list[dict[str, Any]]]:
        retriever: Any = object.__new__(TaskRetriever.func_or_class)
        retriever._live = SimpleNamespace(retriever=SimpleNamespace(catalog=of), refused=None, close=lambda: None)
        return {task["id"]: task["adapters"] for task in asyncio.run(retriever.describe()).tasks}

    marked = {"name": "rain.composed", "score": 0.75, "composed": True, "stale": False}
    assert told(catalog) == {"rain": [marked], "sums": [{"name": "sums", "score": None}]}
    newer = with_adapter(catalog, AdapterManifest("wet", "3" * 16, {}))
    assert told(newer)["rain"] == [{**marked, "stale": True}]
