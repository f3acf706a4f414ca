"""Repositories of the Hugging Face hub: `hf://owner/name@revision/path`, of which revision and path may be left out.

Read through huggingface_hub, with its token (`HF_TOKEN`, or a login), its endpoint (`HF_ENDPOINT`) and its cache, and
never written. A revision is a commit: a branch or tag is looked up for each listing, and what was found at a commit
(`at`) stays. `hf://datasets/owner/name` is a repository of data.

A repository, or a folder of one, whose root is an adapter is shown as a store of that one adapter, by the
repository's or folder's name: most adapters on the hub lie so. Of adapters nothing more is known here.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import httpx2
from huggingface_hub import (
    HfApi,
    HfFileMetadata,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from lorauter.adapters.store import Locked
from lorauter.errors import BucketNotFound, ConfigError, ObjectNotFound, ReadOnlyStore, StoreError, StoreUnavailable

_URI = re.compile(
    r"hf://(?P<kind>datasets/|models/)?(?P<repo>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/@]+))?(?:/(?P<path>.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ALONE = "adapter_config.json"  # at the root: it is one adapter
_API_S = 10.0
_FRESH_S = 2.0  # for which a listing is the newest
_KEPT = 32  # commits whose listings are kept


class _Silent(tqdm):
    """A progress bar that nobody sees: a service has no terminal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _File:
    """A file at a commit: its size and tag (of its content) are None where the hub did not list them."""

    path: str
    size: int | None
    tag: str | None


@dataclass(frozen=True)
class _Listing:
    """What a commit holds, by key."""

    commit: str
    modified: float
    files: dict[str, _File]


class HubStore:
    """A repository of the hub, or a folder of one, as a store that can only be read.

    Args:
        uri: `hf://owner/name@revision/path`.

    Raises:
        ConfigError: it is none.
    """

    def __init__(self, uri: str) -> None:
        found = _URI.fullmatch(uri)
        if found is None or ".." in (found["path"] or "").split("/"):
            raise ConfigError(f"{uri!r} names no repository of the hub; use hf://owner/name@revision/path")
        self._kind = "dataset" if found["kind"] == "datasets/" else "model"
        self._repo = found["repo"]
        self._revision = unquote(found["revision"]) if found["revision"] else None
        self._path = "/".join(part for part in (found["path"] or "").split("/") if part)
        self._listings: dict[str, _Listing] = {}
        self._latest: tuple[float, _Listing] | None = None
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        revision = f"@{quote(self._revision, safe='')}" if self._revision else ""
        path = f"/{self._path}" if self._path else ""
        return f"hf://{'datasets/' if self._kind == 'dataset' else ''}{self._repo}{revision}{path}"

    @property
    def name(self) -> str:
        """What the folder is called: the last part of the path, or of the repository's id."""
        return (self._path or self._repo).rpartition("/")[2]

    def commit(self) -> str:
        """The commit that the revision names now. Raises as `children`."""
        return self._listing().commit

    def at(self, commit: str | None = None) -> HubStore:
        """The store as it is at a commit; at the one that its revision names now, where none is given.

        Raises:
            ObjectNotFound: there is no such repository, or revision.
            StoreError: the hub refuses, or does not answer.
        """
        listing = self._listing() if commit is None else self._listed_at(commit)
        pinned = HubStore(self.uri)
        pinned._revision = listing.commit
        pinned._listings[listing.commit] = listing
        return pinned

    def _listing(self) -> _Listing:
        """What is there now; of a commit, what has always been."""
        if self._revision is not None and _COMMIT.fullmatch(self._revision):
            return self._listed_at(self._revision)
        with self._lock:
            if self._latest is None or time.monotonic() - self._latest[0] > _FRESH_S:
                listing = self._ask(self._revision)
                self._latest = time.monotonic(), listing
                self._keep(listing)
            return self._latest[1]

    def _listed_at(self, commit: str) -> _Listing:
        with self._lock:
            if commit not in self._listings:
                self._keep(self._ask(commit))
            return self._listings[commit]

    def _keep(self, listing: _Listing) -> None:
        self._listings[listing.commit] = listing
        if len(self._listings) > _KEPT:
            self._listings.pop(next(iter(self._listings)))

    def _ask(self, revision: str | None) -> _Listing:
        if constants.is_offline_mode():
            return self._cached_listing(revision or constants.DEFAULT_REVISION)
        with self._errors(""):
            api = HfApi()
            ask = api.dataset_info if self._kind == "dataset" else api.model_info
            found = ask(self._repo, revision=revision, timeout=_API_S, files_metadata=True)
        if found.sha is None:
            raise StoreError("the hub names no commit; does HF_ENDPOINT speak the hub's API?", uri=self.uri)
        files = []
        for file in found.siblings or []:
            size, tag = (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size, file.blob_id)
            files.append(_File(file.rfilename, size, tag))
        return self._listed(found.sha, found.last_modified.timestamp() if found.last_modified else 0.0, files)

    def _cached_listing(self, revision: str) -> _Listing:
        """What the hub's cache on this machine has of a revision, which may be less than all."""
        folder = Path(constants.HF_HUB_CACHE) / f"{self._kind}s--{self._repo.replace('/', '--')}"
        ref = folder / "refs" / revision
        commit = ref.read_text().strip() if ref.is_file() else revision
        snapshot = folder / "snapshots" / commit
        if not (_COMMIT.fullmatch(commit) and snapshot.is_dir()):
            raise StoreUnavailable(
                f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} has no {revision!r} of it; run: hf download "
                f"{self._repo} --revision {revision}",
                uri=self.uri,
            )
        files = [
            _File(path.relative_to(snapshot).as_posix(), path.stat().st_size, path.resolve().name)
            for path in snapshot.rglob("*")
            if path.is_file()
        ]
        return self._listed(commit, snapshot.stat().st_mtime, files)

    def _listed(self, commit: str, modified: float, files: list[_File]) -> _Listing:
        """The files below the path, by key."""
        below = f"{self._path}/" if self._path else ""
        found = {file.path.removeprefix(below): file for file in files if file.path.startswith(below)}
        if _ALONE in found:
            found = {f"{self.name}/{key}": file for key, file in found.items()}
        return _Listing(commit, modified, found)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        uri = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except GatedRepoError as error:
            raise StoreError(
                f"{self._repo} is gated: ask for access on its page at the hub, and set HF_TOKEN to a token of an "
                "account that has it",
                uri=uri,
            ) from error
        except DisabledRepoError as error:
            raise StoreError(f"the hub has disabled {self._repo}", uri=uri) from error
        except RepositoryNotFoundError as error:
            raise BucketNotFound(
                uri,
                self._repo,
                f"the hub has no repository {self._repo!r}, or it is private and HF_TOKEN is not set to a token that "
                "may read it; mind the spelling",
            ) from error
        except RevisionNotFoundError as error:
            raise ObjectNotFound(uri, f"{self._repo} has no branch, tag or commit of this name") from error
        except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.TransportError) as error:
            raise StoreUnavailable(
                f"the hub cannot be reached ({_brief(error)}); is the network up, and are HF_ENDPOINT and "
                "HF_HUB_OFFLINE right?",
                uri=uri,
            ) from error
        except EntryNotFoundError as error:
            raise ObjectNotFound(uri) from error
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 500
            if status in (401, 403):
                raise StoreError(
                    f"the hub refuses ({status}); is HF_TOKEN, or the login, valid, and may it read {self._repo}?",
                    uri=uri,
                ) from error
            kind = StoreUnavailable if status >= 500 or status in (408, 429) else StoreError
            raise kind(f"the hub answered {status}: {_brief(error)}", uri=uri) from error
        except HFValidationError as error:
            raise ConfigError(f"{self.uri!r} names no repository of the hub: {_brief(error)}") from error
        except OSError as error:
            raise StoreUnavailable(_brief(error), uri=uri) from error

    def _file(self, key: str) -> tuple[_Listing, _File]:
        listing = self._listing()
        if key not in listing.files:
            raise ObjectNotFound(f"{self.uri}/{key}")
        return listing, listing.files[key]

    def children(self, prefix: str = "") -> list[str]:
        below = f"{prefix}/" if prefix else ""
        rest = (key.removeprefix(below) for key in self._listing().files if key.startswith(below))
        return sorted({key.split("/")[0] for key in rest if "/" in key and not key.startswith(".")})

    def files(self, prefix: str = "") -> dict[str, int]:
        below = f"{prefix}/" if prefix else ""
        keys = (key for key in self._listing().files if key.startswith(below))
        return {key: self.fingerprint(key)[0] for key in sorted(keys) if not _is_hidden(key)}

    def open(self, key: str) -> BinaryIO:
        return self.cached(key).open("rb")

    def fingerprint(self, key: str) -> tuple[int, str]:
        listing, file = self._file(key)
        if file.size is not None and file.tag is not None:
            return file.size, file.tag
        with self._errors(key):  # mirrors of the hub list names alone
            found = self._head(listing, file)
        if found.size is None or found.etag is None:
            raise StoreError(
                "the hub gives no size or no ETag; does HF_ENDPOINT speak its API?", uri=f"{self.uri}/{key}"
            )
        listing.files[key] = _File(file.path, found.size, found.etag)
        return found.size, found.etag

    def fingerprints(self, wanted: Callable[[str], bool]) -> dict[str, tuple[int, str]]:
        return {key: self.fingerprint(key) for key in self._listing().files if wanted(key)}

    def modified(self, key: str) -> float:
        """When the commit was made, of all that it holds."""
        return self._file(key)[0].modified

    def read(self, key: str) -> bytes:
        return self.cached(key).read_bytes()

    def cached(self, key: str) -> Path:
        """The file in the hub's own cache on this machine, brought there if need be. Raises ObjectNotFound."""
        listing, file = self._file(key)
        return self._known(listing, file) or self._fetch(key, listing, file)

    def download(self, key: str, target: Path) -> None:
        """Copy the object to the file `target`: out of the hub's cache if it is there, and into no other place if not.

        That cache has no bounds, and who keeps adapters has some.
        """
        listing, file = self._file(key)
        if (known := self._known(listing, file)) is not None:
            shutil.copyfile(known, target)
        else:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".hub-") as scratch:
                self._fetch(key, listing, file, Path(scratch)).replace(target)

    def _known(self, listing: _Listing, file: _File) -> Path | None:
        found = try_to_load_from_cache(self._repo, file.path, repo_type=self._kind, revision=listing.commit)
        return Path(found) if isinstance(found, str) else None

    def _fetch(self, key: str, listing: _Listing, file: _File, folder: Path | None = None) -> Path:
        """The file, brought into a folder, or else the hub's cache, and verified."""
        size, tag = self.fingerprint(key)
        with self._errors(key):
            self._head(listing, file)  # which says at once what the library says after many tries
            came = hf_hub_download(
                self._repo,
                file.path,
                repo_type=self._kind,
                revision=listing.commit,
                local_dir=folder,
                tqdm_class=_Silent,
            )
        path = Path(came)
        if path.stat().st_size != size or not _has_tag(path, tag):
            path.resolve().unlink()  # in the cache it is a link
            path.unlink(missing_ok=True)
            message = "what came is damaged: it has not the size and hash that the hub says"
            raise StoreUnavailable(message, uri=f"{self.uri}/{key}")
        return path

    def _head(self, listing: _Listing, file: _File) -> HfFileMetadata:
        url = hf_hub_url(self._repo, file.path, repo_type=self._kind, revision=listing.commit)
        return get_hf_file_metadata(url, timeout=_API_S)

    def write(self, key: str, content: bytes | Path) -> None:
        raise ReadOnlyStore(self.uri)

    def delete(self, key: str) -> None:
        raise ReadOnlyStore(self.uri)

    def locked(self, key: str) -> AbstractContextManager[Locked]:
        raise ReadOnlyStore(self.uri)


def _is_hidden(key: str) -> bool:
    return any(part.startswith(".") for part in key.split("/"))


def _has_tag(path: Path, tag: str) -> bool:
    """Whether a file is what its tag says, if it says so: large files have SHA-256, others git's hash."""
    with path.open("rb") as file:
        if _SHA256.fullmatch(tag):
            return hashlib.file_digest(file, "sha256").hexdigest() == tag
        if _COMMIT.fullmatch(tag):
            content = file.read()
            return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == tag
    return True


def _brief(error: BaseException) -> str:
    """What an error says, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
