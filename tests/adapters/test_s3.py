import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import lorauter.adapters.s3
from lorauter.adapters.store import open_store
from lorauter.errors import ObjectNotFound, StoreError, StoreUnavailable


@pytest.fixture
def calls(bucket, tmp_path):
    """Every way to reach an object that is there."""
    (tmp_path / "source").write_bytes(b"content")
    open_store(bucket).write("a/b", b"content")
    return [
        lambda store: store.children(),
        lambda store: store.fingerprint("a/b"),
        lambda store: store.read("a/b"),
        lambda store: store.download("a/b", tmp_path / "target"),
        lambda store: store.write("a/b", b"content"),
        lambda store: store.write("a/b", tmp_path / "source"),
        lambda store: store.delete("a/b"),
    ]


def test_the_server_takes_no_unsigned_request(s3, bucket) -> None:
    open_store(bucket).write("a/b", b"x")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{s3.endpoint}/{bucket.removeprefix('s3://')}/a/b")
    caught.value.close()
    assert 400 <= caught.value.code < 500
    assert open_store(bucket).read("a/b") == b"x"


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_a_wrong_key_is_an_error_that_no_retry_mends(bucket, calls, monkeypatch, variable) -> None:
    monkeypatch.setenv(variable, "wrong")
    monkeypatch.setattr(lorauter.adapters.s3, "_client", None)
    for call in calls:
        with pytest.raises(StoreError) as caught:
            call(open_store(bucket))
        assert type(caught.value) is StoreError
        assert caught.value.uri.startswith(bucket)


def test_a_missing_bucket_is_not_found(calls) -> None:
    for call in calls:
        with pytest.raises(ObjectNotFound):
            call(open_store("s3://no-such-bucket"))


def test_a_server_that_is_down_is_unavailable_soon_and_comes_back(s3, bucket, calls) -> None:
    store = open_store(bucket)
    s3.stop()
    try:
        for call in calls:
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                call(store)
            assert time.monotonic() - started < 10
    finally:
        s3.start()
    assert store.read("a/b") == b"content"


def test_prefixes_keep_stores_apart(s3, bucket) -> None:
    root, one, similar = open_store(bucket), open_store(f"{bucket}/team/one"), open_store(f"{bucket}/team/on")
    one.write("a/b", b"x")
    assert (s3.root / bucket.removeprefix("s3://") / "team" / "one" / "a" / "b").read_bytes() == b"x"
    assert (one.children(), similar.children(), root.children()) == (["a"], [], ["team"])
    assert root.read("team/one/a/b") == b"x"
    with pytest.raises(ObjectNotFound):
        root.read("a/b")


def test_children_are_listed_past_the_first_page(s3, bucket) -> None:
    names = [f"adapter-{i:04}" for i in range(1100)]
    for name in names:
        folder = s3.root / bucket.removeprefix("s3://") / name
        folder.mkdir()
        (folder / "x").touch()
    assert open_store(bucket).children() == names


def test_a_file_of_many_parts_arrives_whole(bucket, tmp_path) -> None:
    content = os.urandom(20_000_001)
    (tmp_path / "source").write_bytes(content)
    store = open_store(bucket)
    store.write("a/big", tmp_path / "source")
    store.download("a/big", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == content
    assert store.fingerprint("a/big")[0] == len(content)


def test_many_threads_may_use_one_store(bucket) -> None:
    store = open_store(bucket)
    store.write("a/b", b"x" * 10_000)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: store.read("a/b"), range(64))) == {b"x" * 10_000}


@pytest.mark.parametrize("region", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_region_and_endpoint_come_from_the_environment(s3, bucket, monkeypatch, region) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv(region, "eu-central-1")
    monkeypatch.setattr(lorauter.adapters.s3, "_client", None)
    open_store(bucket).write("a/b", b"x")
    assert lorauter.adapters.s3._shared_client().meta.region_name == "eu-central-1"
    assert open_store(bucket).read("a/b") == b"x"
