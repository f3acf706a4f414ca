"""Google Cloud Storage (`gs://bucket/prefix`) and Azure Blob Storage (`az://container/prefix`), through obstore.

Accounts, credentials and endpoints come from where each cloud's tools take them, never from a lorauter file:
`GOOGLE_APPLICATION_CREDENTIALS`, gcloud's own, a machine's or workload's identity; `AZURE_STORAGE_ACCOUNT_NAME` with
`AZURE_STORAGE_ACCOUNT_KEY`, a client's id and secret, a workload's or managed identity. Both clouds have conditional
writes, which come on top of `object_lock`'s turns. Knows nothing of what the objects hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lorauter.adapters import object_lock
from lorauter.adapters.parts import buffered
from lorauter.adapters.store import Locked
from lorauter.errors import ConfigError, Conflict, ObjectNotFound, StoreError, StoreUnavailable

try:
    import obstore
    from obstore import exceptions, store
except ImportError as error:
    raise ConfigError(
        "gs:// and az:// need the package obstore, which is not installed; run: pip install 'lorauter[gs]' or "
        "'lorauter[az]'"
    ) from error

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutResult, UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_CONNECT_S = 3.0
_RETRIES_S = 10.0
_ADVICE = {
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, or the machine's identity, and what it may do",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY or the machine's identity, and what it may do",
}


@lru_cache(maxsize=64)
def _client(scheme: str, bucket: str, *, brief: bool = False) -> ObjectStore:
    """One client a bucket; the brief one, for what is done under a lock, does nothing twice.

    Raises:
        ConfigError: the environment's settings of the cloud are wrong.
    """
    kind = store.GCSStore if scheme == "gs" else store.AzureStore
    wait = object_lock.REQUEST_S if brief else 3600.0  # seconds of a whole download
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=_CONNECT_S),
        "timeout": timedelta(seconds=wait),
        "allow_http": True,  # to an endpoint that says so: an emulator's
    }
    retries: RetryConfig = {
        "max_retries": 0 if brief else 2,  # callers retry, and reread what changed
        "retry_timeout": timedelta(seconds=_RETRIES_S),
    }
    try:
        return kind(bucket, client_options=client, retry_config=retries)
    except exceptions.BaseError as error:
        raise ConfigError(f"{scheme}://{bucket}: {_first_line(error)}; {_ADVICE[scheme]}") from error


class CloudStore:
    """The objects under one prefix of one bucket, or container.

    Args:
        uri: `gs://bucket/prefix` or `az://container/prefix`.
        clients: what talks to it, and the brief one; the environment's, unless they are given.

    Raises:
        ConfigError: no bucket is named, or the environment's settings are wrong.
    """

    def __init__(self, uri: str, clients: tuple[ObjectStore, ObjectStore] | None = None) -> None:
        self._scheme, _, rest = uri.partition("://")
        self._bucket, _, prefix = rest.partition("/")
        if not self._bucket:
            what = "bucket" if self._scheme == "gs" else "container"
            raise ConfigError(f"{uri!r} names no {what}; use {self._scheme}://{what}/prefix")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._whole, self._brief = clients or (
            _client(self._scheme, self._bucket),
            _client(self._scheme, self._bucket, brief=True),
        )

    @property
    def uri(self) -> str:
        return f"{self._scheme}://{self._bucket}/{self._prefix}".rstrip("/")

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        uri = f"{self._scheme}://{self._bucket}/{self._prefix}{key}"
        try:
            yield
        except (FileNotFoundError, exceptions.NotFoundError, ValueError) as error:  # the last is no path at all
            raise ObjectNotFound(uri) from error
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            raise Conflict(f"{uri} was changed meanwhile; look at it, and try again") from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise StoreError(f"the store refuses: {_first_line(error)}; {_ADVICE[self._scheme]}", uri=uri) from error
        except (exceptions.BaseError, OSError) as error:
            raise StoreUnavailable(
                f"{_first_line(error)}; is the network up? {_ADVICE[self._scheme]}", uri=uri
            ) from error

    def children(self, prefix: str = "") -> list[str]:
        base = self._prefix + (f"{prefix}/" if prefix else "")
        with self._errors(prefix):
            found = obstore.list_with_delimiter(self._whole, base or None)["common_prefixes"]
        names = (path.rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if not name.startswith("."))

    def files(self, prefix: str = "") -> dict[str, int]:
        found = self._listed(f"{prefix}/" if prefix else "")
        return {key: found[key]["size"] for key in sorted(found) if not any(p.startswith(".") for p in key.split("/"))}

    def open(self, key: str) -> BinaryIO:
        size, _ = self.fingerprint(key)
        return buffered(self, key, size)

    def read_part(self, key: str, start: int, length: int) -> bytes:
        """Bytes of an object from `start`; at least one, and none beyond its end may be asked for."""
        with self._errors(key):
            return bytes(obstore.get_range(self._whole, self._prefix + key, start=start, length=length))

    def fingerprint(self, key: str) -> tuple[int, str]:
        return _fingerprint(self._head(key))

    def fingerprints(self, wanted: Callable[[str], bool]) -> dict[str, tuple[int, str]]:
        return {key: _fingerprint(meta) for key, meta in self._listed("").items() if wanted(key)}

    def _head(self, key: str) -> ObjectMeta:
        with self._errors(key):
            return obstore.head(self._whole, self._prefix + key)

    def _listed(self, prefix: str, *, brief: bool = False) -> dict[str, ObjectMeta]:
        """What a listing says of all objects below a folder, by key."""
        with self._errors(prefix):
            found = obstore.list(self._brief if brief else self._whole, (self._prefix + prefix) or None)
            return {meta["path"].removeprefix(self._prefix): meta for page in found for meta in page}

    def modified(self, key: str) -> float:
        return self._head(key)["last_modified"].timestamp()

    def read(self, key: str) -> bytes:
        with self._errors(key):
            return bytes(obstore.get(self._whole, self._prefix + key).bytes())

    def download(self, key: str, target: Path) -> None:
        with self._errors(key):
            answer = obstore.get(self._whole, self._prefix + key)
            with target.open("wb") as file:
                for part in answer.stream():
                    file.write(part)

    def write(self, key: str, content: bytes | Path) -> None:
        with self._errors(key):
            obstore.put(self._whole, self._prefix + key, content)

    def delete(self, key: str) -> None:
        with suppress(ObjectNotFound), self._errors(key):
            obstore.delete(self._whole, self._prefix + key)

    def locked(self, key: str) -> AbstractContextManager[Locked]:
        return object_lock.locked(self, key)

    def read_tagged(self, key: str) -> tuple[bytes, UpdateVersion]:
        """An object and its tag."""
        with self._errors(key):
            answer = obstore.get(self._brief, self._prefix + key)
            return bytes(answer.bytes()), _tag(answer.meta)

    def put_once(self, key: str, content: bytes) -> None:
        """Write an object, soon or not at all."""
        with self._errors(key):
            obstore.put(self._brief, self._prefix + key, content)

    def replace_once(self, key: str, content: bytes, tag: UpdateVersion | None) -> UpdateVersion:
        """The same, if the object has this tag, or if it is not there (None). Raises Conflict: it has another."""
        with self._errors(key):
            return _tag(obstore.put(self._brief, self._prefix + key, content, mode=tag or "create"))

    def delete_once(self, key: str) -> None:
        """Remove an object, soon or not at all."""
        with suppress(ObjectNotFound), self._errors(key):
            obstore.delete(self._brief, self._prefix + key)

    def claims(self, prefix: str) -> list[str]:
        """The last parts of the names of the objects below a prefix, sorted."""
        return sorted(key.rpartition("/")[2] for key in self._listed(prefix, brief=True))


def _fingerprint(meta: ObjectMeta) -> tuple[int, str]:
    return meta["size"], (meta["e_tag"] or meta["version"] or "").strip('"')


def _tag(found: ObjectMeta | PutResult) -> UpdateVersion:
    tag: UpdateVersion = {}
    if found["e_tag"]:
        tag["e_tag"] = found["e_tag"]
    if found["version"]:
        tag["version"] = found["version"]
    return tag


def _first_line(error: BaseException) -> str:
    """What an error says, without the debugging lines below it."""
    return str(error).split("\n", 1)[0].strip()
