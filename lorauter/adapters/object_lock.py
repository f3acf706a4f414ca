"""Turns in a store that has no locks: whoever has the only claim holds the turn.

Claims are objects. A writer puts its own, then lists them; of two writers the one whose claim came later sees both,
so that never two see none but theirs. Who came first keeps its claim and waits for the others to end or withdraw. A
claim that stays the same for LEASE_S, by the clock of whoever waits, is a dead writer's, and is taken away; a living
one begins nothing under a claim that is older than _HOLD_S. This needs no more of a store than that a listing shows
what was written before. It is no proof against a writer that stands still between its last look at the clock and its
request: where the store has conditional writes, they are on top of it (`locked`). Knows no store.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from lorauter.adapters.store import LOCKS, WAIT_S, Locked, busy
from lorauter.errors import Conflict, ObjectNotFound, StoreError, StoreUnavailable

REQUEST_S = 7.0
"""Seconds after which a request under a lock has failed."""

_HOLD_S = 5.0
LEASE_S = 15.0  # longer than _HOLD_S and REQUEST_S together
_FRESH_S = 2.0  # the age of a claim with which a turn begins, at most
_PAUSE_S = (0.03, 0.12)
_FAULTS = 2  # in a row, that are worth another try


class Claims(Protocol):
    """The claims to one turn. Every method may raise StoreUnavailable."""

    def names(self) -> list[str]:
        """Of all that there are."""

    def put(self, name: str) -> None:
        """Add one."""

    def delete(self, name: str) -> None:
        """Take one away, if it is there."""


class Lease:
    """The time that a turn lasts."""

    def __init__(self, uri: str, since: float) -> None:
        self._uri, self._since = uri, since

    def check(self) -> None:
        """Raise Conflict unless there is time for one more request."""
        if time.monotonic() - self._since > _HOLD_S:
            raise Conflict(f"{self._uri}: this writer was too slow, and its turn may be over; try again")


@contextmanager
def turn(claims: Claims, uri: str) -> Iterator[Lease]:
    """Wait for the turn at what `uri` names. Raises StoreUnavailable: it has not come within WAIT_S."""
    claimant = _Claimant(claims)
    try:
        yield Lease(uri, claimant.wait(uri))
    finally:
        claimant.withdraw()


class Lockable(Protocol):
    """A store of objects, as far as a lock needs it. Every request is made once, and has failed after REQUEST_S."""

    @property
    def uri(self) -> str:
        """Where this is, for messages."""

    def read_tagged(self, key: str) -> tuple[bytes, Any]:
        """An object and the tag of its content. Raises ObjectNotFound."""

    def put_once(self, key: str, content: bytes) -> None:
        """Write an object."""

    def replace_once(self, key: str, content: bytes, tag: Any | None) -> Any:
        """Write an object whose tag is this, or that is not there (None), and return its new tag.

        Raises Conflict: it is another, where the store can tell.
        """

    def delete_once(self, key: str) -> None:
        """Remove an object, if it is there."""

    def claims(self, prefix: str) -> list[str]:
        """The last parts of the names of the objects below a prefix, a thousand at least, sorted."""


@contextmanager
def locked(store: Lockable, key: str) -> Iterator[Locked]:
    """An object for one writer at a time; see `ObjectStore.locked`."""
    with turn(_Claims(store, f"{LOCKS}/{key}/"), f"{store.uri}/{key}") as lease:
        yield _Held(store, key, lease)


class _Claims:
    """The objects below one prefix."""

    def __init__(self, store: Lockable, prefix: str) -> None:
        self._store, self._prefix = store, prefix

    def names(self) -> list[str]:
        return self._store.claims(self._prefix)

    def put(self, name: str) -> None:
        self._store.put_once(f"{self._prefix}{name}", b"")

    def delete(self, name: str) -> None:
        self._store.delete_once(f"{self._prefix}{name}")


class _Held:
    """A locked object. The store's own condition, where it has one, holds against whoever asks for no lock, too."""

    def __init__(self, store: Lockable, key: str, lease: Lease) -> None:
        self._store, self._key, self._lease = store, key, lease
        self.content, self._tag = self._read()

    def write(self, content: bytes) -> None:
        tag = self._tag
        for attempt in range(2):
            self._lease.check()
            try:
                self._tag = self._store.replace_once(self._key, content, tag)
                break
            except ObjectNotFound as error:
                if tag is None:  # there is no bucket
                    raise
                raise Conflict(f"{self._store.uri}/{self._key} was deleted meanwhile; try again") from error
            except StoreUnavailable:
                now, self._tag = self._read()
                if now == content:  # it came, though the answer did not
                    break
                if attempt or now != self.content:
                    raise
        self.content = content

    def delete(self, key: str) -> None:
        self._lease.check()
        self._store.delete_once(key)

    def _read(self) -> tuple[bytes | None, Any]:
        try:
            return self._store.read_tagged(self._key)
        except ObjectNotFound:
            return None, None


class _Claimant:
    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._self = f"{time.time_ns():020d}-{uuid.uuid4().hex}"  # who came first goes first, as far as clocks agree
        self._own: list[str] = []  # claims that may stand; the last one counts
        self._number = 0
        self._since = 0.0
        self._seen: dict[str, float] = {}

    def wait(self, uri: str) -> float:
        """Until the turn has come; returns when it began."""
        deadline, faults = time.monotonic() + WAIT_S, 0
        while True:
            try:
                if self._try():
                    return self._since
                faults = 0
            except StoreUnavailable:
                faults += 1
                if faults > _FAULTS:
                    raise
            if time.monotonic() > deadline:
                raise busy(uri)
            time.sleep(random.uniform(*_PAUSE_S))

    def _try(self) -> bool:
        names = self._claims.names()
        now = time.monotonic()
        others = [name for name in names if not name.startswith(self._self)]
        self._seen = {name: self._seen.get(name, now) for name in others}
        for name in [name for name, since in self._seen.items() if now - since > LEASE_S]:
            self._claims.delete(name)
            others.remove(name)
        claimed = bool(self._own) and self._own[-1] in names and now - self._since < _FRESH_S
        if claimed and not others:
            return True
        if any(name < self._self for name in others):
            self.withdraw()
            return False
        if not claimed:
            self.withdraw()
            self._number += 1
            self._own.append(f"{self._self}-{self._number}")  # before it is put: it may come though no answer does
            self._since = time.monotonic()
            self._claims.put(self._own[-1])
            return not others and self._claims.names() == self._own
        return False

    def withdraw(self) -> None:
        """Take the own claims away; one that cannot be is a dead writer's soon."""
        with suppress(StoreError):
            while self._own:
                self._claims.delete(self._own[-1])
                self._own.pop()
