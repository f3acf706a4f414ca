"""A replica's host-memory tier: adapters parsed and checked, least recently used out first.

Asks the node's cache for files and has the engine read them; knows nothing of stores or devices. Everything is kept by
name and version, and nobody asks which version is current: that is the caller's to know.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from lorauter.adapters import LocalAdapter
from lorauter.adapters.counters import TierCounters
from lorauter.errors import AdapterRejected, AdapterUnavailable
from lorauter.names import AdapterKey

_COPIES = 4  # that are tried before an adapter is not to be had just now
_PAUSE_S = 0.1  # before the second one; it doubles
# What this machine's disk and memory come out as, PyTorch's own words for both among them: nothing of it says anything
# of an adapter. A copy that is evicted while it is read is one of them.
_LOCAL = (OSError, MemoryError, RuntimeError)


class AdapterFiles(Protocol):
    """Where the files come from: the node's cache."""

    async def fetch(self, key: AdapterKey, *, patient: bool = True) -> LocalAdapter:
        """A local copy of a version; one that could not be had a moment ago is tried again for the patient alone."""

    async def discard(self, key: AdapterKey) -> None:
        """Forget a copy that turned out to be unusable."""


class Packed(Protocol):
    """An adapter as it is kept."""

    @property
    def key(self) -> tuple[str, str]:
        """Name and version."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""


P = TypeVar("P", bound=Packed)


class HostAdapters(Generic[P]):
    """Adapters in memory.

    Args:
        files: the node's cache.
        read: makes an adapter ready for the engine, in a thread; raises AdapterRejected for one that it cannot serve.
        budget_bytes: bytes of weights to keep at most; what requests hold counts no longer once it is dropped.
    """

    def __init__(self, files: AdapterFiles, read: Callable[[LocalAdapter], P], *, budget_bytes: int) -> None:
        self._files = files
        self._read_local = read
        self._budget = budget_bytes
        self._loaded: OrderedDict[AdapterKey, P] = OrderedDict()
        self._refused: dict[AdapterKey, AdapterRejected] = {}
        self._loading: dict[AdapterKey, asyncio.Task[P]] = {}
        self._sources: dict[AdapterKey, str] = {}
        self.counters = TierCounters()

    @property
    def resident(self) -> list[AdapterKey]:
        """The adapters in memory, the least recently used first."""
        return list(self._loaded)

    @property
    def held(self) -> tuple[int, int]:
        """How many adapters are in memory, and their bytes; may be asked for by any thread."""
        loaded = list(self._loaded.values())
        return len(loaded), sum(packed.nbytes for packed in loaded)

    def source(self, key: AdapterKey) -> str:
        """The tier that an adapter in memory was in before."""
        return self._sources.get(key, "disk")

    def ready(self, keys: Sequence[AdapterKey]) -> list[P] | None:
        """Adapters that are all in memory; None where one is not."""
        loaded = self._loaded
        if not all(key in loaded for key in keys):
            return None
        for key in keys:
            loaded.move_to_end(key)
        self.counters.hits += len(keys)
        return [loaded[key] for key in keys]

    async def get(self, key: AdapterKey, *, patient: bool = True) -> P:
        """A version of an adapter, parsed once however many requests wait for it.

        Args:
            key: name and version.
            patient: try again what could not be had a moment ago.

        Raises:
            AdapterNotFound, AdapterRejected, AdapterUnavailable.
        """
        if (here := self.ready([key])) is not None:
            return here[0]
        if key in self._refused:
            raise self._refused[key].with_traceback(None)  # or each raise adds its frames, and holds what they hold
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load(key, patient))
            self._loading[key].add_done_callback(lambda _: self._loading.pop(key, None))
        return await asyncio.shield(self._loading[key])

    async def _load(self, key: AdapterKey, patient: bool) -> P:
        packed = await self._read_some_copy(key, patient)
        self._loaded[key] = packed
        total = sum(loaded.nbytes for loaded in self._loaded.values())
        while total > self._budget and len(self._loaded) > 1:
            gone, evicted = self._loaded.popitem(last=False)
            self._sources.pop(gone, None)
            total -= evicted.nbytes
            self.counters.evictions += 1
        return packed

    async def _read_some_copy(self, key: AdapterKey, patient: bool) -> P:
        """Read the adapter. It is refused for good only if a copy that is what the store has is refused twice."""
        pause, refusals = _PAUSE_S, 0
        for attempt in range(1, _COPIES + 1):
            local = await self._files.fetch(key, patient=patient)
            try:
                return await self._read(local)
            except (AdapterRejected, *_LOCAL) as error:
                fault = await asyncio.to_thread(_fault, local, error)
                refusals += fault is None
                if refusals == 2 and isinstance(error, AdapterRejected):
                    self._refused[key] = error
                    raise
                if attempt == _COPIES:
                    raise AdapterUnavailable(
                        f"its local copies cannot be read: {fault or error}", adapter=key.name
                    ) from error
            if fault is not None:
                if isinstance(fault, AdapterUnavailable):  # damaged on the disk
                    await self._files.discard(key)
                await asyncio.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _read(self, local: LocalAdapter) -> P:
        started = time.monotonic()
        packed = await asyncio.to_thread(self._read_local, local)
        self.counters.misses += 1
        self._sources[local.key] = local.tier
        self.counters.load_seconds += time.monotonic() - started
        return packed


def _fault(local: LocalAdapter, error: Exception) -> Exception | None:
    """What is wrong with a copy that could not be read, or with this machine; None where it is the adapter itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _LOCAL) and not isinstance(cause, (RecursionError, NotImplementedError)):
            return error
        cause = cause.__cause__
    try:
        local.manifest.check_files(local.path, "the node's cache")
    except AdapterUnavailable as damage:
        return damage if damage.__cause__ is None else error
    return None
