"""The proxy that the fault suite stands on does what it says, and otherwise nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from faulty_s3 import FaultyS3

CONTENT = bytes(range(256)) * 2000


@pytest.fixture
def proxy(s3_server: Any) -> Iterator[FaultyS3]:
    proxy = FaultyS3(int(s3_server.endpoint.rpartition(":")[2]))
    yield proxy
    proxy.close()


@pytest.fixture
def client(proxy: FaultyS3, bucket: str, s3: Any) -> Any:
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=proxy.endpoint,
        region_name=s3.env["AWS_REGION"],
        config=Config(retries={"total_max_attempts": 1}),
    )
    client.put_object(Bucket=bucket.removeprefix("s3://"), Key="key", Body=CONTENT)
    return client


def test_without_faults_everything_passes(client: Any, proxy: FaultyS3, bucket: str, tmp_path: Path) -> None:
    name = bucket.removeprefix("s3://")
    assert client.get_object(Bucket=name, Key="key")["Body"].read() == CONTENT
    client.download_file(name, "key", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert proxy.requests >= 4
    assert proxy.faults == 0


@pytest.mark.parametrize(
    ("fault", "error"),
    [({"failing": 1.0}, ClientError), ({"cutting": 1.0}, BotoCoreError), ({"down": True}, BotoCoreError)],
)
def test_faults(client: Any, proxy: FaultyS3, bucket: str, fault: dict[str, Any], error: type[Exception]) -> None:
    name = bucket.removeprefix("s3://")
    with proxy:
        vars(proxy).update(fault)
        with pytest.raises(error):
            client.get_object(Bucket=name, Key="key")["Body"].read()
        assert proxy.faults == 1
    assert client.get_object(Bucket=name, Key="key")["Body"].read() == CONTENT


def test_delays(client: Any, proxy: FaultyS3, bucket: str) -> None:
    with proxy:
        proxy.delay_s = 0.3
        started = time.monotonic()
        client.head_object(Bucket=bucket.removeprefix("s3://"), Key="key")
    assert time.monotonic() - started >= 0.3
