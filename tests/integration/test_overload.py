"""More load than the service sustains, in short; `benchmarks/overload.py` is the long version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from overload import measure, percentile, questions
from ray import serve

from deployments.app import DEPLOYMENTS, assemble
from lorauter.engine import EngineConfig

pytestmark = pytest.mark.integration


@pytest.fixture
def url(service: Any) -> Iterator[str]:
    """A second app of the running cluster, with an engine that refuses what would take too long."""
    # Without reuse: a question asked again would cost next to nothing, and the pace is that of whole prompts.
    engine = EngineConfig(max_batch=8, max_model_len=512, max_slowdown=2.0, prefix_reuse=False)
    config = service.config.model_copy(update={"engine": engine})
    few = {name: {"ray_actor_options": {"num_cpus": 0.05}, "num_replicas": 1} for name in DEPLOYMENTS}
    serve.run(assemble(config, few), name="overload", route_prefix="/overload")
    yield f"{service.url}/overload"
    serve.delete("overload")


def test_overload_is_refused_and_what_is_accepted_stays_fast(url: str) -> None:
    """By the ninth decile, as the slowest of so few requests says little.

    How many are refused depends on how well the sustainable load was found; if too few were, the accepted would wait.
    """
    report = asyncio.run(measure(url, questions(each=2), factor=2, seconds=15, alone=30, clients=12, saturate_s=8))
    print(report)
    assert report.other == []
    assert report.refused > 0
    assert report.without_retry_after == 0
    assert len(report.accepted) / report.seconds > 0.5 * report.sustainable
    assert percentile(report.accepted, 90) <= 3 * percentile(report.unloaded, 90)
