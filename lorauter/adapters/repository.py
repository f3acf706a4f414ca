"""The adapters in an object store: list, push, describe and download them, each verified.

Layout below the store's root, for an adapter that `push` put there:

    <name>/<version>/adapter_config.json           content-addressed, never changed
    <name>/<version>/adapter_model.safetensors
    <name>/<version>/adapter.json                  the version's manifest: files with size and SHA-256
    <name>/adapter.json                            the manifest of the newest version

A manifest is written after what it speaks of, and the newest version's only if it is what it was when the push began:
a reader sees the old version or the new one, whole, and of two who push at once one is told. A plain PEFT folder
(`<name>/adapter_config.json` beside `<name>/adapter_model.safetensors`, no manifest) is read as well; its
version then comes from the store's own tags of both files, and there is no other: once somebody has overwritten one of
them, the version that a catalog names is not there any more.

In a store that keeps its own history (`store.Versioned`) a plain folder's version is the commit, and every commit is
there: an adapter that a catalog names stays what it was, whatever is committed later.

Which version of an adapter is the newest is asked by who makes a catalog. Who serves what a catalog says asks for that
version, and for no other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorauter.adapters.foreign import what_is_missing
from lorauter.adapters.store import ObjectStore, Versioned
from lorauter.adapters.weights import CONFIG_FILE, WEIGHTS_FILE, LoraWeights
from lorauter.errors import (
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    Conflict,
    ObjectNotFound,
    StoreError,
)
from lorauter.names import RESERVED, RULE, AdapterKey, is_valid_name

logger = logging.getLogger("lorauter.adapters")

MANIFEST_FILE = "adapter.json"
_AT_ONCE = 16  # manifests that are read at the same time
_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_VERSION = re.compile(r"[0-9a-f]{16}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ATTEMPTS = 3

MISNAMED = f"the name is not allowed; use {RULE}, and none of {sorted(RESERVED)}"
Report = Callable[[str], None]
"""Is told what somebody should know of an adapter, in a line."""


@dataclass(frozen=True)
class StoredFile:
    """Where a file of an adapter lies in the store, and what it must be. Unknown hashes are None."""

    key: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class AdapterManifest:
    """One version of one adapter in a store.

    `base_model` and `rank` are informational; `provenance` is what a composed adapter was made of.
    """

    name: str
    version: str
    files: Mapping[str, StoredFile]
    base_model: str = ""
    rank: int | None = None
    provenance: Mapping[str, Any] | None = None

    @property
    def key(self) -> AdapterKey:
        """Name and version."""
        return AdapterKey(self.name, self.version)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def with_hashes(self, folder: Path) -> AdapterManifest:
        """The same, with the hashes of the folder's files where they were unknown. Raises OSError."""
        if all(file.sha256 for file in self.files.values()):
            return self
        files = {
            name: replace(file, sha256=file.sha256 or sha256_of(folder / name)) for name, file in self.files.items()
        }
        return replace(self, files=files)

    def check_files(self, folder: Path, source: str) -> None:
        """Raise AdapterUnavailable unless the folder's files, which `source` gave, have these sizes and hashes."""
        for name, file in self.files.items():
            path = folder / name
            try:
                size, digest = path.stat().st_size, file.sha256 and sha256_of(path)
            except OSError as error:
                raise AdapterUnavailable(f"{name} cannot be read: {error}", adapter=self.name) from error
            if (size, digest) != (file.size, file.sha256):
                raise AdapterUnavailable(
                    f"{name} in {source} is damaged: got {size} bytes with SHA-256 {digest}, needed "
                    f"{file.size} bytes with {file.sha256}; push the adapter again with --force",
                    adapter=self.name,
                )

    def to_json(self) -> dict[str, Any]:
        """The manifest file's content."""
        content = {**vars(self), "files": {name: vars(file) for name, file in self.files.items()}}
        if self.provenance is None:
            del content["provenance"]
        return content

    @classmethod
    def from_json(cls, data: Any, *, name: str) -> AdapterManifest:
        """Read a manifest of the adapter `name`. Raises AdapterRejected if it is malformed."""
        try:
            files = {
                file: StoredFile(str(row["key"]), int(row["size"]), row["sha256"] and str(row["sha256"]))
                for file in _FILES
                for row in [data["files"][file]]
            }
            version = data["version"]
            if data["name"] != name or not (_VERSION.fullmatch(version) or _COMMIT.fullmatch(version)):
                raise ValueError("name or version is not as expected")
            for file, stored in files.items():  # who may write one adapter's folder has no say over another's
                if stored.key not in (f"{name}/{file}", f"{name}/{version}/{file}"):
                    raise ValueError(f"{file} is not in the adapter's own folder")
            provenance = data.get("provenance")
            if provenance is not None and not isinstance(provenance, dict):
                raise ValueError("the provenance is no object")
            return cls(name, version, files, str(data.get("base_model", "")), data.get("rank"), provenance)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AdapterRejected(f"its {MANIFEST_FILE} is malformed: {error!r}", adapter=name) from error


class AdapterRepository:
    """The adapters of one store."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._heads: dict[str, tuple[tuple[int, str], str | None]] = {}  # manifests as `newest` saw them last

    def names(self) -> list[str]:
        """Names of the adapters, sorted. Raises StoreError."""
        return [name for name in self.store.children() if _may_be_called(name)]

    def misnamed(self) -> list[str]:
        """Folders that hold an adapter, and have a name that none may have. Raises StoreError."""
        others = (name for name in self.store.children() if not _may_be_called(name))
        return [name for name in others if f"{name}/{CONFIG_FILE}" in self.store.files(name)]

    def manifest(self, name: str, version: str | None = None) -> AdapterManifest:
        """A version of an adapter; the newest, unless one is named.

        Raises:
            AdapterNotFound, AdapterRejected (malformed, or without weights), AdapterUnavailable (the store fails).
        """
        if not _may_be_called(name):
            raise AdapterNotFound(f"no such adapter; a name is {RULE}", adapter=name)
        if version is not None and not (_VERSION.fullmatch(version) or _COMMIT.fullmatch(version)):
            raise AdapterNotFound(f"{version[:80]!r} is no version", adapter=name)
        try:
            store = self._at(version)
            found = None if version is None else _read_manifest(store, name, f"{name}/{version}/{MANIFEST_FILE}")
            found = found or _read_manifest(store, name, f"{name}/{MANIFEST_FILE}") or _plain_manifest(store, name)
        except ObjectNotFound as error:
            raise AdapterNotFound("is not in the store", adapter=name) from error
        except StoreError as error:
            raise AdapterUnavailable(f"the store cannot be read: {error}", adapter=name) from error
        except (ValueError, RecursionError) as error:
            raise AdapterRejected(f"its {MANIFEST_FILE} is no JSON: {error}", adapter=name) from error
        if version not in (None, found.version):
            raise AdapterNotFound(
                f"version {version} is not in the store, which has {found.version}; have the catalog name that one "
                "(lorauter catalog change --refresh-adapters)",
                adapter=name,
            )
        return found

    def newest(self) -> dict[str, str]:
        """The newest version of every adapter, by one listing of the store and a look at each manifest that is new.

        Raises:
            StoreError, AdapterUnavailable.
        """
        store = self._at(None)
        tags = store.fingerprints(_is_head)
        heads = {name: tag for key, tag in tags.items() for name, file in [key.split("/")] if file == MANIFEST_FILE}
        changed = [name for name, tag in heads.items() if self._heads.get(name, (None,))[0] != tag]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            read = dict(zip(changed, pool.map(self._newest_of, changed), strict=True))
        self._heads = {name: (tag, read[name]) if name in read else self._heads[name] for name, tag in heads.items()}
        found = {name: version for name, (_, version) in self._heads.items() if version is not None}
        for name in {key.split("/")[0] for key in tags} - heads.keys():
            files = {file: tags[f"{name}/{file}"] for file in _FILES if f"{name}/{file}" in tags}
            if len(files) == len(_FILES):
                found[name] = _plain_version(store, files)
        return {name: found[name] for name in sorted(found)}

    def _newest_of(self, name: str) -> str | None:
        """None for one that cannot be served, or has gone since it was listed."""
        try:
            return self.manifest(name).version
        except (AdapterNotFound, AdapterRejected) as error:
            logger.warning("%s", error)
            return None

    def _at(self, version: str | None) -> ObjectStore:
        """Where a version is, or the newest one, if the store keeps its own history: as it was at that commit."""
        if isinstance(self.store, Versioned) and (version is None or _COMMIT.fullmatch(version)):
            return self.store.at(version)
        return self.store

    def is_same(self, name: str, before: str, now: str) -> bool:
        """Whether an adapter is the same at two commits of a store that keeps its own history. Raises StoreError."""
        if not (isinstance(self.store, Versioned) and _COMMIT.fullmatch(before) and _COMMIT.fullmatch(now)):
            return False
        try:
            was, is_ = ([self.store.at(at).fingerprint(f"{name}/{file}") for file in _FILES] for at in (before, now))
        except ObjectNotFound:  # at one of them it is not there
            return False
        return was == is_

    def download(self, manifest: AdapterManifest, target: Path) -> None:
        """Copy an adapter's files into the folder `target` and verify each by size and hash.

        Raises:
            AdapterUnavailable: the store fails, or a file is not what the manifest says (truncated or damaged).
            AdapterNotFound: a plain folder was replaced meanwhile. Nothing in `target` may then be used.
        """
        try:
            store = self._at(manifest.version)
            for name, file in manifest.files.items():
                store.download(file.key, target / name)
        except (StoreError, OSError) as error:
            raise AdapterUnavailable(f"{name} cannot be downloaded: {error}", adapter=manifest.name) from error
        manifest.check_files(target, self.store.uri)
        if any(file.sha256 is None for file in manifest.files.values()):
            # Sizes alone would let a file of another version pass, if it was replaced since the manifest was made.
            self.manifest(*manifest.key)

    def fetch(self, key: AdapterKey, room: Callable[[AdapterManifest], Path]) -> AdapterManifest:
        """Download a version; `room`, told what comes, gives the folder for it. Raises as `manifest` and `download`."""
        manifest = self.manifest(*key)
        self.download(manifest, room(manifest))
        return manifest

    def load(self, manifest: AdapterManifest) -> LoraWeights:
        """Download a version and read it.

        Raises:
            AdapterRejected: it cannot be served, whatever the base model.
            AdapterNotFound, AdapterUnavailable: as `download`.
        """
        for attempt in (1, 2):  # a fault of this machine's disk says nothing of the adapter
            with tempfile.TemporaryDirectory() as scratch:
                self.download(manifest, Path(scratch))
                try:
                    return LoraWeights.load(Path(scratch), name=manifest.name, version=manifest.version)
                except AdapterRejected:
                    if attempt == 2:
                        raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def push(self, folder: Path, *, force: bool = False, report: Report = logger.warning) -> AdapterManifest:
        """Validate a PEFT folder and publish it under the folder's name.

        What the store has already, by manifest and sizes, is sent again only with `force`.

        Args:
            report: is told what is in the folder and has no effect.

        Raises:
            AdapterRejected: it is no adapter that could be served, or its name is not allowed.
            Conflict: somebody else pushed another version, or removed the adapter, meanwhile.
            StoreError: the store fails.
        """
        name = folder.name
        if not _may_be_called(name):
            raise AdapterRejected(MISNAMED, adapter=name)
        key = f"{name}/{MANIFEST_FILE}"
        try:
            before = self.store.read(key)
        except ObjectNotFound:
            before = None
        digests = {file: sha256_of(folder / file) for file in _FILES if (folder / file).is_file()}
        version = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]
        weights = LoraWeights.load(folder, name=name, version=version)
        for warning in weights.warnings:
            report(f"adapter {name!r}: {warning}")
        files = {
            file: StoredFile(f"{name}/{version}/{file}", (folder / file).stat().st_size, digests[file])
            for file in _FILES
        }
        manifest = AdapterManifest(name, version, files, weights.base_model, weights.rank, weights.provenance)
        content = json.dumps(manifest.to_json(), indent=1, sort_keys=True).encode()
        if not force and before == content and self._has(manifest, content):
            return manifest
        for _ in range(_ATTEMPTS):
            for file, stored in files.items():
                self.store.write(stored.key, folder / file)
            self.store.write(f"{name}/{version}/{MANIFEST_FILE}", content)
            with self.store.locked(key) as current:
                if current.content not in (before, content):
                    raise Conflict(
                        f"adapter {name!r}: somebody else pushed another version of it, or removed it, meanwhile; "
                        f"this one ({version}) replaced nothing: look at theirs, then push it again if it is to"
                    )
                if self._has(manifest, content):  # and nobody deletes it while the manifest is locked
                    current.write(content)
                    return manifest
        raise StoreError(f"version {version} is deleted as often as it is sent; try again", uri=self.store.uri)

    def check_current(self, pushed: AdapterManifest) -> None:
        """Raise Conflict unless what was pushed is the adapter's current version still."""
        now = self.manifest(pushed.name)
        if now.version != pushed.version and not self.is_same(pushed.name, pushed.version, now.version):
            raise Conflict(
                f"adapter {pushed.name!r}: somebody else pushed version {now.version} meanwhile, in place of "
                f"{pushed.version}; theirs stays: look at it, then push yours again if it is to replace it"
            )

    def _has(self, manifest: AdapterManifest, content: bytes) -> bool:
        """Whether a version is there whole, with its manifest of this content."""
        try:
            same = self.store.read(f"{manifest.name}/{manifest.version}/{MANIFEST_FILE}") == content
            return same and all(self.store.fingerprint(file.key)[0] == file.size for file in manifest.files.values())
        except ObjectNotFound:
            return False

    def remove(self, name: str) -> None:
        """Delete an adapter with all its versions, what says that it is there first.

        Raises:
            AdapterNotFound, AdapterUnavailable, StoreError; Conflict: the store is so slow that a part is left.
        """
        with suppress(AdapterRejected):  # a malformed one can be taken out too
            self.manifest(name)
        with self.store.locked(f"{name}/{MANIFEST_FILE}") as current:
            for file in (MANIFEST_FILE, *_FILES):
                current.delete(f"{name}/{file}")
        for version in self._versions(name):
            self._delete_version(name, version, before=math.inf)

    def prune(
        self,
        *,
        keep: Container[AdapterKey],
        older_than_s: float,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[AdapterKey]:
        """Delete the versions that nobody names, are not the newest, and have not been for so many seconds.

        Nobody starts to read such a version; who began before has that long to end. What was written lately stays
        too: a push, or the making of a catalog, may be under way.

        Args:
            keep: what catalogs name.
            progress: called with the number of adapters that were looked at, and of all.

        Returns:
            What was deleted.

        Raises:
            AdapterUnavailable, StoreError; Conflict: the store is so slow that a version is left for the next time.
        """
        before = time.time() - older_than_s
        pruned = []
        names = self.names()
        for done, name in enumerate(names, start=1):
            progress(done, len(names))
            manifest = None  # of a removal that was cut off, or a plain folder that took a pushed adapter's place
            with suppress(ObjectNotFound):
                manifest = self.store.read(f"{name}/{MANIFEST_FILE}")
                if self.store.modified(f"{name}/{MANIFEST_FILE}") >= before:
                    continue
            pruned += [
                key
                for key in (AdapterKey(name, version) for version in self._versions(name))
                if key not in keep and not _names(manifest, key.version) and self._delete_version(*key, before)
            ]
        return pruned

    def _versions(self, name: str) -> list[str]:
        return [child for child in self.store.children(name) if _VERSION.fullmatch(child)]

    def _written(self, name: str, version: str) -> float:
        times = [0.0]
        for file in _FILES:
            with suppress(ObjectNotFound):
                times.append(self.store.modified(f"{name}/{version}/{file}"))
        return max(times)

    def _delete_version(self, name: str, version: str, before: float) -> bool:
        """Delete a version if it was written before then, and is not what the manifest names. Returns whether it was.

        A push looks whether its version is there, and writes the manifest, under the same lock.
        """
        with self.store.locked(f"{name}/{MANIFEST_FILE}") as current:
            if _names(current.content, version) or self._written(name, version) >= before:
                return False
            for file in (MANIFEST_FILE, *_FILES):
                current.delete(f"{name}/{version}/{file}")
        return True


def _names(manifest: bytes | None, version: str) -> bool:
    """Whether a manifest may name a version: nobody knows what a malformed one should say."""
    try:
        return manifest is not None and json.loads(manifest)["version"] == version
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


def _may_be_called(name: str) -> bool:
    return is_valid_name(name) and name.lower() not in RESERVED


def _is_head(key: str) -> bool:
    """Whether an object says which version of an adapter is the newest."""
    name, _, file = key.partition("/")
    return file in (MANIFEST_FILE, *_FILES) and _may_be_called(name)


def _read_manifest(store: ObjectStore, name: str, key: str) -> AdapterManifest | None:
    try:
        return AdapterManifest.from_json(json.loads(store.read(key)), name=name)
    except ObjectNotFound:
        return None


def _plain_manifest(store: ObjectStore, name: str) -> AdapterManifest:
    tags = {CONFIG_FILE: store.fingerprint(f"{name}/{CONFIG_FILE}")}
    try:
        tags[WEIGHTS_FILE] = store.fingerprint(f"{name}/{WEIGHTS_FILE}")
    except ObjectNotFound as error:
        what = what_is_missing(key.removeprefix(f"{name}/") for key in store.files(name))
        raise AdapterRejected(f"{WEIGHTS_FILE} cannot be read: {what}", adapter=name) from error
    files = {file: StoredFile(f"{name}/{file}", size, None) for file, (size, _) in tags.items()}
    return AdapterManifest(name, _plain_version(store, tags), files)


def _plain_version(store: ObjectStore, tags: Mapping[str, tuple[int, str]]) -> str:
    """A plain folder's version: the store's own, or by its files' fingerprints, in the order of `_FILES`."""
    if isinstance(store, Versioned):
        return store.commit()
    return hashlib.sha256(json.dumps(tags).encode()).hexdigest()[:16]


def adapter_folders(directory: Path) -> Iterator[Path]:
    """The PEFT folders in a directory (or the directory itself, if it is one), by name."""
    if (directory / CONFIG_FILE).is_file():
        yield directory
    elif directory.is_dir():
        yield from sorted(p for p in directory.iterdir() if (p / CONFIG_FILE).is_file())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
