"""Where nothing fails and nobody is busy."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytestmark = pytest.mark.integration


def test_each_adapter_stays_with_one_replica(cluster: Any, clients: Any, unseen: Any) -> None:
    questions = unseen(4)
    for question in questions * 3:
        asyncio.run(clients.ask_all([question])).assert_all_right(at_least=1)
    for question in questions:  # each replica's node has a cache of its own
        [_] = cluster.disk.glob(f"cache-*/{question.body['model']}")
