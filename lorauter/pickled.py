"""Values and errors on their way to another process."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

_UNKNOWN = object()


class Sparse:
    """A dataclass that travels as those of its fields that are not what its class has them be: with dozens of them, as
    options have, that takes a third of the time. Its defaults are plain values, and the same at the other end."""

    def __getstate__(self) -> dict[str, Any]:
        own = type(self)
        return {name: value for name, value in vars(self).items() if value is not getattr(own, name, _UNKNOWN)}

    def but(self, **changes: Any) -> Self:
        """The same with some fields changed to what needs no check: `dataclasses.replace` takes a value of dozens of
        fields apart, and makes it anew. Not for one whose properties are kept."""
        made = object.__new__(type(self))
        vars(made).update(vars(self), **changes)
        return made


@dataclass(frozen=True)
class PickledError:
    """An error and the causes behind it, which Python's pickles leave out; what cannot be pickled is told in words."""

    chain: tuple[bytes, ...]

    @classmethod
    def of(cls, error: BaseException) -> PickledError:
        """Of an error that was caught."""
        chain: list[bytes] = []
        step: BaseException | None = error
        while step is not None and len(chain) < 8:
            chain.append(_pickled(step))
            step = step.__cause__ or (None if step.__suppress_context__ else step.__context__)
        return cls(tuple(chain))

    def raised(self) -> Exception:
        """The error, with its causes. To be asked of what comes from a process that is trusted."""
        chain = [pickle.loads(item) for item in self.chain]  # noqa: S301
        for error, cause in pairwise(chain):
            error.__cause__ = cause
        found: Exception = chain[0]
        return found


def _pickled(error: BaseException) -> bytes:
    try:
        packed = pickle.dumps(error)
        if isinstance(pickle.loads(packed), Exception):  # noqa: S301 (just pickled)
            return packed
    except Exception:  # noqa: BLE001, S110 (what it says is kept at least)
        pass
    return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
