"""What a catalog knows of adapters by their names, as parts of it. Knows nothing of what it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorauter.catalog.parts import Arrays, Parts, text_in, texts_of
from lorauter.catalog.segments import runs

_ADAPTERS = 4096  # in a part, about


def by_name(values: Mapping[str, Any]) -> list[Arrays]:
    """What is known, in parts; where these end follows from the names."""
    names = sorted(values)
    spans = runs(names, least=_ADAPTERS // 2, mean=_ADAPTERS // 2)
    return [texts_of([{name: values[name] for name in names[start:end]}]) for start, end in spans]


def named(parts: Parts, digests: Sequence[str]) -> dict[str, Any]:
    """The inverse. Raises KeyError, ValueError, CatalogError, StoreError."""
    values: dict[str, Any] = {}
    for part in parts.read_all(digests):
        values |= text_in(part, 0)
    return values
