"""The files of an input: which they are, those that are left out, and each opened, unpacked. Knows no rows."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import BinaryIO, cast

from deployments.batch.config import Format
from lorauter.adapters.store import ObjectStore, open_store
from lorauter.errors import ConfigError, ObjectNotFound

_ENDINGS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
_PACKED = ".gz"
_KNOWN = f"{', '.join(_ENDINGS)}; text also with {_PACKED}"
_GZIP = b"\x1f\x8b"
DAMAGE = (OSError, EOFError, zlib.error)
"""What reading a damaged file raises, beside what its format does."""
_NAMED = 5  # files that are left out, named in one message


@dataclass(frozen=True)
class InputFile:
    """A file of the input: its key, bytes, and a tag that changes with its content."""

    key: str
    size: int
    tag: str


def format_of(name: str) -> Format | None:
    """The format that a file's name ends with, if it is one that can be read."""
    path = PurePosixPath(name.lower())
    packed = path.suffix == _PACKED
    kind = _ENDINGS.get((path.with_suffix("") if packed else path).suffix)
    return None if packed and kind == "parquet" else kind


def find_files(
    uri: str, notify: Callable[[str], None] = lambda text: None
) -> tuple[ObjectStore, Format, tuple[InputFile, ...]]:
    """The files of an input: the one that it names, or those of its folder.

    Names that begin with "_" or "." are left out, as other readers of data sets do. `notify` is told which files are;
    those with "." are no news.

    Raises:
        ConfigError: there is none, or they are of several formats.
    """
    parent, separator, name = uri.rstrip("/").rpartition("/")
    if (kind := format_of(name)) is not None:
        store = open_store(parent or ("/" if separator else "."))
        with suppress(ObjectNotFound):  # a folder may be called like a file
            return store, kind, (InputFile(name, *store.fingerprint(name)),)
    store = open_store(uri)
    there = []
    with suppress(ObjectNotFound):
        there = list(store.files())
    kinds = {key: format_of(key) for key in there if not any(part.startswith("_") for part in key.split("/"))}
    keys = [key for key, kind in kinds.items() if kind is not None]
    found = sorted({kind for kind in kinds.values() if kind is not None})
    if len(found) != 1:
        got = f"files of {', '.join(found) or 'no known format'} ({_some(there)})" if there else "no known format"
        raise ConfigError(
            f"input {uri} {'cannot be used' if there else 'does not exist'}: got {got}, needed files of one format, "
            f"told by their names' ends: {_KNOWN}",
            setting="input",
        )
    if left_out := [key for key in there if key not in keys]:
        notify(f"{len(left_out)} files of {uri} are left out, by their names: {_some(left_out)} (read are {_KNOWN})")
    return store, found[0], tuple(InputFile(key, *store.fingerprint(key)) for key in keys)


def _some(keys: Iterable[str]) -> str:
    keys = iter(keys)
    named = list(islice(keys, _NAMED))
    more = sum(1 for _ in keys)
    return ", ".join(named) + (f" and {more} more" if more else "")


class InputFiles:
    """Opens files of a store, unpacked where they are compressed, whatever they are called.

    The last compressed one stays open: shards are mostly read one after another, and a place in such a file is
    reached only by reading what goes before it.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._kept: tuple[str, BinaryIO] | None = None
        self._closing = ExitStack()  # what is kept

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """The file, at some place. Raises ObjectNotFound, here or when it is read; damage is one of DAMAGE."""
        if self._kept is not None and self._kept[0] == key:
            with self._dropped_on_errors():
                yield self._kept[1]
            return
        with ExitStack() as closing:
            file = closing.enter_context(self._store.open(key))
            packed = file.read(len(_GZIP)) == _GZIP
            file.seek(0)
            if packed:
                self.close()
                file = closing.enter_context(cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 16)))
                self._kept, self._closing = (key, file), closing.pop_all()
            with self._dropped_on_errors():
                yield file

    def close(self) -> None:
        """Keep nothing open."""
        self._kept = None
        self._closing.close()

    @contextmanager
    def _dropped_on_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise
