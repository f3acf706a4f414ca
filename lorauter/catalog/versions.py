"""The versions of a catalog that a store has: which one is current, and how another becomes so.

Every writer goes one way. It uploads what the store lacks of a version, then makes it current under the pointer's lock,
if the pointer is what the writer's work began from. Old versions are deleted under the same lock, and so are parts that
no version has any more; a version is made current only where it is whole: so what is current is there, whoever deletes
meanwhile, and whoever dies. Knows nothing of what a change does.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lorauter.adapters.store import ObjectStore, open_store
from lorauter.catalog.catalog import (
    CURRENT_FILE,
    HEAD_FILE,
    Catalog,
    parts_of,
    pointed_version,
    read_adapters,
    version_in,
)
from lorauter.catalog.parts import FOLDER, key_of
from lorauter.errors import CatalogError, CatalogVersionNotFound, Conflict, ObjectNotFound, StoreUnavailable
from lorauter.names import AdapterKey
from lorauter.tasks import Task

_VERSION = re.compile(r"[0-9a-f]{16}")
_ATTEMPTS = 5
_TURN = "CHANGE"
_SWEPT_AT_ONCE = 100  # parts, so that nobody waits for long


def publish(catalog: Catalog, to: str | Path | ObjectStore, *, over: str | None, known: Catalog | None = None) -> str:
    """Upload a catalog and make it the current version; returns its version.

    Args:
        over: the version that it replaces, which was current when its making began; None where there was none.
        known: a version that was read from there: the parts that it has are not written again.

    Raises:
        Conflict: another version is current by now. This one is in the store, for `use_version`.
        StoreError: the store fails.
    """
    store = _store(to)
    catalog.upload(store, but=known.parts if known is not None else ())
    _make_current(store, catalog, over)
    return catalog.version


def change_catalog(
    source: str | Path | ObjectStore,
    edit: Callable[[Catalog], Catalog],
    *,
    tasks: Collection[str] = (),
    adapters: Collection[str] = (),
    known: Catalog | None = None,
) -> Catalog:
    """Publish what an edit makes of the current version; returns it. One that changes nothing publishes nothing.

    Where somebody else publishes meanwhile, the edit is made again, of theirs.

    Args:
        tasks, adapters: names of what the edit replaces or removes, which nobody else may have changed meanwhile.
        known: a version that was read before, of which no more is read than what has changed since.

    Raises:
        Conflict: somebody else did, or published again and again.
        CatalogError, StoreError: the catalog cannot be read or written.
        Exception: whatever the edit raises.
    """
    store = _store(source)
    if pointed_version(store) is None:  # and so nothing is to be written there
        raise CatalogError("is not there; build it with 'lorauter catalog build'", uri=store.uri)
    first: Catalog | None = None
    for _ in range(_ATTEMPTS):
        with _turn(store):
            known = before = Catalog.load(store, known=known)
            after = edit(before)
            if after.version == before.version:
                return before
            _check_untouched(first or before, before, tasks, adapters)
            first = first or before
            with suppress(Conflict):
                publish(after, store, over=before.version, known=before)
                return after
    raise Conflict(
        f"catalog {store.uri}: somebody else published it {_ATTEMPTS} times meanwhile, and nothing of this change; "
        "try again"
    )


def catalog_versions(source: str | Path | ObjectStore) -> list[str]:
    """The versions that a store has, sorted, whole or not. Raises StoreUnavailable."""
    return [name for name in _store(source).children() if _VERSION.fullmatch(name)]


def named_adapters(source: str | Path | ObjectStore) -> set[AdapterKey]:
    """What any version of a catalog names: services use the current one, may go back to another, and jobs keep theirs.

    Raises:
        CatalogError: there is no version, or one that cannot be read.
        StoreUnavailable: the store fails.
    """
    store = _store(source)
    versions = catalog_versions(store)
    if not versions:
        raise CatalogError("there is none; name the catalog of these adapters", uri=store.uri)
    return {AdapterKey(*item) for version in versions for item in read_adapters(store, version).items()}


def use_version(source: str | Path | ObjectStore, version: str) -> Catalog:
    """Make a version the current one, once every hash of it is verified.

    Raises:
        CatalogVersionNotFound: it is not there.
        CatalogError: it is damaged.
        Conflict: another version became current meanwhile.
        StoreError: the store fails.
    """
    store = _store(source)
    if version not in catalog_versions(store):
        raise CatalogVersionNotFound(version, uri=store.uri)
    over = pointed_version(store)
    catalog = Catalog.load(store, version=version)
    catalog.read_whole(keep=True)
    _make_current(store, catalog, over)
    return catalog


def prune_versions(source: str | Path | ObjectStore, *, keep: int, older_than_s: float) -> list[str]:
    """Delete old versions; the current one stays, and so do `keep` others, the newest, and what was written lately.

    Services hold the version that they use in memory; a batch job's workers read its version when they start.

    Returns:
        The versions that were deleted, the oldest first; none where no version is current.

    Raises:
        StoreError; Conflict: the store is so slow that a part of a version is left for the next time.
    """
    store = _store(source)
    current = pointed_version(store)
    if current is None:
        return []
    before = time.time() - older_than_s
    sent = {version: _sent(store, version) for version in catalog_versions(store) if version != current}
    written = {version: _written(store, version) for version in sent}
    oldest_first = sorted(written, key=lambda version: written[version])
    gone = [
        version
        for version in oldest_first[: max(len(written) - keep, 0)]
        if written[version] < before and _delete(store, version, sent[version])
    ]
    _sweep(store, before)
    return gone


def _delete(store: ObjectStore, version: str, sent: float | None) -> bool:
    """Delete a version, unless somebody has gone back to it, or sent it again, since it was looked at."""
    with store.locked(CURRENT_FILE) as pointer:
        if version_in(pointer.content) == version or _sent(store, version) != sent:
            return False
        for key in sorted(store.files(version), key=lambda key: key != f"{version}/{HEAD_FILE}"):  # so nobody begins
            pointer.delete(key)
    return True


def _sweep(store: ObjectStore, before: float) -> None:
    """Delete the parts that no version has, and that were not written lately.

    Whoever sends a version that is to have one of them looks for it under the same lock, and sends it again.
    """
    left = sorted(_unused(store))
    for start in range(0, len(left), _SWEPT_AT_ONCE):
        with store.locked(CURRENT_FILE) as pointer:
            for key in _unused(store).intersection(left[start : start + _SWEPT_AT_ONCE]):
                with suppress(ObjectNotFound):
                    if store.modified(key) < before:
                        pointer.delete(key)


def _unused(store: ObjectStore) -> set[str]:
    """The keys of parts that no version has; none where a version cannot be understood."""
    try:
        unused = set(store.files(FOLDER))
        for version in catalog_versions(store):
            with suppress(ObjectNotFound):
                unused -= {key_of(digest) for digest in parts_of(json.loads(store.read(f"{version}/{HEAD_FILE}")))}
    except ObjectNotFound:  # there are no parts
        return set()
    except (KeyError, TypeError, ValueError, AttributeError):
        return set()
    return unused


def _make_current(store: ObjectStore, catalog: Catalog, over: str | None) -> None:
    for _ in range(_ATTEMPTS):
        with store.locked(CURRENT_FILE) as pointer:
            current = version_in(pointer.content)
            if current not in (over, catalog.version):
                raise Conflict(
                    f"catalog {store.uri}: somebody else made version {current} current meanwhile, in place of "
                    f"{over or 'none'}; it stays. Yours is in the store as {catalog.version}: compare them by "
                    "'lorauter catalog versions', then make your change again, or take yours by 'lorauter catalog use'"
                )
            missing = catalog.missing_in(store)
            if not missing and _sent(store, catalog.version) is not None:
                pointer.write(catalog.version.encode())
                return
        catalog.upload(
            store, but=catalog.parts - missing
        )  # an old version, which was deleted while it was on its way back
    raise CatalogError(f"version {catalog.version} is deleted as often as it is sent; try again", uri=store.uri)


@contextmanager
def _turn(store: ObjectStore) -> Iterator[None]:
    """Let those who change the catalog do it one after the other, which spares them conflicts.

    Nothing depends on it: who is slow, or does not know of it, is held by the pointer's own condition.
    """
    with ExitStack() as stack:
        with suppress(StoreUnavailable):  # what is wrong with the store will be told by what comes next
            stack.enter_context(store.locked(_TURN))
        yield


def _check_untouched(first: Catalog, now: Catalog, tasks: Collection[str], adapters: Collection[str]) -> None:
    """Raise Conflict where one of these is not what it was."""
    if now.version == first.version:
        return
    changed = [f"task {name!r}" for name in tasks if _task(first, name) != _task(now, name)]
    changed += [f"adapter {name!r}" for name in adapters if first.adapters.get(name) != now.adapters.get(name)]
    if changed:
        raise Conflict(
            f"somebody else changed {', '.join(changed)} meanwhile; theirs stays: "
            "look at it, and make your change again if it is still wanted"
        )


def _task(catalog: Catalog, name: str) -> Task | None:
    place = catalog.place(name)
    return None if place is None else catalog.tasks[place].task


def _sent(store: ObjectStore, version: str) -> float | None:
    """When the last file of a version was written; None while it is on its way."""
    try:
        return store.modified(f"{version}/{HEAD_FILE}")
    except ObjectNotFound:
        return None


def _written(store: ObjectStore, version: str) -> float:
    times = [0.0]
    with suppress(ObjectNotFound):  # somebody else deletes it
        times += [store.modified(key) for key in store.files(version)]
    return max(times)


def _store(source: str | Path | ObjectStore) -> ObjectStore:
    return open_store(source) if isinstance(source, str | Path) else source
