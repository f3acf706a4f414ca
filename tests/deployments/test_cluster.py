"""Where no cluster is, that is told in seconds; tests/integration joins real ones."""

import time

import pytest

from deployments.cluster import connect
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
