"""A replica's host-memory tier: adapters parsed and checked, least recently used out first.

Asks the node's cache for files and turns them into weights; knows nothing of stores or devices.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from lorauter.adapters import LocalAdapter, LoraWeights
from lorauter.adapters.counters import TierCounters
from lorauter.errors import AdapterRejected, AdapterUnavailable

_Key = tuple[str, str]


class AdapterFiles(Protocol):
    """Where the files come from: the node's cache."""

    async def fetch(self, names: list[str]) -> list[LocalAdapter]:
        """Local copies of the current versions."""

    async def discard(self, name: str, version: str) -> None:
        """Forget a copy that turned out to be unusable."""


class Packed(Protocol):
    """An adapter as it is kept."""

    @property
    def key(self) -> _Key:
        """Name and version."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""


P = TypeVar("P", bound=Packed)


class HostAdapters(Generic[P]):
    """Adapters in memory.

    Args:
        files: the node's cache.
        pack: makes an adapter ready for the engine; raises AdapterRejected for one that it cannot serve.
        budget_bytes: bytes of weights to keep at most; what requests hold counts no longer once it is dropped.
        revalidate_s: for how long an adapter's version is trusted before the node's cache is asked again.
    """

    def __init__(
        self,
        files: AdapterFiles,
        pack: Callable[[LoraWeights], P],
        *,
        budget_bytes: int,
        revalidate_s: float,
    ) -> None:
        self._files = files
        self._pack = pack
        self._budget = budget_bytes
        self._revalidate_s = revalidate_s
        self._current: dict[str, tuple[_Key, float]] = {}
        self._loaded: OrderedDict[_Key, P] = OrderedDict()
        self._refused: dict[_Key, AdapterRejected] = {}
        self._loading: dict[_Key, asyncio.Task[P]] = {}
        self.counters = TierCounters()

    @property
    def resident(self) -> list[_Key]:
        """The adapters in memory in their current versions, the least recently used first."""
        return [key for key in self._loaded if self._current.get(key[0], (None,))[0] == key]

    @property
    def held(self) -> tuple[int, int]:
        """How many adapters are in memory, and their bytes; may be asked for by any thread."""
        loaded = list(self._loaded.values())
        return len(loaded), sum(packed.nbytes for packed in loaded)

    async def get(self, names: Sequence[str]) -> list[P]:
        """The current versions of the adapters.

        Raises:
            AdapterNotFound, AdapterRejected, AdapterUnavailable.
        """
        now = time.monotonic()
        stale = [name for name in dict.fromkeys(names) if self._fresh(name, now) is None]
        self.counters.hits += len(set(names)) - len(stale)
        for local in await self._fetch(stale, now) if stale else []:
            await self._admit(local)
            self._current[local.name] = (local.name, local.version), now
        found = []
        for name in names:
            weights = self._fresh(name, now)
            if weights is None:  # dropped for another of this request's adapters: the budget is too small for both
                [local] = await self._files.fetch([name])
                weights = await self._admit(local)
            found.append(weights)
        return found

    async def _fetch(self, names: list[str], now: float) -> list[LocalAdapter]:
        """Local copies; none, and what is in memory goes on, if the node's cache is down and all of it is here."""
        try:
            return await self._files.fetch(names)
        except AdapterUnavailable:
            known = {name: self._current[name][0] for name in names if name in self._current}
            if len(known) < len(names) or not all(key in self._loaded for key in known.values()):
                raise
            self._current.update({name: (key, now) for name, key in known.items()})
            return []

    def _fresh(self, name: str, now: float) -> P | None:
        key, since = self._current.get(name, (None, 0.0))
        if key is None or now - since > self._revalidate_s or key not in self._loaded:
            return None
        self._loaded.move_to_end(key)
        return self._loaded[key]

    async def _admit(self, local: LocalAdapter) -> P:
        """The weights behind a local copy, parsed once however many requests wait for it."""
        key = local.name, local.version
        if key in self._refused:
            raise self._refused[key].with_traceback(None)  # or each raise adds its frames, and holds what they hold
        if key in self._loaded:
            self.counters.hits += 1
            return self._loaded[key]
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load(local))
            self._loading[key].add_done_callback(lambda _: self._loading.pop(key, None))
        return await asyncio.shield(self._loading[key])

    async def _load(self, local: LocalAdapter) -> P:
        try:
            weights = await self._read(local)
        except AdapterRejected:
            # Evicted or damaged on the disk meanwhile? A fresh copy of the store's decides.
            await self._files.discard(local.name, local.version)
            [local] = await self._files.fetch([local.name])
            try:
                weights = await self._read(local)
            except AdapterRejected as error:
                self._refused[local.name, local.version] = error
                raise
        self._loaded[weights.key] = weights
        total = sum(loaded.nbytes for loaded in self._loaded.values())
        while total > self._budget and len(self._loaded) > 1:
            total -= self._loaded.popitem(last=False)[1].nbytes
            self.counters.evictions += 1
        return weights

    async def _read(self, local: LocalAdapter) -> P:
        started = time.monotonic()
        packed = await asyncio.to_thread(self._read_and_pack, local)
        self.counters.misses += 1
        self.counters.load_seconds += time.monotonic() - started
        return packed

    def _read_and_pack(self, local: LocalAdapter) -> P:
        return self._pack(LoraWeights.load(local.path, name=local.name, version=local.version))
