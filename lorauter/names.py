"""What a task's or an adapter's name may look like.

Names become parts of file paths, object keys and HTTP headers, so they are kept to a harmless alphabet.
"""

import re

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

RESERVED = frozenset({"base", "lorauter"})
"""Model names of the HTTP API that no adapter may take."""

RULE = "1 to 128 letters, digits, '.', '_' and '-', the first a letter or a digit"


def is_valid_name(name: object) -> bool:
    """Whether `name` is a string that a task or an adapter may be called."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None
