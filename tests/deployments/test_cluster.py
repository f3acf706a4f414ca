"""Where no cluster is, that is told in seconds; tests/integration joins real ones."""

import time
from contextlib import nullcontext
from unittest.mock import Mock

import pytest

import deployments.cluster
from deployments.cluster import LOCAL, connect
from lorauter.errors import ConfigError


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-such-host.invalid:6379", "auto", "nonsense", "127.0.0.1:99999"])
def test_an_address_where_no_cluster_is(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9" if address == "auto" else "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=f"no Ray cluster can be reached at {address}") as caught:
        connect(address)
    assert caught.value.setting == "address"
    assert "leave it out" in str(caught.value)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("problems", "starts", "told"),
    [
        ([], 1, None),
        ([Exception("The current node timed out during startup.")], 2, None),
        ([Exception("timed out"), Exception("timed out again")], 2, "Ray does not start: Exception: timed out again"),
        ([ValueError("object_store_memory is too small")], 1, "Ray does not start: .*too small"),
    ],
)
def test_a_ray_that_does_not_come_up_in_time_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, problems: list[Exception], starts: int, told: str | None
) -> None:
    init, shutdown = Mock(side_effect=[*problems, None]), Mock()
    monkeypatch.setattr(deployments.cluster.ray, "init", init)
    monkeypatch.setattr(deployments.cluster.ray, "shutdown", shutdown)
    with pytest.raises(ConfigError, match=told) if told else nullcontext():
        connect(LOCAL, num_cpus=1)
    assert (init.call_count, shutdown.call_count) == (starts, starts - 1)
    assert all(call.kwargs["num_cpus"] == 1 for call in init.call_args_list)
