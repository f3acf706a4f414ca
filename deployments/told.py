"""What a client is told of an error: the one place where an error becomes a text for somebody else's eyes.

Errors are worded for whoever runs the service: they name stores, files, tasks and adapters. An admin whose key is
limited to no adapters reads them as they are. Who else may use every adapter reads them without the places that they
name; who is limited to adapters reads what to do, where an error may name what is not theirs. The log has the causes.
Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import re
from typing import Literal

from lorauter.errors import (
    AdapterError,
    AdapterNotFound,
    AdapterRejected,
    AdapterUnavailable,
    CatalogError,
    LorauterError,
    ServiceUnavailable,
    StoreError,
)

logger = logging.getLogger("lorauter.api")

Audience = Literal["operator", "unlimited", "limited"]
"""Who reads it: an admin who is limited to no adapters; somebody else of whom that is true; somebody who is limited."""

_FOR_THE_LIMITED: tuple[tuple[type[LorauterError], str], ...] = (
    (AdapterNotFound, "no such adapter; see GET /v1/models"),
    (AdapterUnavailable, "cannot be had just now; try again"),
    (StoreError, "the store cannot be used just now; try again"),
    (CatalogError, "the catalog cannot be used just now; try again"),
)
_OURS = (AdapterUnavailable, AdapterRejected, StoreError, CatalogError, ServiceUnavailable)  # not of a client's words
_LONGEST = 2000
_PLACE = re.compile(  # URIs, and paths of POSIX and Windows, but not the API's own
    r"""(?:\b[A-Za-z][A-Za-z0-9+.-]+://|(?<![\w.)])(?:~|\.{1,2})?/(?!v1/|healthz)|\b[A-Za-z]:\\|(?<!\\)\\\\(?=\w))"""
    r"""[^\s'",;)]*(?:[ ,'()]+[^\s/\\'",;]*[/\\][^\s'",;)]*)*[^\s'",;):.]"""  # a name may have spaces and the like
)


def told(error: LorauterError, audience: Audience) -> str:
    """An error in words for a client, and not in more than anybody reads: an adapter's file may name what it likes."""
    whole = str(error)
    whole = whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}..."
    if audience == "operator":
        return whole
    text = whole
    if audience == "limited":
        instead = next((words for kind, words in _FOR_THE_LIMITED if isinstance(error, kind)), None)
        if instead is not None:
            text = f"adapter {error.adapter!r}: {instead}" if isinstance(error, AdapterError) else instead
    text = without_places(text)
    if text != whole and isinstance(error, _OURS):
        logger.warning("told without its cause: %s", whole)
    return text


def without_places(text: str) -> str:
    """A text without the URIs and paths in it."""
    return _PLACE.sub("(withheld)", text)
