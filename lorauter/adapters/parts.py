"""An object of a store as a file to read and seek in, by ranges. Knows no store."""

from __future__ import annotations

import io
from typing import Any, BinaryIO, Protocol

_PART = 4 << 20  # bytes of a read at least


class InParts(Protocol):
    """A store that gives parts of objects."""

    def read_part(self, key: str, start: int, length: int) -> bytes:
        """Bytes of an object from `start`; at least one, and none beyond its end may be asked for."""


def buffered(store: InParts, key: str, size: int) -> BinaryIO:
    """An object of `size` bytes as a file."""
    return io.BufferedReader(_Parts(store, key, size), _PART)


class _Parts(io.RawIOBase):
    """An object as a file, read by ranges."""

    def __init__(self, store: InParts, key: str, size: int) -> None:
        super().__init__()
        self._store, self._key, self._size, self._place = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, origin + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._place)
        if length <= 0:
            return 0
        content = self._store.read_part(self._key, self._place, length)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
