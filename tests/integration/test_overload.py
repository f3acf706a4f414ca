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

FIRST_TOKEN_S = 15.0


@pytest.fixture
def url(service: Any) -> Iterator[str]:
    """A second app of the running cluster, whose clients are not as patient as those of the shipped one."""
    # Without reuse: a question asked again would cost next to nothing, and the pace is that of whole prompts.
    engine = EngineConfig(max_batch=8, max_model_len=512, prefix_reuse=False)
    api = service.config.api.model_copy(update={"first_token_s": FIRST_TOKEN_S})
    config = service.config.model_copy(update={"engine": engine, "api": api})
    few = {name: {"ray_actor_options": {"num_cpus": 0.05}, "num_replicas": 1} for name in DEPLOYMENTS}
    serve.run(assemble(config, few), name="overload", route_prefix="/overload")
    yield f"{service.url}/overload"
    serve.delete("overload")


def test_overload_is_refused_and_what_is_accepted_begins_in_time(url: str) -> None:
    """Nobody waits only to be given up: who would is told at once, and who is taken is answered."""
    report = asyncio.run(measure(url, questions(each=2), factor=3, seconds=20, alone=10, clients=12, saturate_s=8))
    print(report)
    assert report.other == []
    assert report.refused > 0.3 * len(report.accepted)
    assert report.without_retry_after == 0
    assert len(report.accepted) / report.seconds > 0.5 * report.sustainable
    assert percentile(report.accepted, 90) <= FIRST_TOKEN_S + 3 * percentile(report.unloaded, 90)
