"""Turns in a store that has no locks: whoever has the only claim holds the turn.

Claims are objects. A writer puts its own, then lists them; of two writers the one whose claim came later sees both,
so that never two see none but theirs. Who came first keeps its claim and waits for the others to end or withdraw. A
claim that stays the same for LEASE_S, by the clock of whoever waits, is a dead writer's, and is taken away; a living
one begins nothing under a claim that is older than _HOLD_S. This needs no more of a store than that a listing shows
what was written before. It is no proof against a writer that stands still between its last look at the clock and its
request: where the store has conditional writes, they are (see `lorauter.adapters.s3`).
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from lorauter.adapters.store import WAIT_S, busy
from lorauter.errors import Conflict, StoreError, StoreUnavailable

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
