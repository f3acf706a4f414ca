"""Node caches lend each other what they hold, through Ray's object store, before anybody goes to the store.

Who lacks an adapter asks the other nodes' caches where it is, each for a moment at most. One that has it lends it;
one that is getting it is waited for, so that nodes that want the same at once cause one download. Caches ask each
other for a version, as they are asked for one, and check what they are given against the hashes that the lender has
of it: where a peer has it, the store is not asked at all. Any failure of a peer ends at the store.

Nobody waits in a circle. A peer never fetches for another; it is waited for only if it copies from the store, where
it waits for nobody, or if it began to ask before the one that waits: so a chain of waiting leads to ever earlier
beginnings, and ends at a download. Clocks that disagree may cost a second download, and never a wait.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, RayError

from lorauter.adapters import AdapterManifest, AdapterRepository
from lorauter.adapters.disk_cache import LocalAdapter, Origin, Room
from lorauter.errors import AdapterUnavailable
from lorauter.names import AdapterKey

logger = logging.getLogger("lorauter.peers")

_ASKED = 16  # peers that are asked, at most
_ASK_S = 1.0
_LEND_S = 20.0  # for what a peer has, and for what it is getting
_MUTE_S = 10.0  # for which a peer is left alone that did not answer
_FIND_S = 5.0
_TRIED = 2  # holders that are tried before it is the store's turn


@dataclass(frozen=True, order=True)
class Began:
    """When a cache began to ask for an adapter, in seconds since the epoch, and a number of its own against ties."""

    time: float
    tie: str


@dataclass(frozen=True)
class Whereabouts:
    """What a cache says of a version of an adapter: it has it, copies it from the store, or still asks its peers."""

    state: Literal["here", "copying", "asking"]
    began: Began | None = None


@dataclass(frozen=True)
class Loan:
    """An adapter's files as bytes, by name, and the lender's manifest of them, every hash in it."""

    manifest: AdapterManifest
    files: dict[str, NDArray[np.uint8]]


def lend(local: LocalAdapter) -> Loan | None:
    """What a cache has on its disk, ready for the object store; None if it was evicted meanwhile."""
    files = local.manifest.files
    if any(file.sha256 is None for file in files.values()):  # an entry of a lorauter that knew no lending
        return None
    try:
        return Loan(local.manifest, {name: np.fromfile(local.path / name, np.uint8) for name in files})
    except OSError:
        return None


def order(own: Began, answers: Sequence[tuple[int, Whereabouts]]) -> list[int]:
    """Whom of the peers that answered to ask for a loan, one after the other.

    A few that have it, in any order, so that no lender is everybody's; else one that is getting it and will not wait
    for us, the one that began first.
    """
    holders = [peer for peer, said in answers if said.state == "here"]
    if holders:
        return random.sample(holders, min(len(holders), _TRIED))
    coming = [
        (said.state != "copying", said.began, peer)
        for peer, said in answers
        if said.began is not None and (said.state == "copying" or said.began < own)
    ]
    return [min(coming)[2]] if coming else []


@dataclass
class _Flight:
    began: Began
    state: Literal["asking", "waiting", "copying"] = "asking"


@dataclass
class PeerSource:
    """An adapter's files from a peer, else from the repository. Its methods may run in many threads.

    Args:
        repository: the store.
        find: actor handles of the other nodes' caches.
    """

    repository: AdapterRepository
    find: Callable[[], Sequence[Any]]
    _tie: str = field(default_factory=lambda: uuid.uuid4().hex)
    _flights: dict[AdapterKey, _Flight] = field(default_factory=dict)
    _peers: Sequence[Any] = ()
    _found: float = -_FIND_S
    _muted: dict[Any, float] = field(default_factory=dict)

    def whereabouts(self, key: AdapterKey) -> Whereabouts | None:
        """What to tell a peer of a version that is not on the disk here: None unless it may wait for it."""
        flight = self._flights.get(key)
        return None if flight is None or flight.state == "waiting" else Whereabouts(flight.state, flight.began)

    def fetch(self, key: AdapterKey, room: Room) -> tuple[AdapterManifest, Origin]:
        """See `lorauter.adapters.disk_cache.Source`."""
        flight = self._flights[key] = _Flight(Began(time.time(), self._tie))
        try:
            lenders = self._lenders(key, flight)
            until = time.monotonic() + _LEND_S
            for peer in lenders:
                flight.state = "waiting"
                loan = self._borrow(peer, key, until)
                if loan is not None and _unpack(loan, room(loan.manifest)):
                    return loan.manifest, "peer"
            flight.state = "copying"
            return self.repository.fetch(key, room), "store"
        finally:
            del self._flights[key]  # one flight of a version at a time: the cache sees to it

    def _lenders(self, key: AdapterKey, flight: _Flight) -> list[Any]:
        try:
            peers = self._others()
            asked = [peer.whereabouts.remote(key) for peer in peers]
            answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_ASK_S) if asked else ([], [])
        except RayError:
            logger.warning("the peers cannot be asked for adapter %s", key, exc_info=True)
            return []
        answers = []
        for i, reference in enumerate(asked):
            if reference not in answered:
                self._muted[peers[i]] = time.monotonic()
                continue
            with suppress(RayError):  # it died; the next search does not find it
                if (said := ray.get(reference)) is not None:
                    answers.append((i, said))
        return [peers[i] for i in order(flight.began, answers)]

    def _others(self) -> list[Any]:
        now = time.monotonic()
        if now - self._found > _FIND_S:
            self._found = now
            self._peers = self.find()
            self._muted = {peer: since for peer, since in list(self._muted.items()) if now - since < _MUTE_S}
        peers = [peer for peer in self._peers if now - self._muted.get(peer, -_MUTE_S) >= _MUTE_S]
        return random.sample(peers, min(len(peers), _ASKED))

    def _borrow(self, peer: Any, key: AdapterKey, until: float) -> Loan | None:
        """What a peer lends of a version, if it does."""
        try:
            wait = max(0.0, until - time.monotonic())
            loan: Loan | None = ray.get(peer.lend.remote(key), timeout=wait)
        except GetTimeoutError:
            logger.warning("adapter %s: a peer did not lend it within %.0f s", key, _LEND_S)
            self._muted[peer] = time.monotonic()
            return None
        except RayError:
            return None
        return loan if loan is not None and loan.manifest.key == key else None


def _unpack(loan: Loan, target: Path) -> bool:
    """Write a loan's files; whether each has the size and hash that it must have. Raises OSError: the disk here fails.

    Plain folders have no hashes in the store: what the lender got from there as this very version is the measure.
    """
    if set(loan.files) != set(loan.manifest.files):
        return False
    for name, content in loan.files.items():
        content.tofile(target / name)
    try:
        loan.manifest.check_files(target, "a peer's cache")
    except AdapterUnavailable as error:
        logger.warning("%s", error)
        return False
    return True
