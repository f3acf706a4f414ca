"""What a task's or an adapter's name may look like, and what tells one version of an adapter from all others.

Names become parts of file paths, object keys and HTTP headers, so they are kept to a harmless alphabet.
"""

import re
from typing import NamedTuple

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

RESERVED = frozenset({"base", "lorauter"})
"""Model names of the HTTP API that no adapter may take."""


class AdapterKey(NamedTuple):
    """One version of one adapter. Whatever keeps adapters keeps them by this: a version's content never changes."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


RULE = "1 to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"


def is_valid_name(name: object) -> bool:
    """Whether `name` is a string that a task or an adapter may be called."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None
