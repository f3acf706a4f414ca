"""Files that commands write: whole or not at all, and never in the place of what is no file."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


@contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """A file to write to that lies at `path` in the end; after an error nothing has changed there.

    Raises:
        OSError: it cannot be written, or a folder, a device or a pipe is there.
    """
    if path.exists() and not path.is_file():  # or a file would be in the place of /dev/null
        raise FileExistsError(f"{path} is no file that could be replaced")
    path = path.resolve()  # a link stays where it is
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # two commands may write the same
    try:
        with partial.open("x", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()
