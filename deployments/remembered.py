"""What was computed of a text is known when the text comes again: an agent asks with the same message at every step.

A text is known by its digest, and is not kept. Knows nothing of what is computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from deployments.together import Number

_MOST = 4096


class Remembered(Generic[Number]):
    """Asks for the rows of those texts that it does not know.

    Args:
        ask: n texts to n rows, each of which is the same whatever else is asked for.
        most: texts that are known at most, those that came last.
    """

    def __init__(self, ask: Callable[[list[str]], Awaitable[NDArray[Number]]], *, most: int = _MOST) -> None:
        self._ask = ask
        self._most = most
        self._known: OrderedDict[bytes, NDArray[Number]] = OrderedDict()

    async def ask(self, texts: list[str]) -> NDArray[Number]:
        """(n, ...) rows of n texts."""
        if not texts:
            return await self._ask(texts)
        keys = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        rows: dict[bytes, NDArray[Number]] = {}
        new: dict[bytes, str] = {}
        for key, text in zip(keys, texts, strict=True):
            row = self._known.get(key)
            if row is None:
                new[key] = text
            else:
                rows[key] = row
        found = await self._ask([*new.values()]) if new else None
        for key in rows:  # by now one of them may have gone
            self._known[key] = rows[key]
            self._known.move_to_end(key)
        if found is not None:
            made = {key: row.copy() for key, row in zip(new, found, strict=True)}  # not the whole lot they are of
            self._known.update(made)
            rows.update(made)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        if found is not None and len(found) == len(texts):  # none is known, and none is there twice
            return found
        return np.concatenate([rows[key] for key in keys]).reshape(len(keys), *rows[keys[0]].shape)
