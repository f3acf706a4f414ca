"""The files that a catalog's versions share: named by their content, so that what stays the same is stored once.

A part is a few named arrays in one file under `parts/` in the catalog's store, whose name is its SHA-256. Knows
nothing of what the arrays mean.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorauter.adapters.store import ObjectStore
from lorauter.errors import BucketNotFound, CatalogError, ObjectNotFound

FOLDER = "parts"
_ALIGNED = 64  # bytes
_AT_ONCE = 16  # of a store's requests
_REMEMBERED = 4  # parts that were read last
Arrays = Mapping[str, NDArray[Any]]


def key_of(digest: str) -> str:
    """Where a store has a part."""
    return f"{FOLDER}/{digest}"


def digest_of(content: bytes) -> str:
    """What a part is called."""
    return hashlib.sha256(content).hexdigest()


def pack(arrays: Arrays) -> bytes:
    """The arrays as one file; the same arrays make the same bytes."""
    head, bodies, offset = {}, [], 0
    for name, array in sorted(arrays.items()):
        body = np.ascontiguousarray(array).tobytes()
        head[name] = [array.dtype.str, list(array.shape), offset]
        bodies.append(body + bytes(-len(body) % _ALIGNED))
        offset += len(bodies[-1])
    first = json.dumps(head, sort_keys=True).encode()
    return b"".join([first + b" " * (-(len(first) + 1) % _ALIGNED) + b"\n", *bodies])


def unpack(content: bytes) -> Arrays:
    """The inverse of `pack`; the arrays cannot be written to. Raises ValueError, KeyError, TypeError: it is none."""
    start = content.index(b"\n") + 1
    arrays = {}
    for name, (dtype, shape, offset) in json.loads(content[:start]).items():
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise ValueError(f"{name} has no numbers")
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(content, kind, count, start + offset if count else 0).reshape(shape)
    return arrays


def texts_of(rows: Iterable[Any]) -> Arrays:
    """JSON values as arrays, one after the other: `text` and where each of them `ends`."""
    raw = [json.dumps(row, sort_keys=True, ensure_ascii=False).encode() for row in rows]
    return {
        "text": np.frombuffer(b"".join(raw), np.uint8),
        "text_ends": np.cumsum([len(row) for row in raw], dtype=np.int64),
    }


def text_in(arrays: Arrays, row: int) -> Any:
    """One of the values that `texts_of` took."""
    ends = arrays["text_ends"]
    return json.loads(arrays["text"][ends[row - 1] if row else 0 : ends[row]].tobytes())


class Parts:
    """The parts that a store has, each verified as it is read. Some that were read last are remembered."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._last: OrderedDict[str, Arrays] = OrderedDict()

    def read(self, digest: str) -> Arrays:
        """Raises CatalogError: it is damaged or not there; StoreError."""
        found = self._last.pop(digest, None)
        if found is None:
            try:
                found = self._read(digest)
            except BucketNotFound:
                raise
            except ObjectNotFound as error:
                raise CatalogError(f"is incomplete ({error}); publish it again", uri=self.store.uri) from error
        self._last[digest] = found
        while len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)
        return found

    def read_all(self, digests: Sequence[str]) -> Iterator[Arrays]:
        """Several at once, in their order; none of them is remembered. Raises as `read`, but ObjectNotFound."""
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            for start in range(0, len(digests), _AT_ONCE):
                yield from threads.map(self._read, digests[start : start + _AT_ONCE])

    def missing(self, digests: Collection[str]) -> set[str]:
        """Those that are not there. Raises StoreUnavailable."""
        there = self.store.files(FOLDER) if FOLDER in self.store.children() else {}
        return {digest for digest in digests if key_of(digest) not in there}

    def write(self, contents: Iterable[bytes]) -> None:
        """Raises StoreError."""
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            left = iter(contents)
            while some := list(islice(left, _AT_ONCE)):  # no more of them are in memory at once
                list(threads.map(self._write, some))

    def _write(self, content: bytes) -> None:
        self.store.write(key_of(digest_of(content)), content)

    def _read(self, digest: str) -> Arrays:
        content = self.store.read(key_of(digest))
        if digest_of(content) != digest:
            raise CatalogError(f"{key_of(digest)} is damaged; publish the catalog again", uri=self.store.uri)
        try:
            return unpack(content)
        except (ValueError, KeyError, TypeError) as error:
            raise CatalogError(f"{key_of(digest)} is malformed: {error!r}", uri=self.store.uri) from error
