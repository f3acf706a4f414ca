"""`gs://` and `az://`: what every store does is in test_store and test_locked; here is what the clouds add."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import obstore.store
import pytest
from local_s3 import LocalS3

from lorauter.adapters import AdapterRepository, clouds, open_store
from lorauter.adapters.clouds import CloudStore
from lorauter.errors import ConfigError, Conflict, ObjectNotFound, StoreError, StoreUnavailable

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"


@pytest.fixture(autouse=True)
def no_clients() -> Iterator[None]:
    """Clients take their settings from the environment once."""
    clouds._client.cache_clear()
    yield
    clouds._client.cache_clear()


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket behind the XML API that Google's storage has in common with S3; it knows no conditions."""
    server = LocalS3(tmp_path / "google", "bucket", signed=False)
    server.start()
    monkeypatch.setenv("GOOGLE_BASE_URL", server.endpoint)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "a token")
    yield "gs://bucket/below"
    server.stop()


def test_an_adapter_is_read_over_http_by_the_settings_of_the_environment(google, tmp_path) -> None:
    store = open_store(google)
    for file in (EXAMPLES / "sst2").iterdir():
        store.write(f"sst2/{file.name}", file)
    repository = AdapterRepository(store)
    assert repository.names() == ["sst2"]
    assert repository.newest() == {"sst2": repository.manifest("sst2").version}, "listings give the same tags"
    assert repository.load(repository.manifest("sst2")).rank == 8
    with pytest.raises(ObjectNotFound):
        store.download("sst2/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("uri", "settings"),
    [
        ("gs://bucket", {"GOOGLE_BASE_URL": "http://127.0.0.1:9", "GOOGLE_BEARER_TOKEN": "x"}),
        (
            "az://box",
            {
                "AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:9/me",
                "AZURE_STORAGE_ACCOUNT_NAME": "me",
                "AZURE_STORAGE_ACCOUNT_KEY": "AAAA",
            },
        ),
    ],
)
def test_a_cloud_that_does_not_answer_is_unavailable(uri, settings, monkeypatch) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreUnavailable, match=r"is the network up\? check "):
        open_store(uri).read("a")


def test_an_account_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError, match=r"az://box: .*Account must be specified; check AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://box/x")


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_without_obstore_the_extra_to_install_is_named(scheme) -> None:
    code = f"""
import sys
sys.modules["obstore"] = None
from lorauter.adapters import open_store
from lorauter.errors import ConfigError
try:
    open_store("{scheme}://bucket")
except ConfigError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"'lorauter[{scheme}]'" in said and "pip install" in said


def test_who_asks_for_no_lock_is_not_overwritten(monkeypatch) -> None:
    objects = obstore.store.MemoryStore()
    store = CloudStore("az://box", (objects, objects))
    for before in (None, b"old"):
        with store.locked("CURRENT") as held:
            assert held.content == before
            store.write("CURRENT", b"old" if before is None else b"of somebody else")
            with pytest.raises(Conflict, match="changed meanwhile"):
                held.write(b"mine")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_an_error_that_no_retry_mends(hub_server, monkeypatch, status) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", hub_server.endpoint)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "x")
    hub_server.status = status
    with pytest.raises(StoreError) as caught:
        open_store("gs://bucket").read("a")
    assert len(hub_server.requests) == 1
    assert type(caught.value) is StoreError
    assert "GOOGLE_APPLICATION_CREDENTIALS" in str(caught.value)
