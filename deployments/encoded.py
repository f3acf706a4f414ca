"""JSON as answers hold it, and their ids. pydantic's encoder takes a sixth of the standard library's time."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json


def encoded(value: Any) -> bytes:
    """A value of plain ones as JSON, in UTF-8; a number that is none is null."""
    return to_json(value, inf_nan_mode="null")


def event(content: Mapping[str, Any], kind: str | None = None) -> bytes:
    """A server-sent event, of a kind where its API names them."""
    data = b"data: %s\n\n" % encoded(content)
    return data if kind is None else b"event: %s\n%s" % (kind.encode(), data)


def new_id() -> str:
    """32 hexadecimal digits that nobody can guess."""
    return secrets.token_hex(16)
