"""More load than the service sustains, in short; `benchmarks/overload.py` is the long version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from overload import measure, questions
from ray import serve

from deployments.app import DEPLOYMENTS, assemble

pytestmark = pytest.mark.integration


FIRST_TOKEN_S = 15.0


@pytest.fixture
def url(service: Any) -> Iterator[str]:
    """A second app of the running cluster, that queues as the shipped one does, if for less long."""
    api = service.config.api.model_copy(update={"first_token_s": FIRST_TOKEN_S})
    config = service.config.model_copy(update={"api": api})
    few = {name: {"ray_actor_options": {"num_cpus": 0.05}, "num_replicas": 1} for name in DEPLOYMENTS}
    serve.run(assemble(config, few), name="overload", route_prefix="/overload")
    yield f"{service.url}/overload"
    serve.delete("overload")


def test_overload_is_refused_and_what_is_accepted_is_answered(url: str) -> None:
    report = asyncio.run(measure(url, questions(each=2), factor=6, seconds=20, alone=10, clients=24, saturate_s=12))
    print(report)
    assert report.other == []  # nobody waits in vain
    assert report.refused > 0
    assert report.without_retry_after == 0
    assert len(report.accepted) / report.seconds > 0.5 * report.sustainable
