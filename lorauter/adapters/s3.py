"""S3-compatible storage through boto3.

Endpoint, region and credentials come from where AWS tools take them (`AWS_ENDPOINT_URL_S3`,
`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_DEFAULT_REGION`, profiles, instance roles), never from a lorauter
file. `AWS_REQUEST_CHECKSUM_CALCULATION` and `AWS_RESPONSE_CHECKSUM_VALIDATION` set to `when_required` serve
stores that break on botocore's default checksums. Knows nothing of what the objects hold.

Not every store has conditional writes, and some ignore the condition without a word (`rclone serve s3`). So nothing
depends on them alone: writers take turns by `object_lock`, and the condition comes on top of it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
)

from lorauter.adapters import object_lock
from lorauter.adapters.parts import buffered
from lorauter.adapters.store import Locked
from lorauter.errors import BucketNotFound, ConfigError, Conflict, ObjectNotFound, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONCURRENCY = 8
_ADVICE = {
    301: "; the bucket is in another region: set AWS_REGION",
    400: "; do AWS_REGION and the credentials fit the store?",
    401: "; the store takes no such credentials: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    403: "; the store refuses these credentials: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do",
}
_CONNECT_S = 2.0  # of the brief client
_Kind = Literal["whole", "unchecked", "brief"]
_client: dict[_Kind, S3Client] | None = None
_client_pid = 0
_client_lock = threading.Lock()


def _shared_client(kind: _Kind = "whole") -> S3Client:
    """One client a process: clients are thread-safe, sessions are not, and a fork must not share sockets.

    The unchecked one asks for no checksums: some stores send the whole object's, which no part of it has, and a fault
    that comes with one botocore cannot read. The brief one, for what is done under a lock, gives up after
    `object_lock.REQUEST_S`, and does nothing twice.
    """
    global _client, _client_pid
    with _client_lock:
        if _client is None or _client_pid != os.getpid():
            config = Config(
                retries={"mode": "standard", "total_max_attempts": 2},  # callers retry, and reread what changed
                max_pool_connections=4 * _CONCURRENCY,
                connect_timeout=3,
                read_timeout=10,
                tcp_keepalive=True,
            )
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None
            try:
                session = boto3.session.Session()
                unchecked = config.merge(Config(response_checksum_validation="when_required"))
                brief = unchecked.merge(
                    Config(
                        retries={"mode": "standard", "total_max_attempts": 1},
                        connect_timeout=_CONNECT_S,
                        read_timeout=object_lock.REQUEST_S - _CONNECT_S,
                    )
                )
                configs: dict[_Kind, Config] = {"whole": config, "unchecked": unchecked, "brief": brief}
                _client = {name: session.client("s3", region_name=region, config=of) for name, of in configs.items()}
            except (BotoCoreError, ValueError) as error:
                raise ConfigError(f"the AWS settings of the environment are wrong: {error}") from error
            _client_pid = os.getpid()
        return _client[kind]


class S3Store:
    """The objects under one prefix of one bucket."""

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    @classmethod
    def from_uri(cls, uri: str) -> S3Store:
        """Of `s3://bucket/prefix`. Raises ConfigError where no bucket is named."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise ConfigError(f"{uri!r} names no bucket; use s3://bucket/prefix")
        return cls(bucket, prefix)

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        uri = f"s3://{self._bucket}/{self._prefix}{key}"
        try:
            yield
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            code = error.response.get("Error", {}).get("Code", "")
            if code == "NoSuchBucket":
                raise BucketNotFound(uri, self._bucket) from error
            if code == "NoSuchKey" or status == 404:
                raise ObjectNotFound(uri) from error
            kind = StoreUnavailable if status >= 500 or status in (408, 429) else StoreError
            advice = _ADVICE.get(status, "")
            raise kind(f"{error}{advice}", uri=uri) from error
        except NoCredentialsError as error:
            raise StoreError(
                "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role",
                uri=uri,
            ) from error
        except ParamValidationError as error:
            raise StoreError(" ".join(str(error).split()), uri=uri) from error
        except EndpointConnectionError as error:
            raise StoreUnavailable(f"{error}; is the store up, and AWS_ENDPOINT_URL_S3 right?", uri=uri) from error
        except (BotoCoreError, Boto3Error, HTTPClientError, IncompleteReadError) as error:
            raise StoreUnavailable(str(error), uri=uri) from error

    def children(self, prefix: str = "") -> list[str]:
        base = self._prefix + (f"{prefix}/" if prefix else "")
        with self._errors(prefix):
            pages = (
                _shared_client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self._bucket, Prefix=base, Delimiter="/")
            )
            names = [
                entry["Prefix"].removeprefix(base).rstrip("/")
                for page in pages
                for entry in page.get("CommonPrefixes", [])
            ]
        return sorted(name for name in names if not name.startswith("."))

    def files(self, prefix: str = "") -> dict[str, int]:
        found = self._listed(f"{prefix}/" if prefix else "")
        return {key: found[key]["Size"] for key in sorted(found) if not any(p.startswith(".") for p in key.split("/"))}

    def open(self, key: str) -> BinaryIO:
        size, _ = self.fingerprint(key)
        return buffered(self, key, size)

    def read_part(self, key: str, start: int, length: int) -> bytes:
        """Bytes of an object from `start`; at least one, and none beyond its end may be asked for."""
        with self._errors(key):
            part = _shared_client("unchecked").get_object(
                Bucket=self._bucket, Key=self._prefix + key, Range=f"bytes={start}-{start + length - 1}"
            )
            body: bytes = part["Body"].read()
            return body

    def fingerprint(self, key: str) -> tuple[int, str]:
        with self._errors(key):
            head = _shared_client().head_object(Bucket=self._bucket, Key=self._prefix + key)
        return head["ContentLength"], head["ETag"].strip('"')

    def fingerprints(self, wanted: Callable[[str], bool]) -> dict[str, tuple[int, str]]:
        return {
            key: (entry["Size"], entry["ETag"].strip('"')) for key, entry in self._listed("").items() if wanted(key)
        }

    def _listed(self, prefix: str) -> dict[str, Any]:
        """What a listing says of all objects below a prefix that is a key's beginning, by key."""
        with self._errors(prefix):
            pages = (
                _shared_client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=self._bucket, Prefix=self._prefix + prefix)
            )
            return {
                entry["Key"].removeprefix(self._prefix): entry for page in pages for entry in page.get("Contents", [])
            }

    def modified(self, key: str) -> float:
        with self._errors(key):
            head = _shared_client().head_object(Bucket=self._bucket, Key=self._prefix + key)
        return head["LastModified"].timestamp()

    def read(self, key: str) -> bytes:
        return self.read_tagged(key)[0]

    def download(self, key: str, target: Path) -> None:
        with self._errors(key):
            _shared_client().download_file(
                self._bucket,
                self._prefix + key,
                str(target),
                Config=TransferConfig(max_concurrency=_CONCURRENCY),
            )

    def write(self, key: str, content: bytes | Path) -> None:
        with self._errors(key):
            if isinstance(content, bytes):
                _shared_client().put_object(Bucket=self._bucket, Key=self._prefix + key, Body=content)
            else:
                with content.open("rb") as file:  # not upload_file, which hides the status of what went wrong
                    _shared_client().upload_fileobj(file, self._bucket, self._prefix + key)

    def delete(self, key: str) -> None:
        with self._errors(key):
            _shared_client().delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def locked(self, key: str) -> AbstractContextManager[Locked]:
        return object_lock.locked(self, key)

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """An object and its ETag."""
        with self._errors(key):
            answer = _shared_client("unchecked").get_object(Bucket=self._bucket, Key=self._prefix + key)
            return answer["Body"].read(), answer["ETag"]

    def put_once(self, key: str, content: bytes) -> None:
        """Write an object, soon or not at all."""
        self._put(key, content)

    def replace_once(self, key: str, content: bytes, tag: str | None) -> str:
        """The same, if the object's ETag is this one, or if it is not there (None); returns the new one.

        Stores that know no conditions ignore them or say that they are not implemented; both are taken for no.

        Raises:
            Conflict: it is another.
        """
        return self._put(key, content, **({"IfMatch": tag} if tag else {"IfNoneMatch": "*"}))

    def _put(self, key: str, content: bytes, **condition: Any) -> str:
        with self._errors(key):
            where: dict[str, Any] = {"Bucket": self._bucket, "Key": self._prefix + key, "Body": content}
            try:
                return _shared_client("brief").put_object(**where, **condition)["ETag"]
            except ClientError as error:
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status in (409, 412):
                    raise Conflict(f"{self.uri}/{key} was changed meanwhile; look at it, and try again") from error
                if status == 501 and condition:
                    return _shared_client("brief").put_object(**where)["ETag"]
                raise

    def delete_once(self, key: str) -> None:
        """Remove an object, soon or not at all."""
        with self._errors(key):
            _shared_client("brief").delete_object(Bucket=self._bucket, Key=self._prefix + key)

    def claims(self, prefix: str) -> list[str]:
        """The last parts of the names of up to 1,000 objects below a prefix, sorted."""
        with self._errors(prefix):
            found = _shared_client("brief").list_objects_v2(Bucket=self._bucket, Prefix=self._prefix + prefix)
        return sorted(entry["Key"].rpartition("/")[2] for entry in found.get("Contents", []))
