"""More load than the service sustains, in short; `benchmarks/overload.py` is the long version."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from overload import measure, questions

pytestmark = pytest.mark.integration


def test_overload_is_refused_and_what_is_accepted_stays_fast(cluster: Any) -> None:
    report = asyncio.run(
        measure(cluster.url, questions(each=2), factor=3, seconds=15, alone=20, clients=12, saturate_s=5)
    )
    print(report)
    assert report.other == []
    assert report.refused > len(report.accepted)
    assert report.without_retry_after == 0
    assert len(report.accepted) / report.seconds > 0.6 * report.sustainable
    assert report.ratio <= 3
