"""The object-store seam, a directory behind it, and the fake for tests.

A store maps keys (relative, `/`-separated) to bytes. What several writers share, a pointer, they change by turns
(`locked`), and only if it is still what they saw. Knows nothing of adapters or catalogs. `open_store` picks a store by
its URI: `lorauter.adapters.s3` has S3's, `clouds` Google's and Azure's, `hub` the Hugging Face hub's.
"""

from __future__ import annotations

import hashlib
import io
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol, runtime_checkable

from filelock import FileLock, Timeout

from lorauter.errors import ConfigError, Conflict, ObjectNotFound, StoreUnavailable
from lorauter.uris import STORES

LOCKS = ".locks"
"""Where a store keeps what its locks need."""

WAIT_S = 30.0
"""Seconds that a writer waits for its turn; longer than any store needs to take a dead writer's lock away."""


class Locked(Protocol):
    """An object that other writers leave alone for now: for seconds, so that nobody waits long.

    Attributes:
        content: what it held when it was locked; None where it is not there.
    """

    content: bytes | None

    def write(self, content: bytes) -> None:
        """Replace it. Raises Conflict where it is not what it was, or the lock is not sure to hold any more."""

    def delete(self, key: str) -> None:
        """Remove it, or what only those who lock it touch, if it is there. Raises Conflict, as `write` does."""


class ObjectStore(Protocol):
    """What lorauter needs of a store. Every method may raise StoreUnavailable."""

    @property
    def uri(self) -> str:
        """Where this is, for messages."""

    def children(self, prefix: str = "") -> list[str]:
        """The first path parts below `prefix` that have objects under them, sorted."""

    def files(self, prefix: str = "") -> dict[str, int]:
        """The keys of all objects below `prefix` with their sizes in bytes, sorted; hidden files are left out."""

    def open(self, key: str) -> BinaryIO:
        """The object as a file to read and seek in. Raises ObjectNotFound, here or when it is read."""

    def fingerprint(self, key: str) -> tuple[int, str]:
        """Size in bytes and a tag that changes when the content does. Raises ObjectNotFound."""

    def fingerprints(self, wanted: Callable[[str], bool]) -> dict[str, tuple[int, str]]:
        """The `fingerprint` of every object whose key is wanted, by one listing, however many there are."""

    def modified(self, key: str) -> float:
        """When the object was written, in seconds since the epoch. Raises ObjectNotFound."""

    def read(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFound."""

    def download(self, key: str, target: Path) -> None:
        """Copy the object to the file `target`. Raises ObjectNotFound."""

    def write(self, key: str, content: bytes | Path) -> None:
        """Put bytes, or a file's content, under `key`; readers see the old object or the new one whole."""

    def delete(self, key: str) -> None:
        """Remove the object, if it is there."""

    def locked(self, key: str) -> AbstractContextManager[Locked]:
        """The object, which is there or not, for one writer at a time; a writer that dies lets go of it.

        Raises:
            StoreUnavailable: it is not to be had within WAIT_S.
        """


@runtime_checkable
class Versioned(ObjectStore, Protocol):
    """A store that keeps its own history, in commits (40 hexadecimal digits)."""

    def commit(self) -> str:
        """What it is at now. Raises StoreError."""

    def at(self, commit: str | None = None) -> Versioned:
        """The store as it was at a commit, or stays from now on. Raises ObjectNotFound: there is no such commit."""


@dataclass
class _Held:
    """A locked object of a store whose locks cannot be lost."""

    content: bytes | None
    key: str
    store: DirectoryStore | MemoryStore

    def write(self, content: bytes) -> None:
        if _content(self.store, self.key) != self.content:  # by somebody who asks for no lock
            raise Conflict(f"{self.store.uri}/{self.key} was changed meanwhile; look at it, and try again")
        self.store.write(self.key, content)
        self.content = content

    def delete(self, key: str) -> None:
        self.store.delete(key)


def _content(store: DirectoryStore | MemoryStore, key: str) -> bytes | None:
    try:
        return store.read(key)
    except ObjectNotFound:
        return None


class DirectoryStore:
    """A folder as a store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._digests: dict[tuple[str, int, int, int], str] = {}

    @property
    def uri(self) -> str:
        return str(self.root)

    @contextmanager
    def _at(self, key: str, *, root: bool = False) -> Iterator[Path]:
        """A key's path; what the file system refuses there comes out as this store's errors."""
        uri = f"{self.root}/{key}"
        parts = PurePosixPath(key).parts
        if not (parts or root) or PurePosixPath(key).is_absolute() or ".." in parts:
            raise ObjectNotFound(uri)
        try:
            yield self.root.joinpath(*parts)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ObjectNotFound(uri) from error
        except OSError as error:
            raise StoreUnavailable(str(error), uri=uri) from error

    def children(self, prefix: str = "") -> list[str]:
        try:
            with self._at(prefix, root=not prefix) as folder:
                return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and _holds_files(p))
        except ObjectNotFound:
            return []

    def files(self, prefix: str = "") -> dict[str, int]:
        with self._at(prefix, root=not prefix) as folder:
            found = {path.relative_to(self.root): path for path in folder.rglob("*") if path.is_file()}
            shown = {key.as_posix(): path for key, path in found.items() if not _is_hidden(key)}
            return {key: shown[key].stat().st_size for key in sorted(shown)}

    def open(self, key: str) -> BinaryIO:
        with self._at(key) as path:
            return path.open("rb")

    def fingerprint(self, key: str) -> tuple[int, str]:
        with self._at(key) as path:
            status = path.stat()
            known = key, status.st_size, status.st_mtime_ns, status.st_ino
            if known not in self._digests:
                with path.open("rb") as file:
                    self._digests[known] = hashlib.file_digest(file, "sha256").hexdigest()
        return status.st_size, self._digests[known]

    def fingerprints(self, wanted: Callable[[str], bool]) -> dict[str, tuple[int, str]]:
        found = {}
        for key in filter(wanted, self.files()):
            with suppress(ObjectNotFound):  # it was there a moment ago
                found[key] = self.fingerprint(key)
        return found

    def modified(self, key: str) -> float:
        with self._at(key) as path:
            return path.stat().st_mtime

    def read(self, key: str) -> bytes:
        with self._at(key) as path:
            return path.read_bytes()

    def download(self, key: str, target: Path) -> None:
        with self._at(key) as path:
            shutil.copyfile(path, target)

    def write(self, key: str, content: bytes | Path) -> None:
        with self._at(key) as path:
            partial = path.with_name(f".writing-{secrets.token_hex(8)}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                out = partial.open("xb")  # for all who may read files here; what `tempfile` makes is one user's alone
            except OSError as error:  # a file where a folder has to be is no missing object
                raise StoreUnavailable(str(error), uri=str(path)) from error
            try:
                with out:
                    if isinstance(content, bytes):
                        out.write(content)
                    else:
                        with content.open("rb") as source:
                            shutil.copyfileobj(source, out)
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def delete(self, key: str) -> None:
        with self._at(key) as path:
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self, key: str) -> Iterator[Locked]:
        with self._at(f"{LOCKS}/{key}") as path:  # the system's own lock, which falls with its process
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(path, timeout=WAIT_S)
                lock.acquire()
            except Timeout as error:
                raise busy(f"{self.root}/{key}") from error
            except OSError as error:
                raise StoreUnavailable(f"cannot be locked: {error}", uri=f"{self.root}/{key}") from error
        try:
            yield _Held(_content(self, key), key, self)
        finally:
            lock.release()


def _is_hidden(key: Path) -> bool:
    return any(part.startswith(".") for part in key.parts)


def _holds_files(path: Path) -> bool:
    return path.is_dir() and any(below.is_file() for below in path.rglob("*"))


def busy(uri: str) -> StoreUnavailable:
    """What a writer is told whose turn has not come."""
    return StoreUnavailable(f"other writers have had their turns for {WAIT_S:.0f} s; try again", uri=uri)


class MemoryStore:
    """The fake: a dictionary. `down = True` makes every call fail as an unreachable store does."""

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = dict(objects or {})
        self.times: dict[str, float] = {}
        self.down = False
        self.reads: list[str] = []
        self._locks: dict[str, threading.Lock] = {}

    @property
    def uri(self) -> str:
        return "memory://"

    def _check_up(self) -> None:
        if self.down:
            raise StoreUnavailable("the store is down", uri=self.uri)

    def _get(self, key: str) -> bytes:
        self._check_up()
        if key not in self.objects:
            raise ObjectNotFound(f"{self.uri}{key}")
        self.reads.append(key)
        return self.objects[key]

    def children(self, prefix: str = "") -> list[str]:
        self._check_up()
        inside = f"{prefix}/" if prefix else ""
        below = [key.removeprefix(inside) for key in self.objects if key.startswith(inside)]
        return sorted({key.split("/")[0] for key in below if "/" in key})

    def files(self, prefix: str = "") -> dict[str, int]:
        self._check_up()
        inside = f"{prefix}/" if prefix else ""
        return {key: len(self.objects[key]) for key in sorted(self.objects) if key.startswith(inside)}

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self._get(key))

    def fingerprint(self, key: str) -> tuple[int, str]:
        content = self._get(key)
        return len(content), str(hash(content))

    def fingerprints(self, wanted: Callable[[str], bool]) -> dict[str, tuple[int, str]]:
        self._check_up()
        return {key: (len(of), str(hash(of))) for key, of in sorted(self.objects.items()) if wanted(key)}

    def modified(self, key: str) -> float:
        self._get(key)
        return self.times.get(key, 0.0)

    def read(self, key: str) -> bytes:
        return self._get(key)

    def download(self, key: str, target: Path) -> None:
        target.write_bytes(self._get(key))

    def write(self, key: str, content: bytes | Path) -> None:
        self._check_up()
        self.objects[key] = content if isinstance(content, bytes) else content.read_bytes()
        self.times[key] = time.time()

    def delete(self, key: str) -> None:
        self._check_up()
        self.objects.pop(key, None)

    @contextmanager
    def locked(self, key: str) -> Iterator[Locked]:
        lock = self._locks.setdefault(key, threading.Lock())
        if not lock.acquire(timeout=WAIT_S):
            raise busy(f"{self.uri}{key}")
        try:
            yield _Held(_content(self, key), key, self)
        finally:
            lock.release()


def open_store(uri: str | Path) -> ObjectStore:
    """A store by its URI: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`,
    `hf://owner/name@revision/path`, `file:///path`, or a path.

    Raises:
        ConfigError: the scheme is another one, no bucket or repository is named, or what reads it is not installed.
    """
    text = str(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return DirectoryStore(Path(text).expanduser().absolute())
    if scheme == "file":
        return DirectoryStore(Path(rest))
    if scheme == "s3":
        from lorauter.adapters.s3 import S3Store  # each loads only where it is used

        return S3Store.from_uri(text)
    if scheme in ("gs", "az"):
        from lorauter.adapters.clouds import CloudStore

        return CloudStore(text)
    if scheme == "hf":
        from lorauter.adapters.hub import HubStore

        return HubStore(text)
    raise ConfigError(f"{text!r}: unknown scheme {scheme!r}; use {STORES}")
